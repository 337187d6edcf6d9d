"""The live rule, vectorised, says what its one sentence says; the README's SQL and a plain Delta reader agree."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import INFO, commit_deletes, commit_upserts, contents, delete_part, upsert_part

from kblam_ray.errors import StorageError, TableError
from kblam_ray.facts.fact import Fact, content_hash, fact_id
from kblam_ray.table import part as part_module
from kblam_ray.table.live import LIVE_FACTS_SQL, find_winners, live_index, read_live, winning_rows
from kblam_ray.table.log import TableLog, commit_parts
from kblam_ray.table.schema import FACT_COLUMNS, SCHEMA
from kblam_ray.table.snapshot import read_snapshot

NOW = time.time_ns() // 1_000


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3), st.integers(0, 3))))
def test_the_rule_picks_the_largest_time_then_write_of_each_id(rows):
    ids, times, ranks = (np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ([], [], [])))
    best: dict[int, tuple[int, int]] = {}
    for id_, updated_at, rank in rows:
        best[id_] = max(best.get(id_, (-1, -1)), (updated_at, rank))
    won = winning_rows(ids, times, ranks)
    assert {int(ids[i]): (int(times[i]), int(ranks[i])) for i in won} == best
    assert ids[won].tolist() == sorted(best)


operations = st.lists(
    st.tuples(
        st.sampled_from(["upsert", "delete"]),
        st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
        st.integers(0, 3),
        st.sampled_from("abc"),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(operations)
def test_rows_in_any_order_of_commits_and_the_sql(tmp_path_factory, writes):
    """Commit order says nothing; only (updated_at, write_id) does, and SQL in another engine finds the same rows."""
    uri = str(tmp_path_factory.mktemp("kb"))
    best: dict[str, tuple[int, str, str | None]] = {}
    for number, (op, entities, age, tag) in enumerate(writes):
        facts = [Fact(f"e{entity}", "p", f"v{number}") for entity in entities]
        write_id, updated_at = f"{tag}{number}", NOW - age
        parts = [(upsert_part if op == "upsert" else delete_part)(uri, facts, updated_at, write_id)]
        commit_parts(uri, INFO, parts, write_id)
        for fact in facts:
            row = (updated_at, write_id, fact.value if op == "upsert" else None)
            best[fact.entity] = max(best.get(fact.entity, (0, "", None)), row, key=lambda row: row[:2])
    expected = {(entity, "p"): value for entity, (_, _, value) in best.items() if value is not None}
    snapshot = read_snapshot(uri)
    assert contents(snapshot) == expected
    found = pa.table(QueryBuilder().register("kb", DeltaTable(uri)).execute(LIVE_FACTS_SQL).read_all())
    assert found.select(FACT_COLUMNS).to_pylist() == snapshot.facts.to_pylist()
    assert b"".join(found["key_embedding"].to_pylist()) == snapshot.key_embeddings_MP.tobytes()


@pytest.fixture
def many(tmp_path: Path, monkeypatch) -> tuple[str, list[Fact]]:
    """100 facts in several row groups of two files, every third changed later, every tenth deleted."""
    monkeypatch.setattr(part_module, "MAX_ROW_GROUP_ROWS", 16)
    uri = str(tmp_path / "kb")
    facts = [Fact(f"entity {number}", "p", f"v{number}") for number in range(100)]
    commit_upserts(uri, facts, NOW)
    changed = [Fact(fact.entity, "p", "new") for fact in facts[::3]]
    commit_upserts(uri, changed, NOW + 1)
    commit_deletes(uri, facts[::10], NOW + 2)
    now = {fact.entity: fact for fact in [*facts, *changed]}
    for fact in facts[::10]:
        del now[fact.entity]
    return uri, list(now.values())


def test_streaming_yields_each_live_row_once_a_row_group_at_a_time(many):
    uri, facts = many
    tables = list(read_live(uri, columns=["value", "entity"]))
    assert max(map(len, tables)) <= 16
    assert tables[0].column_names == ["value", "entity"]
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted((row["entity"], row["value"]) for row in rows) == sorted((f.entity, f.value) for f in facts)


def test_the_index_holds_id_and_hash_in_order(many):
    uri, facts = many
    index = live_index(uri)
    expected = dict(sorted((fact_id(fact), content_hash(fact)) for fact in facts))
    assert dict(zip(index["fact_id"].to_pylist(), index["content_hash"].to_pylist(), strict=True)) == expected
    assert index["fact_id"].to_pylist() == list(expected)


def test_asking_for_a_few_facts_reads_only_their_row_groups(many, monkeypatch):
    uri, facts = many
    groups_read: list[int] = []
    read = part_module.pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        part_module.pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, **options: groups_read.extend(groups) or read(self, groups, **options),
    )
    wanted = [fact_id(facts[7]), fact_id(Fact("unheard of", "p", "-")), fact_id(Fact("entity 10", "p", "-"))]
    assert live_index(uri, fact_ids=np.array(wanted))["fact_id"].to_pylist() == [wanted[0]]
    assert 0 < len(groups_read) <= 3 * len(wanted)
    total = sum(part_module.pq.ParquetFile(Path(uri) / file.path).num_row_groups for file in TableLog.open(uri).files)
    assert len(groups_read) < total


def test_every_version_is_read_at_that_version(many):
    uri, _ = many
    assert [len(live_index(uri, version)) for version in range(3)] == [100, 100, 90]
    assert find_winners(uri, 0).rows_of_file.tolist() == [100]


def test_rows_of_embeddings_follow_the_facts(many):
    uri, facts = many
    assert contents(read_snapshot(uri)) == {(fact.entity, fact.property): fact.value for fact in facts}


def test_texts_of_more_than_arrow_can_take_at_once(many, monkeypatch):
    """Arrow's `take` fails beyond 2 GB of text in a column; the limit is lowered so that these rows exceed it."""
    uri, _ = many
    expected = read_snapshot(uri).facts
    monkeypatch.setattr(part_module, "_MAX_TAKE_BYTES", 2_000)
    assert read_snapshot(uri).facts.equals(expected)


