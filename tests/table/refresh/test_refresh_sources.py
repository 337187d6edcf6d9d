"""Local sources: which files are finished, which are meant, and small files that are replaced whole."""

from __future__ import annotations

import os
import time

import pytest
from refresh_samples import lines, once, put, settings, wait_until, watcher

from kblam_ray import storage
from kblam_ray.errors import InputError
from kblam_ray.table.refresh.sources import Sources


def settled(sources: Sources) -> dict[str, bool]:
    return {os.path.basename(uri): file.is_settled for uri, file in sources.list().items()}


def test_a_file_that_may_still_be_written_waits_and_one_that_was_moved_does_not(tmp_path):
    sources = Sources([str(tmp_path)], "/nowhere/kb", settle_s=3_600)
    (tmp_path / "written.jsonl").write_text(lines([("a", "p", "1")]))
    (tmp_path / "old.jsonl").write_text(lines([("a", "p", "1")]))
    os.utime(tmp_path / "old.jsonl", (1_000, 1_000))
    moved = put(tmp_path / "moved.jsonl", ("a", "p", "1"))
    wait_until(lambda: os.rename(moved, moved) is None and moved.stat().st_ctime_ns >= moved.stat().st_mtime_ns)
    os.utime(moved, ns=(moved.stat().st_ctime_ns - 1_000_000,) * 2)  # as after a rename on a finer clock
    assert settled(sources) == {"written.jsonl": False, "old.jsonl": True, "moved.jsonl": True}


def test_a_file_from_a_clock_that_is_ahead_settles_by_ours(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([("a", "p", "1")]))
    ahead = time.time() + 9_000
    os.utime(path, (ahead, ahead))
    sources = Sources([str(tmp_path)], "/nowhere/kb", settle_s=10)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert settled(sources) == {"a.jsonl": False}
    monkeypatch.setattr(time, "monotonic", lambda: now + 9)
    assert settled(sources) == {"a.jsonl": False}
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    assert settled(sources) == {"a.jsonl": True}


def test_once_waits_for_a_file_that_was_just_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines([("a", "p", "1")]))
    assert once(tmp_path / "kb", tmp_path / "in", settle_s=0.3)["added"] == 1


def test_links_are_followed_and_loops_are_not(tmp_path):
    put(tmp_path / "real" / "a.jsonl", ("a", "p", "1"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.jsonl").symlink_to(tmp_path / "nothing")
    sources = Sources([str(tmp_path / "in")], "/nowhere/kb", 0)
    assert [os.path.relpath(uri, tmp_path / "in") for uri in sources.list()] == ["linked/a.jsonl"]


def test_globs_and_single_files(tmp_path):
    for name in ("a.jsonl", "b.csv", "x/c.jsonl", "[1].jsonl"):
        put(tmp_path / name, ("a", "p", "1"))

    def listed(*inputs: str) -> list[str]:
        sources = Sources([str(tmp_path / given) for given in inputs], "/nowhere/kb", 0)
        return sorted(os.path.relpath(uri, tmp_path) for uri in sources.list())

    assert listed("*.jsonl") == ["[1].jsonl", "a.jsonl"]
    assert listed("**/c.jsonl", "b.csv") == ["b.csv", "x/c.jsonl"]
    assert listed("[1].jsonl") == ["[1].jsonl"]
    assert listed("nothing/*.csv", "nothing") == []
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="unsupported kind"):
        listed("notes.txt")


def test_a_folder_that_is_not_there_deletes_nothing(tmp_path):
    put(tmp_path / "one" / "a.jsonl", ("a", "p", "1"))
    put(tmp_path / "two" / "b.jsonl", ("b", "p", "1"))
    kb, inputs = tmp_path / "kb", (tmp_path / "one", tmp_path / "two")
    assert once(kb, *inputs, mode="sync")["num_facts"] == 2
    os.rename(tmp_path / "two", tmp_path / "unmounted")
    put(tmp_path / "one" / "a.jsonl", ("a", "p", "2"))
    summary = once(kb, *inputs, mode="sync")
    assert (summary["changed"], summary["deleted"]) == (1, 0)
    os.rename(tmp_path / "unmounted", tmp_path / "two")
    (tmp_path / "two" / "b.jsonl").unlink()
    assert once(kb, *inputs, mode="sync")["deleted"] == 1


def test_a_file_that_the_store_does_not_give_is_tried_again(tmp_path):
    refresher = watcher(tmp_path / "kb", tmp_path / "in", settle_s=0)
    path = put(tmp_path / "in" / "a.jsonl", ("a", "p", "1"))
    put(tmp_path / "in" / "b.jsonl", ("b", "p", "1"))
    (file,) = [file for uri, file in refresher._sources.list().items() if uri == str(path)]
    from kblam_ray.errors import StorageError

    refresher._watch.look()
    assert list(refresher._watch.refuse({file: StorageError("no", help="wait")})) == [file]
    assert refresher._watch.is_refused(file)
    refresher._watch._refusals[file.uri].retry_at = time.monotonic()
    assert not refresher._watch.is_refused(file)
    # Said once: it is no news that it fails again.
    assert not refresher._watch.refuse({file: StorageError("no", help="wait")})
    assert refresher._watch._refusals[file.uri].wait_s == 4.0
    assert settings(tmp_path / "kb", tmp_path).once is False


def test_small_files_are_replaced_whole(tmp_path, s3_uri):
    for uri in (str(tmp_path / "deep" / "x.json"), f"{s3_uri}/deep/x.json"):
        assert storage.read_file(uri) is None
        storage.replace_file(uri, b"1")
        storage.replace_file(uri, b"22")
        assert storage.read_file(uri) == b"22"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_what_belongs_to_a_table_lies_beside_it():
    assert storage.beside("/data/kb", "refresh", "x") == "/data/kb.refresh/x"
    assert storage.beside("s3://b/kb", "refresh", "x") == "s3://b/kb.refresh/x"
    assert storage.beside("s3://b", "refresh", "x") == "s3://b/_refresh/x"
