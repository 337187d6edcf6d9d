"""What outlives a run: that a file was looked at and had nothing to take up, and the rows that were left out."""

from __future__ import annotations

import json
import os

import pytest
from refresh_samples import contents, lines, once, put, watcher

from kblam_ray import KnowledgeBase
from kblam_ray.errors import StorageError
from kblam_ray.table.commits import read_commits
from kblam_ray.table.refresh import taking
from kblam_ray.table.refresh.ledger import METADATA_KEY


@pytest.fixture
def kb(tmp_path):
    return tmp_path / "kb"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "in"


def touched(kb, folder) -> str:
    """A file that was taken up, then touched, then looked at by another run, which committed nothing."""
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    once(kb, folder)
    os.utime(path, (5_000, 5_000))
    assert once(kb, folder)["files_read"] == 1
    return str(path)


def test_a_touched_file_is_read_by_one_run_and_by_no_later_one(kb, folder):
    touched(kb, folder)
    KnowledgeBase.open(str(kb)).upsert([("a", "p", "by hand")])
    summary = once(kb, folder)
    assert (summary["files_read"], summary["version"]) == (0, 1)
    assert contents(kb) == {("a", "p"): "by hand"}


def test_a_renamed_file_makes_one_sync_and_no_more(kb, folder):
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    put(folder / "b.jsonl", ("b", "p", "1"))
    once(kb, folder, mode="sync")
    path.rename(folder / "c.jsonl")
    assert [once(kb, folder, mode="sync")["files_read"] for _ in range(3)] == [2, 0, 0]


def test_the_next_commit_says_what_an_earlier_run_looked_at(kb, folder):
    path = touched(kb, folder)
    put(folder / "b.jsonl", ("b", "p", "1"))
    once(kb, folder)
    (commit,) = read_commits(str(kb), [1]) or []
    assert [entry[0] for entry in commit.info[METADATA_KEY]["looked"]] == [path]
    # So a run without the copy knows it too, and nothing is said twice.
    (kb.parent / "kb.refresh" / "ledger.json").unlink()
    KnowledgeBase.open(str(kb)).upsert([("a", "p", "by hand")])
    assert once(kb, folder)["files_read"] == 0
    assert json.loads((kb.parent / "kb.refresh" / "ledger.json").read_text())["unsaid"] == []


def test_what_was_looked_at_in_a_table_says_nothing_of_the_one_in_its_place(kb, folder, tmp_path):
    touched(kb, folder)
    os.rename(kb, tmp_path / "old")
    KnowledgeBase.create(str(kb), "hashing:16").upsert([("x", "p", "1")])
    assert once(kb, folder)["files_read"] == 1
    assert contents(kb) == {("x", "p"): "1", ("a", "p"): "1"}
    put(folder / "b.jsonl", ("b", "p", "1"))
    refresher = watcher(kb, folder)
    refresher._history.look()
    refresher._history.observe({"old": "tag"}, 0)
    os.rename(kb, tmp_path / "older")
    KnowledgeBase.create(str(kb), "hashing:16").upsert([("y", "p", "1")])
    refresher._pass()
    (commit,) = read_commits(str(kb), [1]) or []
    assert commit.info[METADATA_KEY]["looked"] == []


def test_a_copy_of_an_earlier_release_is_read(kb, folder):
    touched(kb, folder)
    copy = kb.parent / "kb.refresh" / "ledger.json"
    data = json.loads(copy.read_text())
    del data["unsaid"]
    copy.write_text(json.dumps(data))
    assert once(kb, folder)["files_read"] == 0


def away(*_, **__):
    raise StorageError("away", help="wait")


@pytest.mark.parametrize("step", ["write_rejected", "commit"])
def test_rows_that_are_left_out_are_kept_before_their_file_counts_as_taken_up(kb, folder, monkeypatch, step):
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines([("a", "p", "1")]) + '{"entity": "b"}\n')
    with monkeypatch.context() as patch:
        patch.setattr(taking, step, away)
        for _ in range(2):
            with pytest.raises(StorageError, match="away"):
                once(kb, folder, on_error="skip")
    summary = once(kb, folder, on_error="skip")
    (rejected,) = (kb.parent / "kb.rejected").iterdir()
    assert json.loads(rejected.read_text())["line"] == 2
    assert (summary["rows_rejected"], summary["rejected_path"]) == (1, str(rejected))
    status = json.loads((kb.parent / "kb.refresh" / "status.json").read_text())
    assert (status["rows_rejected"], status["rejected_path"]) == (1, str(rejected))
    again = once(kb, folder, on_error="skip")
    assert (again["rows_rejected"], again["rejected_path"]) == (0, None)


def test_rows_of_a_file_without_any_fact_are_kept_too(kb, folder):
    put(folder / "a.jsonl", ("a", "p", "1"))
    once(kb, folder)
    (folder / "b.jsonl").write_text('{"entity": "b"}\n')
    summary = once(kb, folder, on_error="skip")
    assert (summary["refreshes"], summary["files_read"], summary["rows_rejected"]) == (0, 1, 1)
