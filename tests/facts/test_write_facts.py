"""Writing: what is written reads back exactly, and a failed write leaves no trace."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kblam_ray.errors import InputError, StorageError
from kblam_ray.facts import (
    Fact,
    FactRow,
    RejectedRow,
    canonical_metadata,
    content_hash,
    expand_inputs,
    read_facts,
    write_facts,
    write_rejected,
)

NAMES = ["f.jsonl", "f.ndjson.gz", "f.json", "f.json.gz", "f.csv", "f.csv.gz", "f.tsv", "f.tsv.gz", "f.parquet"]

NASTY = [
    '"',
    "'",
    ",",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\\",
    "\0",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1f",
    "[",
    "{",
    "null",
    "NaN",
]
NASTY += ["東京", "القاهرة", "👨‍👩‍👧", "e\u0301", "\U0010ffff", "=1+1", "\\ud800", '""', "#", " "]
ANY_TEXT = st.lists(st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5)
TEXTS = ANY_TEXT.map(lambda pieces: "".join(pieces).strip()).filter(bool)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
METADATA = st.none() | st.dictionaries(TEXTS | st.just("metadata"), JSON_VALUES, max_size=3).map(canonical_metadata)
FACTS = st.builds(Fact, TEXTS, TEXTS, TEXTS, METADATA)

PERU = Fact("Perú", "capital", "Lima", '{"n":1}')


def read(path: str | Path) -> list[Fact]:
    rows = list(read_facts(expand_inputs([str(path)])[0]))
    assert all(isinstance(row, FactRow) for row in rows), rows
    return [row.fact for row in rows if isinstance(row, FactRow)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(facts=st.lists(FACTS, min_size=1, max_size=5))
def test_round_trip_is_exact(tmp_path: Path, name: str, facts: list[Fact]) -> None:
    path = tmp_path / name
    assert write_facts(facts, str(path)) == len(facts)
    again = read(path)
    assert again == facts
    assert [content_hash(fact) for fact in again] == [content_hash(fact) for fact in facts]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_in_an_object_store(s3_uri: str, name: str) -> None:
    uri = f"{s3_uri}/out/{name}"
    facts = [PERU, Fact("東京", "a\nb", '"x"')]
    assert write_facts(iter(facts), uri) == 2
    assert read(uri) == facts
    # Nothing but the file itself.
    assert [file.uri for file in expand_inputs([s3_uri])] == [uri]


@pytest.mark.parametrize("name", ["f.json", "f.json.gz", "f.csv", "f.tsv.gz", "f.parquet"])
def test_no_facts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert write_facts([], str(path)) == 0
    assert read(path) == []


def test_other_programs_read_what_is_written(tmp_path: Path) -> None:
    write_facts([PERU, Fact("a", "b", "c")], str(tmp_path / "f.json"))
    expected = [
        {"entity": "Perú", "property": "capital", "value": "Lima", "metadata": {"n": 1}},
        {"entity": "a", "property": "b", "value": "c"},
    ]
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == expected
    write_facts([PERU], str(tmp_path / "f.csv"))
    assert (tmp_path / "f.csv").read_text(encoding="utf-8") == (
        '"entity","property","value","metadata"\n"Perú","capital","Lima","{""n"":1}"\n'
    )
    write_facts([PERU], str(tmp_path / "f.parquet"))
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.to_pylist() == [{"entity": "Perú", "property": "capital", "value": "Lima", "metadata": '{"n":1}'}]


def test_the_same_facts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in NAMES:
        first, second = tmp_path / f"1-{name}", tmp_path / f"2-{name}"
        write_facts([PERU] * 3, str(first))
        write_facts([PERU] * 3, str(second))
        assert first.read_bytes() == second.read_bytes()


def test_facts_are_written_as_a_reader_would_make_them(tmp_path: Path) -> None:
    write_facts([Fact(" a ", "b", "c\n", '{"z": 1, "a": null}')], str(tmp_path / "f.jsonl"))
    assert (tmp_path / "f.jsonl").read_text() == '{"entity":"a","property":"b","value":"c","metadata":{"z":1}}\n'


def failing() -> Iterator[Fact]:
    yield from [PERU] * 30_000
    raise RuntimeError("the source broke")


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_facts([PERU], str(path))
    with pytest.raises(RuntimeError, match="the source broke"):
        write_facts(failing(), str(path))
    assert read(path) == [PERU]
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(RuntimeError, match="the source broke"):
        write_facts(failing(), str(tmp_path / f"new-{name}"))
    assert os.listdir(tmp_path) == [name]


def test_a_failure_in_the_middle_leaves_the_object_store_as_it_was(s3_uri: str) -> None:
    uri = f"{s3_uri}/f.jsonl"
    write_facts([PERU], uri)
    for target in (uri, f"{s3_uri}/new.jsonl"):
        with pytest.raises(RuntimeError, match="the source broke"):
            write_facts(failing(), target)
    assert [file.uri for file in expand_inputs([s3_uri])] == [uri]
    assert read(uri) == [PERU]


def test_a_fact_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`value` is empty") as caught:
        write_facts([PERU, Fact("Perú", "anthem", " ")], str(tmp_path / "f.jsonl"))
    assert caught.value.where == "fact 2, entity 'Perú'"
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be(tmp_path: Path, s3_uri: str) -> None:
    with pytest.raises(InputError, match="unsupported kind of file"):
        write_facts([PERU], str(tmp_path / "f.xlsx"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError) as caught:
        write_facts([PERU], str(tmp_path / "file" / "f.jsonl"))
    assert caught.value.where == str(tmp_path / "file" / "f.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(StorageError):
        write_facts([PERU], str(tmp_path / "folder.jsonl"))
    with pytest.raises(StorageError):
        write_facts([PERU], "s3://there-is-no-such-bucket/f.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened(Path("/dev/full"), mode))
    for name in ("f.jsonl", "f.json.gz", "f.csv", "f.parquet"):
        with pytest.raises(StorageError, match="No space left") as caught:
            write_facts([PERU] * 40_000, str(tmp_path / name))
        assert caught.value.where == str(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_memory_does_not_grow_with_the_facts(tmp_path: Path, name: str) -> None:
    held: list[int] = []

    def facts() -> Iterator[Fact]:
        for number in range(100_000):
            yield Fact(f"entity {number}", "p", "v")
            if number in (70_000, 99_999):
                held.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    try:
        write_facts(facts(), str(tmp_path / name))
    finally:
        tracemalloc.stop()
    early, late = held
    assert late < early + 2_000_000


def test_rejected_rows(tmp_path: Path, s3_uri: str) -> None:
    rows = [
        RejectedRow("a.csv", 3, "`value` is empty", 'x,"y",'),
        RejectedRow("b.json", 7, "the array breaks off", "東京", fatal=True, unit="row"),
    ]
    expected: list[dict[str, Any]] = [
        {"file": "a.csv", "line": 3, "reason": "`value` is empty", "raw": 'x,"y",', "fatal": False, "unit": "line"},
        {"file": "b.json", "line": 7, "reason": "the array breaks off", "raw": "東京", "fatal": True, "unit": "row"},
    ]
    assert write_rejected(iter(rows), str(tmp_path / "new" / "r.jsonl")) == 2
    text = (tmp_path / "new" / "r.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == expected
    assert write_rejected(rows, str(tmp_path / "r.jsonl.gz")) == 2
    assert gzip.decompress((tmp_path / "r.jsonl.gz").read_bytes()).decode() == text
    assert write_rejected(rows, f"{s3_uri}/r.jsonl") == 2
    with pytest.raises(InputError, match="JSON Lines"):
        write_rejected(rows, str(tmp_path / "r.csv"))
