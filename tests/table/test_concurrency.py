"""Many processes write at the same time: every write becomes exactly one version, no row is lost or doubled."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from fake_encoder import FakeEncoder
from rows import contents

from kblam_ray import KnowledgeBase
from kblam_ray.errors import EncoderMismatchError
from kblam_ray.table.commits import read_commits
from kblam_ray.table.live import find_winners
from kblam_ray.table.log import TableLog

SPAWN = multiprocessing.get_context("spawn")


def append(uri: str, writer: int, num_commits: int, start, versions) -> None:
    """Commit own facts one by one; all writers update one shared fact too. The first to commit creates the table."""
    kb = KnowledgeBase.create(uri, FakeEncoder())
    start.wait()  # `create` refuses an existing table: every handle is made before the first commit
    for number in range(num_commits):
        facts = [(f"writer {writer}", f"p{number}", "v"), ("shared", "p", f"{writer} {number}")]
        versions.put((writer, number, kb.upsert(facts)))


def compact_repeatedly(uri: str, start, stop) -> None:
    start.wait()
    is_last = False
    while not is_last:
        is_last = stop.is_set()  # so that there is one, however slow it is beside the writers
        log = TableLog.open_if_exists(uri)
        if log is not None and len(log.files) > 3:
            KnowledgeBase.open(uri).compact()


def finished(processes: list) -> None:
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.mark.parametrize(
    ("num_writers", "num_commits"),
    [(4, 10), pytest.param(16, 25, marks=[pytest.mark.slow, pytest.mark.timeout(1_200)])],
)
def test_every_append_is_one_version(tmp_path: Path, num_writers: int, num_commits: int):
    uri = str(tmp_path / "kb")
    start, versions = SPAWN.Barrier(num_writers), SPAWN.Queue()
    writers = [
        SPAWN.Process(target=append, args=(uri, writer, num_commits, start, versions)) for writer in range(num_writers)
    ]
    for writer in writers:
        writer.start()
    reported = [versions.get(timeout=240) for _ in range(num_writers * num_commits)]
    finished(writers)

    total = num_writers * num_commits
    assert sorted(version for *_, version in reported) == list(range(total))
    log = TableLog.open(uri)
    assert log.version == total - 1
    assert all(len(commit.added) == len(commit.write_ids) == 1 for commit in read_commits(uri, range(total)) or [])
    assert find_winners(log).rows_of_file.tolist() == [2] * total
    found = contents(KnowledgeBase.open(uri).snapshot())
    assert found.pop(("shared", "p")) in {f"{writer} {number}" for writer, number, _ in reported}
    assert found == {(f"writer {writer}", f"p{number}"): "v" for writer, number, _ in reported}


def test_compactions_in_the_middle_of_appends(tmp_path: Path):
    uri = str(tmp_path / "kb")
    start, stop, versions = SPAWN.Barrier(4), SPAWN.Event(), SPAWN.Queue()
    writers = [SPAWN.Process(target=append, args=(uri, writer, 8, start, versions)) for writer in range(2)]
    compactors = [SPAWN.Process(target=compact_repeatedly, args=(uri, start, stop)) for _ in range(2)]
    for process in [*writers, *compactors]:
        process.start()
    reported = [versions.get(timeout=240) for _ in range(16)]
    stop.set()
    finished([*writers, *compactors])

    kb = KnowledgeBase.open(uri)
    assert kb.version >= 16  # 16 appends, and at least one compaction
    expected = {(f"writer {writer}", f"p{number}"): "v" for writer, number, _ in reported}
    assert {name: value for name, value in contents(kb.snapshot()).items() if name[0] != "shared"} == expected
    for writer, number, version in reported:
        assert (f"writer {writer}", f"p{number}") in contents(kb.snapshot(version))
    kb.compact()
    assert find_winners(uri).rows_of_file.tolist() == [17]


NUM_RACES = 15


def create_with(folder: str, revision: str, start, outcomes) -> None:
    won = []
    for race in range(NUM_RACES):
        kb = KnowledgeBase.create(f"{folder}/{race}", FakeEncoder(revision))
        start.wait()
        try:
            kb.upsert([(revision, "p", "v")])
            won.append(True)
        except EncoderMismatchError:
            won.append(False)
    outcomes.put((revision, won))


def test_of_creators_with_different_encoders_one_makes_the_table_and_the_others_are_refused(tmp_path: Path):
    revisions = ["r1", "r2", "r3"]
    start, outcomes = SPAWN.Barrier(len(revisions)), SPAWN.Queue()
    creators = [SPAWN.Process(target=create_with, args=(str(tmp_path), name, start, outcomes)) for name in revisions]
    for creator in creators:
        creator.start()
    won = dict(outcomes.get(timeout=120) for _ in creators)
    finished(creators)
    for race in range(NUM_RACES):
        winners = [revision for revision in revisions if won[revision][race]]
        kb = KnowledgeBase.open(str(tmp_path / str(race)))
        assert (kb.version, [kb.encoder.revision]) == (0, winners)
        assert kb.snapshot().facts["entity"].to_pylist() == winners