def test_a_plain_delta_reader_opens_the_table(many):
    uri, _ = many
    rows = pa.table(DeltaTable(uri).to_pyarrow_table())
    assert len(rows) == 100 + 34 + 10
    assert set(rows["op"].to_pylist()) == {"upsert", "delete"}
    assert str(rows.schema.field("updated_at").type) == "timestamp[us, tz=UTC]"


def test_a_data_file_that_is_gone_is_named(many):
    uri, _ = many
    path = TableLog.open(uri, 0).files[0].path
    (Path(uri) / path).unlink()
    with pytest.raises(StorageError, match=f"no longer exists.*{path}.*Help:"):
        read_snapshot(uri)


def test_a_damaged_data_file_is_named(many):
    uri, _ = many
    path = TableLog.open(uri, 0).files[0].path
    (Path(uri) / path).write_bytes(b"not parquet at all")
    with pytest.raises(StorageError, match=f"damaged.*{path}"):
        read_snapshot(uri)


@pytest.mark.parametrize("column", ["updated_at", "value", "key_embedding"])
@pytest.mark.parametrize("kept_bytes", [0, 60])
def test_a_data_file_with_a_damaged_page_is_named(many, column, kept_bytes):
    """The footer is whole, so that the damage shows only when the column is read."""
    uri, _ = many
    path = TableLog.open(uri, 0).files[0].path
    file = Path(uri) / path
    number = SCHEMA.names.index(column)
    chunk = part_module.pq.ParquetFile(file).metadata.row_group(0).column(number)
    content = bytearray(file.read_bytes())
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    end = start + chunk.total_compressed_size
    content[start + kept_bytes : end] = b"\xff" * (end - start - kept_bytes)
    file.write_bytes(content)
    with pytest.raises(StorageError, match=path):
        read_everything(uri)


def read_everything(uri: str) -> None:
    snapshot = read_snapshot(uri)
    assert len(snapshot.facts) == len(snapshot.key_embeddings_MP)


def test_embeddings_of_another_width_are_refused(tmp_path):
    uri = str(tmp_path / "kb")
    wide = INFO.model_copy(update={"encoder": INFO.encoder.model_copy(update={"dim": 9})})
    commit_parts(uri, wide, [upsert_part(uri, [Fact("a", "b", "c")], NOW, "w")], "w")
    with pytest.raises(TableError, match=f"have not 9 numbers.*{uri}"):
        read_snapshot(uri).key_embeddings_MP  # noqa: B018  reading is what fails
