"""Finished units: whole or not there, on disk and on S3."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from kblam_ray.errors import StorageError
from kblam_ray.evaluation.outcomes import SCHEMA
from kblam_ray.evaluation.sweep import store as module
from kblam_ray.evaluation.sweep.store import UnitStore
from kblam_ray.evaluation.sweep.unit import Found, Unit
from kblam_ray.storage import filesystem

ROWS = pa.Table.from_pylist(
    [{"num_facts": 4, "number": n, "kind": "simple", "wanted": ["北京"]} for n in range(3)], SCHEMA
)
ASKED = Found({"notes": ["é"], "size": {"num_facts": 4}}, ROWS, {"version": "1", "commit": None})
TIMED = Found({"cost": {"points": [1.5, None]}})


def unit(key="a1", part="questions") -> Unit:
    told = {"selection": "all", "entities": "held_out", "held_out": None} if part == "questions" else {"sizes": [1]}
    return Unit(key, part, "tiny", "kb", "/base", "/adapter", "/kb", 0, told)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_is_put_comes_back(where, tmp_path, request):
    store = UnitStore(str(tmp_path / "out") if where == "local" else f"{request.getfixturevalue('s3_uri')}/out")
    assert store.get(unit()) is None
    store.put(unit(), ASKED)
    store.put(unit("b2", "cost"), TIMED)
    found = store.get(unit())
    assert (found.summary, found.rows, found.made_by) == (ASKED.summary, ROWS, ASKED.made_by)
    assert store.get(unit("b2", "cost")) == TIMED
    assert store.get(unit("c3")) is None
    files, path = filesystem(store.uri)
    with files.open_input_stream(f"{path}/a1/summary.json") as stream:
        written = json.loads(stream.read())
    assert written["unit"]["candidate"] == "tiny"
    assert written["num_rows"] == 3


def _cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-40])


@pytest.mark.parametrize("name", ["summary.json", "rows.parquet"])
@pytest.mark.parametrize("damage", [Path.unlink, _cut, lambda place: place.write_bytes(b"")])
def test_what_is_damaged_is_not_done(tmp_path, name, damage):
    store = UnitStore(str(tmp_path))
    store.put(unit(), ASKED)
    damage(tmp_path / "units" / "a1" / name)
    assert store.get(unit()) is None
    store.put(unit(), ASKED)
    assert store.get(unit()).rows == ROWS


def test_rows_of_another_unit_or_of_other_columns_are_not_taken(tmp_path):
    store = UnitStore(str(tmp_path))
    store.put(unit(), ASKED)
    (tmp_path / "units" / "a1").rename(tmp_path / "units" / "b2")
    assert store.get(unit("b2")) is None
    store.put(unit(), Found(ASKED.summary, ROWS.drop_columns(["kind"])))
    assert store.get(unit()) is None
    store.put(unit(), Found(ASKED.summary, ROWS.slice(1)))
    (tmp_path / "units" / "a1" / "rows.parquet").rename(tmp_path / "rows.parquet")
    store.put(unit(), ASKED)
    (tmp_path / "rows.parquet").rename(tmp_path / "units" / "a1" / "rows.parquet")
    assert store.get(unit()) is None


def test_the_summary_comes_last(tmp_path, monkeypatch):
    """A process that ends between the two files has not done the unit."""
    replace_file = module.replace_file

    def ending(uri, data):
        if uri.endswith("summary.json"):
            raise KeyboardInterrupt
        replace_file(uri, data)

    monkeypatch.setattr(module, "replace_file", ending)
    store = UnitStore(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        store.put(unit(), ASKED)
    assert (tmp_path / "units" / "a1" / "rows.parquet").exists()
    assert store.get(unit()) is None


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "units").write_text("a file")
    with pytest.raises(StorageError):
        UnitStore(str(tmp_path)).put(unit(), ASKED)
