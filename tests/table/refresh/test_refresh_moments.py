"""Content that is put in the place of other content, or put again, is news, whatever its size and time say."""

from __future__ import annotations

import os
import shutil
import time

import boto3
import pytest
from refresh_samples import contents, lines, once, put, watcher

from kblam_ray import KnowledgeBase
from kblam_ray.table.refresh import s3
from kblam_ray.table.refresh import sources as sources_module
from kblam_ray.table.refresh.ledger import Ledger, Taken, Verdict, covers
from kblam_ray.table.refresh.sources import SourceFile


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_file_that_is_replaced_by_one_of_its_size_and_time(tmp_path, how):
    kb, path, other = tmp_path / "kb", tmp_path / "in" / "a.jsonl", tmp_path / "other" / "a.jsonl"
    for place, value in ((path, "1"), (other, "2")):
        put(place, ("a", "p", value))
        os.utime(place, (9e8, 9e8))
    once(kb, path.parent)
    (os.replace if how == "moved" else shutil.copy2)(other, path)
    assert path.stat().st_mtime_ns == 900_000_000_000_000_000
    assert once(kb, path.parent)["changed"] == 1
    assert contents(kb) == {("a", "p"): "2"}


def test_a_file_whose_rights_change_is_read_once_and_changes_nothing(tmp_path):
    kb, path = tmp_path / "kb", put(tmp_path / "in" / "a.jsonl", ("a", "p", "1"))
    once(kb, path.parent)
    path.chmod(0o600)
    assert [once(kb, path.parent)["files_read"] for _ in range(3)] == [1, 0, 0]
    assert KnowledgeBase.open(str(kb)).version == 0


def test_a_table_of_an_earlier_release_is_not_read_anew(tmp_path, monkeypatch):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(sources_module, "with_moment", lambda state, _: state)
        once(kb, folder)
    KnowledgeBase.open(str(kb)).upsert([("a", "p", "by hand")])
    assert once(kb, folder)["files_read"] == 0
    put(path, ("a", "p", "2"))
    assert once(kb, folder)["changed"] == 1


def test_machines_that_see_different_moments_come_to_rest(tmp_path, monkeypatch):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    real = sources_module.with_moment

    def run(lead_ns: int) -> int:
        monkeypatch.setattr(sources_module, "with_moment", lambda state, moment: real(state, moment + lead_ns))
        return once(kb, folder)["files_read"]

    for number in range(5):
        put(folder / f"{number}.jsonl", (f"e{number}", "p", "1"))
    assert [run(0), run(10**12), run(0), run(10**12)] == [5, 5, 0, 0]
    for number in range(5, 8):
        # A commit in between makes what was looked at known to all.
        put(folder / f"{number}.jsonl", (f"e{number}", "p", "1"))
        assert [run(0), run(10**12), run(0), run(10**12)] == [1, 1, 0, 0]


def test_machines_that_see_different_moments_settle_what_crossed():
    """Each takes what is in dispute up under its own tag; neither waits for the other for ever."""
    early, late = Ledger(), Ledger()
    log = [Taken(-1, -1, {"f": "s@100", "g": "g"}, updated_at=1)]
    log += [Taken(-1, 0, {"g": "h"}, updated_at=2), Taken(-1, 0, {"f": "s@200"}, updated_at=3)]

    def fold() -> None:
        for ledger in (early, late):
            for version in range(ledger.version + 1, len(log)):
                ledger.fold(version, log[version].metadata())

    fold()
    assert early.verdict("f", "s@100") is late.verdict("f", "s@200") is Verdict.DISPUTED
    looks = 0
    for _ in range(5):
        for ledger, tag in ((early, "s@100"), (late, "s@200")):
            if ledger.verdict("f", tag) is not Verdict.DONE:
                looks += 1
                log.append(Taken(-1, len(log) - 1, {"f": tag}, updated_at=3 + looks))
                fold()
    assert looks == 2
    assert early.verdict("f", "s@100") is late.verdict("f", "s@200") is Verdict.DONE


def test_which_state_covers_which():
    assert covers("a-1@5", "a-1@5")
    assert covers("a-1@6", "a-1@5")
    assert not covers("a-1@5", "a-1@6")
    assert covers("a-1", "a-1@6")
    assert not covers("a-1@6", "a-1")
    assert not covers("b-1@6", "a-1@5")
    assert not covers("", "a-1@5")
    assert not covers("x@y-1", "x@z-1")
    assert covers("x@y-1", "x@y-1@3")


def test_an_object_that_is_put_again_was_modified_last(s3_uri, tmp_path, monkeypatch):
    s3._CLIENTS.clear()
    store, bucket, kb = boto3.client("s3"), s3_uri.removeprefix("s3://"), tmp_path / "kb"
    real, at = s3.list_objects, {"a": 100.9, "b": 200.0}

    def timed(uri: str, etag: str, size: int, _: float) -> tuple[str, str, int, float]:
        return uri, etag, size, at[uri[-7]]

    monkeypatch.setattr(s3, "list_objects", lambda base: (timed(*found) for found in real(base)))
    for name in at:
        store.put_object(Bucket=bucket, Key=f"in/{name}.jsonl", Body=lines([("x", "p", name)]).encode())
    # The time that a look at one object tells is another one here: what counts for a read is the content.
    assert once(kb, f"{s3_uri}/in/")["files_read"] == 2
    assert contents(kb) == {("x", "p"): "b"}
    assert once(kb, f"{s3_uri}/in/")["files_read"] == 0
    at["a"] = 300.2
    assert once(kb, f"{s3_uri}/in/")["files_read"] == 1
    assert contents(kb) == {("x", "p"): "a"}
    at["a"] = 300.7
    assert once(kb, f"{s3_uri}/in/")["files_read"] == 0
    s3._CLIENTS.clear()


def test_content_is_told_by_the_etag_and_on_a_disk_by_the_whole_tag():
    remote = SourceFile("s3://b/a.jsonl", "e-1@5", 5, 1)
    assert remote.is_still(SourceFile("s3://b/a.jsonl", "e-1@6", 6, 1))
    assert not remote.is_still(SourceFile("s3://b/a.jsonl", "f-1@5", 5, 1))
    assert not remote.is_still(None)
    assert not SourceFile("/b/a.jsonl", "1-1@5", 5, 1).is_still(SourceFile("/b/a.jsonl", "1-1@6", 5, 1))


def test_lag_counts_from_when_a_file_came_and_order_from_when_it_was_modified(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "b.jsonl", ("a", "p", "newer"))
    old = put(tmp_path / "elsewhere" / "a.jsonl", ("a", "p", "old"))
    os.utime(old, (time.time() - 3_600,) * 2)
    old.rename(folder / "a.jsonl")
    refresher = watcher(kb, folder)
    refresher._watch.look()
    pending = refresher._watch.pending(Ledger())
    assert [file.uri[-7:] for file in pending.files] == ["a.jsonl", "b.jsonl"]
    assert once(kb, folder)["lag_s"]["max"] < 600
    assert contents(kb) == {("a", "p"): "newer"}
    # What waits has waited from then on too.
    assert max(time.time() - file.since_us / 1e6 for file in pending.files) < 600
