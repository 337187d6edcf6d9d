"""Local folders as they are found: the table among its sources, other tables, pipes, loops, what cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from refresh_samples import contents, lines, once, put, watcher

from kblam_ray.errors import StorageError
from kblam_ray.table.refresh.sources import Sources


def listed(folder: Path, kb: str | Path = "/nowhere/kb") -> list[str]:
    return sorted(os.path.relpath(uri, folder) for uri in Sources([str(folder)], str(kb), 0).list())


@pytest.mark.parametrize("spelling", ["in/../in/kb", "link/kb"])
def test_a_table_among_its_sources_is_none_of_them_however_it_is_spelled(tmp_path, spelling):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    kb = tmp_path / spelling
    path = put(tmp_path / "in" / "a.jsonl", ("a", "p", "1"))
    path.write_text(path.read_text() + '{"entity": "b"}\n')
    once(kb, tmp_path / "in", on_error="skip")
    assert len(list((tmp_path / "in" / "kb.rejected").iterdir())) == 1
    # Its Parquet, its ledger and the rows that it rejected would each be a new source.
    assert listed(tmp_path / "in", kb) == ["a.jsonl"]
    assert once(kb, tmp_path / "in", on_error="skip")["files_read"] == 0


def test_other_tables_in_the_folder_are_no_sources(tmp_path, capfd):
    path = put(tmp_path / "data" / "a.jsonl", ("a", "p", "1"))
    path.write_text(path.read_text() + '{"entity": "b"}\n')
    once(tmp_path / "data" / "kb1", tmp_path / "data", on_error="skip")
    put(tmp_path / "data" / "mine.rejected" / "b.jsonl", ("b", "p", "1"))
    put(tmp_path / "data" / "mine.refresh" / "c.jsonl", ("c", "p", "1"))
    (tmp_path / "data" / "later.refresh").mkdir()
    (tmp_path / "data" / "later.refresh" / "status.json").write_text("{}")
    sources = Sources([str(tmp_path / "data")], str(tmp_path / "data" / "kb2"), 0)
    expected = {"a.jsonl", "mine.rejected/b.jsonl", "mine.refresh/c.jsonl"}
    assert {os.path.relpath(uri, tmp_path / "data") for uri in sources.list()} == expected
    assert sources.passed_over == {str(tmp_path / "data" / "kb1"): "a table of its own"}
    once(tmp_path / "data" / "kb2", tmp_path / "data", on_error="skip")
    assert capfd.readouterr().err.count(f"passed over: a table of its own: '{tmp_path / 'data' / 'kb1'}'") == 1


def test_pipes_and_links_to_themselves_hold_nothing_up(tmp_path, capfd):
    folder = tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    sources = Sources([str(folder)], "/nowhere/kb", 0)
    assert [os.path.basename(uri) for uri in sources.list()] == ["a.jsonl"]
    assert sources.look_at(str(folder / "pipe.jsonl")) is None
    assert sources.look_at(str(folder / "loop.jsonl")) is None
    assert once(tmp_path / "kb", folder)["files_read"] == 1
    assert "passed over: neither a file nor a folder" in capfd.readouterr().err


def test_a_folder_that_became_a_file_while_folders_were_read(tmp_path, monkeypatch):
    put(tmp_path / "a.jsonl", ("a", "p", "1"))
    put(tmp_path / "was" / "b.jsonl", ("b", "p", "1"))
    real = os.scandir

    def scandir(path):
        if str(path).endswith("was"):
            raise NotADirectoryError(20, "Not a directory", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert listed(tmp_path) == ["a.jsonl"]


@pytest.fixture
def locked(monkeypatch) -> set[str]:
    """Names of folders that the system does not let us list; the tests may run as a user who may read all."""
    names: set[str] = set()
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) in names:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return names


def test_a_folder_that_cannot_be_read_is_said_and_holds_up_no_other(tmp_path, locked, capfd):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    put(folder / "locked" / "b.jsonl", ("b", "p", "1"))
    locked.add("locked")
    with pytest.raises(StorageError, match="a folder that cannot be read: Permission denied; all else is taken up"):
        once(kb, folder)
    assert contents(kb) == {("a", "p"): "1"}
    capfd.readouterr()
    refresher = watcher(kb, folder)
    for _ in range(3):
        refresher._pass()
    assert capfd.readouterr().err.count("kept out: a folder that cannot be read") == 1
    status = json.loads((tmp_path / "kb.refresh" / "status.json").read_text())
    assert [refused["file"] for refused in status["refused"]] == [str(folder / "locked")]
    locked.clear()
    refresher._pass()
    assert not refresher._report.refused
    assert contents(kb) == {("a", "p"): "1", ("b", "p"): "1"}


def test_a_sync_takes_nothing_away_that_is_in_a_folder_that_cannot_be_read(tmp_path, locked):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    put(folder / "locked" / "b.jsonl", ("b", "p", "1"))
    once(kb, folder, mode="sync")
    locked.add("locked")
    (folder / "a.jsonl").write_text(lines([("a", "p", "2")]))
    with pytest.raises(StorageError):
        once(kb, folder, mode="sync")
    assert contents(kb) == {("a", "p"): "2", ("b", "p"): "1"}
    locked.clear()
    (folder / "locked" / "b.jsonl").unlink()
    once(kb, folder, mode="sync")
    assert contents(kb) == {("a", "p"): "2"}
