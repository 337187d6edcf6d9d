"""Compaction changes no fact that a reader sees, whatever is committed meanwhile; vacuum spares what is needed."""

from __future__ import annotations

import errno
import os
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rows import INFO, commit_deletes, commit_upserts, contents, upsert_part

from kblam_ray.errors import InputError, StorageError
from kblam_ray.facts.fact import Fact
from kblam_ray.table import compact as compact_module
from kblam_ray.table import part as part_module
from kblam_ray.table.changes import find_changes
from kblam_ray.table.compact import commit_rewrite, compact, rewrite_files
from kblam_ray.table.live import find_winners
from kblam_ray.table.log import TableLog, commit_parts, replace_parts
from kblam_ray.table.part import PartFile
from kblam_ray.table.pipeline.spool import write_spool
from kblam_ray.table.schema import new_write_id
from kblam_ray.table.snapshot import read_snapshot
from kblam_ray.table.vacuum import vacuum

NOW = time.time_ns() // 1_000
HOUR_US = 3_600_000_000
OPTIONS = {"target_file_bytes": 2**27, "retention_h": 168}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = str(tmp_path / "kb")
    commit_upserts(uri, facts(*range(20)), NOW)
    commit_upserts(uri, facts(3, 4, 30, value="second"), NOW + 1)
    commit_deletes(uri, facts(5), NOW + 2)
    return uri


def facts(*numbers: int, value: str = "v") -> list[Fact]:
    return [Fact(f"e{number}", "p", value) for number in numbers]


def all_rows(uri: str) -> pa.Table:
    return find_winners(uri).read_sorted(["fact_id", "op", "updated_at", "write_id"])


def test_one_row_per_fact_in_one_sorted_file(uri):
    before, rows = contents(read_snapshot(uri)), all_rows(uri)
    assert compact(uri) == 3
    log = TableLog.open(uri)
    assert len(log.files) == 1
    assert log.files[0].num_rows == len(rows) == 21
    assert all_rows(uri) == rows
    ids = part_module.pq.read_table(Path(uri) / log.files[0].path, columns=["fact_id"])["fact_id"].to_numpy()
    assert (np.diff(ids) > 0).all()
    assert contents(read_snapshot(uri)) == before
    assert log.newest_updated_at() == NOW + 2


def test_nothing_to_gain_no_commit(uri):
    assert compact(uri) == 3
    assert compact(uri) == 3
    assert TableLog.open(uri).version == 3


def test_every_older_version_stays_as_it_was(uri):
    before = [contents(read_snapshot(uri, version)) for version in range(3)]
    compact(uri)
    assert [contents(read_snapshot(uri, version)) for version in range(3)] == before


def test_large_files_without_superseded_rows_are_left_alone(uri):
    compact(uri)
    kept = TableLog.open(uri).files[0]
    commit_upserts(uri, facts(100, 101), NOW + 3)
    commit_upserts(uri, facts(102), NOW + 4)
    # Every file of at least half the target counts as large.
    assert compact(uri, target_file_bytes=2 * kept.size_bytes) == 6
    assert len(TableLog.open(uri).files) == 2
    assert kept in TableLog.open(uri).files


