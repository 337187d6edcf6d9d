"""`changes(a, b)` equals the difference of the two snapshots, read from what was added between them where it can be."""

from __future__ import annotations

import time
from pathlib import Path

import deltalake
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import INFO, applied, commit_deletes, commit_upserts, contents, delete_part, upsert_part

from kblam_ray.errors import DataFileGoneError, TableNotFoundError
from kblam_ray.facts.fact import Fact, fact_id
from kblam_ray.table import changes as changes_module
from kblam_ray.table.changes import find_changes
from kblam_ray.table.compact import compact
from kblam_ray.table.log import TableLog, commit_parts
from kblam_ray.table.part import open_part
from kblam_ray.table.snapshot import read_snapshot
from kblam_ray.table.vacuum import vacuum

NOW = time.time_ns() // 1_000

steps = st.lists(
    st.one_of(
        st.just("compact"),
        st.tuples(
            st.sampled_from(["upsert", "delete"]),
            st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
            st.integers(0, 5),
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15, deadline=None)
@given(steps)
def test_between_any_two_versions_with_skewed_clocks_and_compactions(tmp_path_factory, writes):
    uri = str(tmp_path_factory.mktemp("kb"))
    commit_upserts(uri, [Fact("e0", "p", "first"), Fact("e1", "p", "first")], NOW)
    for number, step in enumerate(writes):
        if step == "compact":
            compact(uri)
            continue
        op, entities, age = step
        facts = [Fact(f"e{entity}", "p", f"v{number}") for entity in entities]
        # Ages up to 5 us under steps of 2 us: some writes come from a clock behind and lose to rows already there.
        part = (upsert_part if op == "upsert" else delete_part)(uri, facts, NOW + 2 * number - age, f"w{number}")
        commit_parts(uri, INFO, [part], f"w{number}")
    newest = TableLog.open(uri).version
    snapshots = [read_snapshot(uri, version) for version in range(newest + 1)]
    states = [contents(snapshot) for snapshot in snapshots]
    rows = [{row["fact_id"]: row for row in snapshot.facts.to_pylist()} for snapshot in snapshots]
    for a in range(newest + 1):
        for b in range(newest + 1):
            found = find_changes(uri, a, b)
            assert applied(states[a], found) == states[b]
            upserted = {id_ for id_, row in rows[b].items() if rows[a].get(id_) != row}
            assert found.upserts.fact_ids_M.tolist() == sorted(upserted)
            assert found.deleted_ids.tolist() == sorted(rows[a].keys() - rows[b].keys())


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "kb")


def facts(*numbers: int, value: str = "v") -> list[Fact]:
    return [Fact(f"e{number}", "p", value) for number in numbers]


@pytest.fixture
def read_paths(monkeypatch) -> list[str]:
    """Every data file opened from here on."""
    opened: list[str] = []

    def record(files, root, path):
        opened.append(path)
        return open_part(files, root, path)

    for module in ("changes", "live"):
        monkeypatch.setattr(f"kblam_ray.table.{module}.open_part", record)
    return opened


def test_upserts_open_only_the_files_added_between(uri, read_paths):
    commit_upserts(uri, facts(*range(50)), NOW)
    commit_upserts(uri, facts(3, 70, value="new"), NOW + 1)
    old, new = (TableLog.open(uri, version).files for version in (0, 1))
    found = find_changes(uri, 0, 1)
    assert contents(found.upserts) == {("e3", "p"): "new", ("e70", "p"): "new"}
    assert {file.path for file in old}.isdisjoint(read_paths)
    assert set(read_paths) == {file.path for file in new} - {file.path for file in old}


def test_a_compaction_changes_nothing_and_reads_nothing(uri, read_paths):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_upserts(uri, facts(2, value="new"), NOW + 1)
    assert compact(uri) == 2
    read_paths.clear()
    assert find_changes(uri, 1, 2).is_empty
    assert read_paths == []


def test_an_append_before_a_compaction_is_found_in_the_file_that_the_compaction_replaced(uri):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_upserts(uri, facts(2, 3, value="new"), NOW + 1)
    assert compact(uri) == 2
    found = find_changes(uri, 0, 2)
    assert contents(found.upserts) == {("e2", "p"): "new", ("e3", "p"): "new"}
    assert found.upserts.version == 2


def test_a_row_that_does_not_win_does_not_show(uri):
    commit_upserts(uri, facts(1, value="from the future"), NOW + 5)
    commit_upserts(uri, facts(1, value="late"), NOW)
    commit_deletes(uri, facts(1), NOW + 1)
    assert find_changes(uri, 0, 2).is_empty


def test_deleting_and_adding_again_between_is_an_upsert(uri):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_deletes(uri, facts(1, 2, 9), NOW + 1)
    commit_upserts(uri, facts(1, value="again"), NOW + 2)
    found = find_changes(uri, 0, 2)
    assert contents(found.upserts) == {("e1", "p"): "again"}
    assert found.deleted_ids.tolist() == [fact_id(Fact("e2", "p", "-"))]


def test_back_to_an_older_version(uri):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_upserts(uri, facts(2, 3, value="new"), NOW + 1)
    found = find_changes(uri, 1, 0)
    assert contents(found.upserts) == {("e2", "p"): "v"}
    assert found.deleted_ids.tolist() == [fact_id(Fact("e3", "p", "-"))]


@pytest.mark.parametrize("lost", ["log", "file"])
def test_without_the_log_or_a_file_it_compares_snapshots(uri, lost):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_upserts(uri, facts(2, 3, value="new"), NOW + 1)
    middle = {file.path for file in TableLog.open(uri).files}
    commit_upserts(uri, facts(3, value="newest"), NOW + 2)
    compact(uri)
    before = contents(read_snapshot(uri, 0))
    deltalake.DeltaTable(uri).create_checkpoint()
    if lost == "log":
        (Path(uri) / "_delta_log" / f"{1:020d}.json").unlink()
        (Path(uri) / "_delta_log" / f"{2:020d}.json").unlink()
    else:
        (Path(uri) / (middle - {file.path for file in TableLog.open(uri, 0).files}).pop()).unlink()
    assert changes_module.find_changes(uri, 3, 3).is_empty
    found = find_changes(uri, 0, 3)
    assert applied(before, found) == {("e1", "p"): "v", ("e2", "p"): "new", ("e3", "p"): "newest"}


def test_another_programs_restore_is_compared_in_full(uri):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_upserts(uri, facts(2, 3, value="new"), NOW + 1)
    deltalake.DeltaTable(uri).restore(0)
    found = find_changes(uri, 1, 2)
    assert contents(found.upserts) == {("e2", "p"): "v"}
    assert found.deleted_ids.tolist() == [fact_id(Fact("e3", "p", "-"))]


def test_versions_whose_files_are_vacuumed_are_an_error_that_says_so(uri):
    commit_upserts(uri, facts(1, 2), NOW)
    commit_upserts(uri, facts(2, value="new"), NOW + 1)
    compact(uri)
    vacuum(uri, 0, allow_short=True)
    with pytest.raises(DataFileGoneError, match=r"no longer exists.*vacuum"):
        find_changes(uri, 0, 2)


def test_a_version_that_does_not_exist_is_named(uri):
    commit_upserts(uri, facts(1), NOW)
    with pytest.raises(TableNotFoundError, match="no version 5"):
        find_changes(uri, 0, 5)
