"""Files that cannot be had: one of them holds up no other, and a store that is away is told from a file that is."""

from __future__ import annotations

import pytest
from refresh_samples import contents, once, put, watcher

from kblam_ray.errors import StorageError
from kblam_ray.table.refresh import backlog, reading


@pytest.fixture
def locked(monkeypatch) -> set[str]:
    """Parts of names of files that can be seen and not read, as an object in an archive."""
    names: set[str] = set()
    real = reading.read_facts

    def read_facts(file):
        if any(name in file.uri for name in names):
            raise StorageError("cannot read or write: Permission denied", where=file.uri, help="wait")
        return real(file)

    monkeypatch.setattr(reading, "read_facts", read_facts)
    return names


def test_a_file_that_is_never_given_stops_nothing_when_its_retry_comes_up_alone(tmp_path, locked):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    locked.add("bad")
    bad = put(folder / "bad.jsonl", ("b", "p", "1"))
    put(folder / "a.jsonl", ("a", "p", "1"))
    refresher = watcher(kb, folder)
    refresher._pass()
    assert contents(kb) == {("a", "p"): "1"}
    for wait_s in (4.0, 8.0):
        refresher._watch._refusals[str(bad)].retry_at = 0.0
        refresher._pass()  # raised, and the watch waited up to half a minute, for every file
        assert refresher._watch._refusals[str(bad)].wait_s == wait_s
    assert refresher._report.failures == 1
    locked.clear()
    refresher._watch._refusals[str(bad)].retry_at = 0.0
    refresher._pass()
    assert contents(kb) == {("a", "p"): "1", ("b", "p"): "1"}
    assert not refresher._report.refused


def test_a_store_that_gives_nothing_fails_the_pass_once_and_then_each_file(tmp_path, locked):
    locked.add(".jsonl")
    for name in "ab":
        put(tmp_path / "in" / f"{name}.jsonl", (name, "p", "1"))
    refresher = watcher(tmp_path / "kb", tmp_path / "in")
    with pytest.raises(StorageError, match="Permission denied"):
        refresher._pass()
    assert not refresher._report.refused
    refresher._pass()
    assert len(refresher._report.refused) == 2
    with pytest.raises(StorageError, match="Permission denied"):
        once(tmp_path / "kb", tmp_path / "in")


def test_one_file_that_is_never_given_does_not_hold_a_backlog_up(tmp_path, monkeypatch):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    for name in "abc":
        put(folder / f"{name}.jsonl", (name, "p", "1"))
    asked = []

    def embed(settings, files, increment):
        asked.append([file.uri for file in files])
        for file in files:
            if "b.jsonl" in file.uri:
                raise StorageError("cannot read or write: in an archive", where=file.uri, help="wait")
        counts = {"added": 2, "changed": 0, "deleted": 0, "texts_embedded": 4, "rows_rejected": 0}
        return {"version": 0, "committed": True, "rejected_path": None, **counts}

    monkeypatch.setattr(backlog, "embed", embed)
    refresher = watcher(kb, folder, small_texts=0)
    pending, _ = refresher._pass()
    assert len(pending.files) == 3
    assert [len(files) for files in asked] == [3, 2]
    assert list(refresher._report.refused) == [str(folder / "b.jsonl")]


def test_a_backlog_of_a_table_that_cannot_be_written_fails_as_a_whole(tmp_path, monkeypatch):
    def embed(*_):
        raise StorageError("cannot read or write: no space", where=str(tmp_path / "kb"), help="make space")

    put(tmp_path / "in" / "a.jsonl", ("a", "p", "1"))
    monkeypatch.setattr(backlog, "embed", embed)
    with pytest.raises(StorageError, match="no space"):
        watcher(tmp_path / "kb", tmp_path / "in", small_texts=0)._pass()