def test_output_is_split_near_the_target_into_disjoint_ranges(uri):
    before = contents(read_snapshot(uri))
    commit_upserts(uri, facts(*range(1_000, 5_000)), NOW + 3)
    commit_upserts(uri, facts(1_000), NOW + 4)
    size = max(file.size_bytes for file in TableLog.open(uri).files)
    version = compact(uri, target_file_bytes=size // 3)
    files = sorted(TableLog.open(uri).files, key=lambda file: file.min_id)
    assert 3 <= len(files) <= 5
    assert all(left.max_id < right.min_id for left, right in pairwise(files))
    assert contents(read_snapshot(uri)) == before | {(f"e{n}", "p"): "v" for n in range(1_000, 5_000)}
    assert compact(uri, target_file_bytes=size // 3) == version


def test_delete_rows_stay_for_the_retention_and_then_go(uri):
    compact(uri)
    assert all_rows(uri)["op"].to_pylist().count("delete") == 1
    time.sleep(0.001)
    assert compact(uri, retention_h=0) == 4
    assert all_rows(uri)["op"].to_pylist().count("delete") == 0
    assert ("e5", "p") not in contents(read_snapshot(uri))


def test_a_delete_row_keeps_an_older_write_that_commits_late_from_winning(uri):
    """A write took its time before the delete, and commits after a compaction has dropped the fact's other rows."""
    late = upsert_part(uri, facts(5, value="late"), NOW + 1, "late")
    compact(uri)
    commit_parts(uri, INFO, [late], "late")
    assert ("e5", "p") not in contents(read_snapshot(uri))
    compact(uri)
    assert ("e5", "p") not in contents(read_snapshot(uri))


def test_everything_deleted_leaves_an_empty_table_that_takes_facts_again(uri):
    commit_deletes(uri, [*facts(*range(20)), *facts(30)], NOW + 3)
    time.sleep(0.001)
    version = compact(uri, retention_h=0)
    assert TableLog.open(uri).files == []
    assert contents(read_snapshot(uri)) == {}
    assert compact(uri) == version
    commit_upserts(uri, facts(1, value="again"), NOW + 4)
    assert contents(read_snapshot(uri)) == {("e1", "p"): "again"}


def test_an_append_a_delete_and_a_second_compaction_between_read_and_commit(uri):
    expected = contents(read_snapshot(uri))
    rewrite = rewrite_files(TableLog.open(uri), **OPTIONS)
    commit_upserts(uri, facts(3, 50, value="meanwhile"), NOW + 10)
    commit_deletes(uri, facts(4), NOW + 11)
    second = compact(uri)
    assert commit_rewrite(uri, rewrite) == second
    expected |= {("e3", "p"): "meanwhile", ("e50", "p"): "meanwhile"}
    del expected["e4", "p"]
    assert contents(read_snapshot(uri)) == expected
    assert find_changes(uri, 4, second).is_empty


def test_an_append_and_a_delete_between_read_and_commit(uri):
    expected = contents(read_snapshot(uri))
    rewrite = rewrite_files(TableLog.open(uri), **OPTIONS)
    commit_upserts(uri, facts(3, 50, value="meanwhile"), NOW + 10)
    commit_deletes(uri, facts(4), NOW + 11)
    version = commit_rewrite(uri, rewrite)
    assert version == 5
    assert len(TableLog.open(uri).files) == 3
    expected |= {("e3", "p"): "meanwhile", ("e50", "p"): "meanwhile"}
    del expected["e4", "p"]
    assert contents(read_snapshot(uri)) == expected
    assert find_changes(uri, 4, 5).is_empty
    compact(uri)
    assert contents(read_snapshot(uri)) == expected


def test_rows_that_two_compactions_doubled_change_nothing(uri):
    """Both pass the check before either commits: deltalake accepts both, and every row is there twice."""
    before, rows = contents(read_snapshot(uri)), all_rows(uri)
    log = TableLog.open(uri)
    for _ in range(2):
        rewrite = rewrite_files(log, **OPTIONS)
        replace_parts(log, rewrite.parts, rewrite.replaced, new_write_id())
    files = TableLog.open(uri).files
    assert [file.num_rows for file in files] == [21, 21]
    assert all_rows(uri) == rows
    assert contents(read_snapshot(uri)) == before
    assert find_changes(uri, 2, 4).is_empty
    compact(uri)
    assert [file.num_rows for file in TableLog.open(uri).files] == [21]
    assert all_rows(uri) == rows


def test_a_compaction_of_files_that_another_has_replaced_commits_nothing(uri):
    rewrite = rewrite_files(TableLog.open(uri), **OPTIONS)
    assert compact(uri) == 3
    assert commit_rewrite(uri, rewrite) == 3
    assert TableLog.open(uri).version == 3


def test_a_compaction_that_took_longer_than_delete_rows_stay_is_refused(uri, monkeypatch):
    rewrite = rewrite_files(TableLog.open(uri), **OPTIONS)
    late = time.time() + 150 * 3_600
    monkeypatch.setattr(compact_module.time, "time", lambda: late)
    with pytest.raises(StorageError, match="took longer than 144 hours"):
        commit_rewrite(uri, rewrite)
    assert TableLog.open(uri).version == 2


def age(uri: str, path: str, hours: float) -> None:
    then = time.time() - hours * 3_600
    os.utime(Path(uri) / path, (then, then))


def test_vacuum_removes_old_versions_and_keeps_the_newest(uri):
    compact(uri)
    before = contents(read_snapshot(uri))
    assert vacuum(uri, 1) == []
    assert TableLog.open(uri).version == 3
    assert len(vacuum(uri, 0, allow_short=True)) == 3
    assert contents(read_snapshot(uri)) == before
    with pytest.raises(StorageError, match="no longer exists"):
        read_snapshot(uri, 0)


def test_vacuum_spares_a_write_that_has_not_committed_whatever_the_retention(uri):
    part = upsert_part(uri, facts(77), NOW + 5, "slow")
    age(uri, part.path, 100)
    assert vacuum(uri, 0, allow_short=True) == []
    commit_parts(uri, INFO, [part], "slow")
    assert ("e77", "p") in contents(read_snapshot(uri))


def test_vacuum_removes_what_a_crashed_write_left_behind(uri):
    part = upsert_part(uri, facts(77), NOW + 5, "crashed")
    age(uri, part.path, 200)
    spool = Path(uri) / "_spool" / "run" / "texts.parquet"
    spool.parent.mkdir(parents=True)
    spool.write_bytes(b"")
    age(uri, "_spool/run/texts.parquet", 200)
    assert vacuum(uri) == [part.path]
    assert not (Path(uri) / part.path).exists()
    assert spool.exists()


@pytest.mark.parametrize(("retention_h", "allow_short"), [(0, False), (-1, True)])
def test_a_retention_that_takes_files_from_readers_at_work_needs_saying_so(uri, retention_h, allow_short):
    with pytest.raises(InputError, match=r"Help: .*allow_short"):
        vacuum(uri, retention_h, allow_short=allow_short)


def test_a_retention_has_an_end(uri):
    with pytest.raises(InputError, match="at most 1000000"):
        vacuum(uri, 10**15)


def test_odd_options_are_refused(uri):
    for options in ({"target_file_bytes": 0}, {"retention_h": -1}):
        with pytest.raises(InputError):
            compact(uri, **options)


@pytest.fixture
def large_and_small(tmp_path: Path) -> str:
    """A large file of 2,000 facts and four small ones; the last one deletes a fact."""
    uri = str(tmp_path / "large")
    commit_upserts(uri, facts(*range(2_000)), NOW)
    for number in range(3):
        commit_upserts(uri, facts(number, value="second"), NOW + 1 + number)
    commit_deletes(uri, facts(5), NOW + 4)
    return uri


def test_a_large_file_with_few_superseded_rows_stays_where_that_shall_be_worth_it(large_and_small):
    uri = large_and_small
    before, large = contents(read_snapshot(uri)), max(TableLog.open(uri).files, key=lambda file: file.size_bytes)
    compact(uri, min_dead=0.5)
    files = TableLog.open(uri).files
    assert sorted(file.num_rows for file in files) == [4, 2_000]
    assert large in files
    assert contents(read_snapshot(uri)) == before
    commit_upserts(uri, facts(*range(10, 1_990), value="second"), NOW + 10)
    before = contents(read_snapshot(uri))
    compact(uri, min_dead=0.4)
    assert [file.num_rows for file in TableLog.open(uri).files] == [2_000]
    assert contents(read_snapshot(uri)) == before


def test_delete_rows_stay_as_long_as_what_they_delete(large_and_small):
    """However old they are: from a file that is left as it is the fact would come back."""
    uri = large_and_small
    before = contents(read_snapshot(uri))
    time.sleep(0.001)
    compact(uri, retention_h=0, min_dead=0.5)
    assert sorted(file.num_rows for file in TableLog.open(uri).files) == [4, 2_000]
    assert contents(read_snapshot(uri)) == before
    compact(uri, retention_h=0)
    assert [file.num_rows for file in TableLog.open(uri).files] == [1_999]
    assert contents(read_snapshot(uri)) == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_left_as_it_is_no_fact_changes(tmp_path, seed):
    draw = random.Random(seed)
    uri = str(tmp_path / "kb")
    commit_upserts(uri, facts(*range(30)), NOW)
    for step in range(1, 12):
        some = facts(*draw.sample(range(40), draw.choice([1, 3, 25])), value=f"v{step}")
        (commit_upserts if draw.random() < 0.6 else commit_deletes)(uri, some, NOW + step)
        before = contents(read_snapshot(uri))
        retention_h, min_dead = draw.choice([0, 168]), draw.choice([0.0, 0.2, 0.5, 0.8])
        compact(uri, retention_h=retention_h, min_dead=min_dead, target_file_bytes=draw.choice([2_000, 20_000, 2**27]))
        assert contents(read_snapshot(uri)) == before


def test_a_file_that_could_not_be_written_whole_does_not_stay(tmp_path, monkeypatch):
    """On a full disk it would keep the room that smaller writes need, until a vacuum a week later."""

    def fail(rows: pa.Table, where: pa.NativeFile | str, **options: object) -> None:
        if isinstance(where, str):
            Path(where).write_bytes(b"PAR1 and some rows")
        else:
            where.write(b"PAR1 and some rows")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(part_module.pq, "write_table", fail)
    with pytest.raises(StorageError, match="No space left"):
        upsert_part(str(tmp_path / "kb"), facts(1), NOW, "w")
    assert list((tmp_path / "kb").iterdir()) == []
    with pytest.raises(StorageError, match="No space left"):
        write_spool(str(tmp_path / "spool"), pa.table({"text_hash": [b"x"]}))
    assert list((tmp_path / "spool").iterdir()) == []


def test_files_of_a_compaction_that_failed_do_not_stay(uri, monkeypatch):
    write, written = part_module.write_part, []

    def write_two(*given: object) -> PartFile:
        if len(written) == 2:
            raise StorageError("No space left on device", where=uri, help="make some")
        written.append(write(*given))
        return written[-1]

    monkeypatch.setattr(part_module, "write_part", write_two)
    before = {file.name for file in Path(uri).iterdir()}
    with pytest.raises(StorageError, match="No space"):
        compact(uri, target_file_bytes=300)
    assert len(written) == 2
    assert {file.name for file in Path(uri).iterdir()} == before


def test_files_without_a_row_go(tmp_path):
    """As another program may write them."""
    place = tmp_path / "kb" / "empty.parquet"
    place.parent.mkdir()
    part_module.pq.write_table(part_module.SCHEMA.empty_table(), place)
    stats = '{"numRecords": 0, "minValues": {}, "maxValues": {}, "nullCount": {}}'
    uri = str(place.parent)
    commit_parts(uri, INFO, [PartFile(place.name, place.stat().st_size, 0, stats, NOW, NOW // 1_000)], "w")
    assert compact(uri) == 1
    assert TableLog.open(uri).files == []
