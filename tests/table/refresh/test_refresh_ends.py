"""When `--once` ends: beside whoever writes new files, while a file is finished, and when one never is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from refresh_samples import contents, lines, once, put

from kblam_ray.errors import BadRowError, StorageError
from kblam_ray.table.refresh import owed
from kblam_ray.table.refresh.sources import Sources


@pytest.fixture
def at_every_look(monkeypatch):
    """Does something with every listing; ends a test that would never end."""

    def do(action):
        real, looks = Sources.list, []

        def listing(self):
            found = real(self)
            looks.append(len(looks))
            assert len(looks) < 100, "it never ends"
            action(len(looks))
            return found

        monkeypatch.setattr(Sources, "list", listing)
        return looks

    return do


@pytest.mark.parametrize("mode", ["upsert", "sync"])
def test_it_ends_beside_a_steady_producer(tmp_path, at_every_look, mode):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    put(folder / "b.jsonl", ("b", "p", "1"))
    looks = at_every_look(lambda number: put(folder / f"later {number}.jsonl", (f"later {number}", "p", "1")))
    summary = once(kb, folder, mode=mode)
    assert (summary["refreshes"], summary["num_facts"], len(looks)) == (1, 2, 2)
    num_there = len(list(folder.iterdir()))
    assert once(kb, folder, mode=mode)["num_facts"] == num_there
    assert set(contents(kb)) >= {("a", "p"), ("later 1", "p"), ("later 2", "p")}


def test_a_bad_file_beside_a_steady_producer(tmp_path, at_every_look):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    folder.mkdir()
    (folder / "bad.jsonl").write_text("{")
    at_every_look(lambda number: put(folder / f"later {number}.jsonl", (f"later {number}", "p", "1")))
    with pytest.raises(BadRowError):
        once(kb, folder)


def test_a_sync_is_made_once_where_a_file_went(tmp_path, at_every_look):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    gone = put(folder / "b.jsonl", ("b", "p", "1"))
    once(kb, folder, mode="sync")
    gone.unlink()
    at_every_look(lambda number: put(folder / f"later {number}.jsonl", (f"later {number}", "p", "1")))
    assert once(kb, folder, mode="sync")["deleted"] == 1
    assert ("b", "p") not in contents(kb)


def be_under_way(path: Path, number: int = 0) -> None:
    """Of a clock that is ahead: however long the next look takes to come, the file has not stood still at it."""
    ahead = time.time() + 3_600 + number
    os.utime(path, (ahead, ahead))


def test_a_sync_that_files_under_way_kept_from_being_made_is_said(tmp_path, at_every_look, capfd):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    old = put(folder / "a.jsonl", ("a", "p", "1"))
    os.utime(old, (1_000, 1_000))

    def begin(number: int) -> None:
        (folder / f"new {number}.jsonl").write_text(lines([("b", "p", "1")]))
        be_under_way(folder / f"new {number}.jsonl")

    at_every_look(begin)
    begin(0)
    once(kb, folder, mode="sync", settle_s=0.3)
    assert "no facts are taken away in this run" in capfd.readouterr().err


def test_a_finished_file_is_waited_for_however_often_it_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(owed, "MAX_IDLE_PASSES", 3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines([("a", "p", "1")]))
    assert once(tmp_path / "kb", tmp_path / "in", settle_s=1, poll_s=0.05)["added"] == 1


@pytest.mark.parametrize("has_producer", [False, True])
def test_a_file_that_is_never_finished_is_an_error(tmp_path, at_every_look, monkeypatch, has_producer):
    monkeypatch.setattr(owed, "MAX_IDLE_PASSES", 1)
    folder = tmp_path / "in"
    folder.mkdir()
    log = folder / "log.jsonl"
    log.write_text(lines([("a", "p", "1")]))
    be_under_way(log)

    def write(number: int) -> None:
        with Path(log).open("a") as file:
            file.write(lines([(f"b{number}", "p", "1")]))
        be_under_way(log, number)
        if has_producer:
            later = put(folder / f"later {number}.jsonl", (f"later {number}", "p", "1"))
            os.utime(later, (1_000, 1_000))

    at_every_look(write)
    with pytest.raises(StorageError, match="files change all the time"):
        once(tmp_path / "kb", folder, settle_s=1, poll_s=0.05)
