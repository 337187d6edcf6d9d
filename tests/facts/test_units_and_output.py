"""Stored results are whole or not there; outputs are one file or parts, and nobody else's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kblam_ray.errors import InputError, StorageError
from kblam_ray.facts import Fact, expand_inputs, read_facts
from kblam_ray.facts import output as output_module
from kblam_ray.facts.output import FactsOutput
from kblam_ray.facts.units import UnitStore

FACTS = [Fact("Lyon", f"p{n}", "v") for n in range(7)]


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "x") if request.param == "local" else request.getfixturevalue("s3_uri") + "/x"


def test_a_stored_result_comes_back(uri: str) -> None:
    store = UnitStore(uri)
    assert store.keys() == set()
    assert not store.has("a")
    store.put("a", {"text": "é"})
    store.put("a", {"text": "ü"})
    store.put("b", {})
    assert store.get("a") == {"text": "ü"}
    assert store.has("a")
    assert store.keys() == {"a", "b"}


def test_what_was_never_finished_is_not_there(tmp_path: Path) -> None:
    (tmp_path / ".a.123").write_text('{"half')
    store = UnitStore(str(tmp_path))
    assert store.keys() == set()
    (tmp_path / "c.json").write_text('{"half')
    with pytest.raises(StorageError, match=r"damaged.*c\.json.*delete the file"):
        store.get("c")
    with pytest.raises(StorageError, match=r"absent\.json"):
        store.get("absent")


@pytest.mark.parametrize("name", ["facts.jsonl", "facts"])
def test_written_facts_are_read_back(uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "PART_FACTS", 3)
    target = FactsOutput(f"{uri}/{name}")
    UnitStore(target.work_uri).put("unit", {})
    assert target.write(FACTS) == 7
    assert _read(f"{uri}/{name}") == FACTS
    assert target.write(FACTS[:4]) == 4
    assert _read(f"{uri}/{name}") == FACTS[:4]
    assert _read(uri) == FACTS[:4], "the hidden folder of results is no input"


def _read(uri: str) -> list[Fact]:
    return [row.fact for file in expand_inputs([uri]) for row in read_facts(file)]  # type: ignore[union-attr]


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        FactsOutput(str(tmp_path))
    (tmp_path / "plain").write_text("x")
    with pytest.raises(InputError, match="the output is a file"):
        FactsOutput(str(tmp_path / "plain"))
