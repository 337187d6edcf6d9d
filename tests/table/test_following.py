"""Following a table: what is new is found, what is not is not read, and another table is never taken for this one."""

from __future__ import annotations

import shutil
from pathlib import Path

import boto3
import pytest
from fake_encoder import FakeEncoder
from rows import contents

from kblam_ray import KnowledgeBase
from kblam_ray.errors import DataFileGoneError, InputError, StorageError, TableError, TableNotFoundError
from kblam_ray.table import following
from kblam_ray.table.following import TableFollower
from kblam_ray.table.log import TableLog
from kblam_ray.table.snapshot import read_snapshot


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "kb")


@pytest.fixture(params=["local", "s3"])
def any_uri(request, tmp_path) -> str:
    return str(tmp_path / "kb") if request.param == "local" else f"{request.getfixturevalue('s3_uri')}/team a/kb"


def make(uri: str, num_versions: int = 1, value: str = "v") -> KnowledgeBase:
    kb = KnowledgeBase.create(uri, FakeEncoder())
    for version in range(num_versions):
        kb.upsert([("e", f"p{version}", f"{value}{version}")])
    return kb


def remove(uri: str) -> None:
    if not uri.startswith("s3://"):
        shutil.rmtree(uri)
        return
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=f"{prefix}/").delete()


def count_opens(monkeypatch) -> list[str]:
    opened: list[str] = []
    open_log = TableLog.open

    def counted(uri: str, version: int | None = None) -> TableLog:
        opened.append(uri)
        return open_log(uri, version)

    monkeypatch.setattr(following.TableLog, "open", counted)
    return opened


def test_each_new_version_is_found_and_the_log_is_opened_only_once(any_uri, monkeypatch):
    kb = make(any_uri)
    opened = count_opens(monkeypatch)
    follower = TableFollower(any_uri)
    first = follower.look()
    assert first.version == 0
    num_opened = len(opened)
    assert follower.look() is first
    kb.upsert([("e", "p0", "w"), ("e", "p1", "w")])
    kb.delete([("e", "p1")])
    del opened[:]
    found = follower.look()
    assert (found.version, follower.log, follower.history) == (2, found, 0)
    assert contents(read_snapshot(found)) == {("e", "p0"): "w"}
    assert opened == []
    assert num_opened == 2
    # What was seen before stays what it was.
    assert (first.version, contents(read_snapshot(first))) == (0, {("e", "p0"): "v0"})
    assert first.table_id == found.table_id == kb.table_id


def test_changes_between_followed_versions_open_no_log(uri, monkeypatch):
    kb = make(uri, 3)
    follower = TableFollower(uri)
    old = follower.look()
    kb.upsert([("e", "p1", "new")])
    kb.delete([("e", "p0")])
    new = follower.look()
    opened = count_opens(monkeypatch)
    at = KnowledgeBase.at(new, [old])
    changes = at.changes(old.version, new.version)
    assert opened == []
    assert contents(changes.upserts) == {("e", "p1"): "new"}
    assert len(changes.deleted_ids) == 1
    assert contents(at.snapshot()) == {("e", "p1"): "new", ("e", "p2"): "v2"}
    assert (at.version, at.pinned, at.table_id) == (4, True, kb.table_id)
    with pytest.raises(TableError, match="pinned"):
        at.upsert([("e", "p", "v")])
    back = KnowledgeBase.at(old, [new]).changes(new.version, old.version)
    assert contents(back.upserts) == {("e", "p0"): "v0", ("e", "p1"): "v1"}
    assert opened == []


@pytest.mark.parametrize("num_versions", [1, 2, 4])
def test_a_table_made_anew_is_another_history(any_uri, num_versions):
    """With fewer versions than were seen, as many, and more."""
    make(any_uri, 2)
    follower = TableFollower(any_uri)
    before = follower.look()
    remove(any_uri)
    make(any_uri, num_versions, "other ")
    found = follower.look()
    assert (found.version, follower.history) == (num_versions - 1, 1)
    assert contents(read_snapshot(found))["e", "p0"] == "other 0"
    assert found.table_id != before.table_id
    assert follower.look() is found


def test_a_table_exchanged_while_new_commits_are_read(uri, tmp_path, monkeypatch):
    """The new table stands there with more versions just when the commits after the old one's are asked for."""
    make(uri, 1)
    follower = TableFollower(uri)
    follower.look()
    make(str(tmp_path / "other"), 3, "other ")
    exchanged = []
    stamp = following._stamp

    def exchange_before_the_next_version_is_seen(table: str, version: int):
        if version == 1 and not exchanged:
            exchanged.append(True)
            shutil.rmtree(uri)
            shutil.move(tmp_path / "other", uri)
        return stamp(table, version)

    monkeypatch.setattr(following, "_stamp", exchange_before_the_next_version_is_seen)
    found = follower.look()
    assert (found.version, follower.history) == (2, 1)
    assert contents(read_snapshot(found)) == {("e", f"p{n}"): f"other {n}" for n in range(3)}


def test_a_table_set_back_from_a_backup_is_another_history(uri, tmp_path):
    kb = make(uri, 2)
    shutil.copytree(uri, tmp_path / "backup")
    kb.upsert([("e", "p1", "lost")])
    follower = TableFollower(uri)
    assert follower.look().version == 2
    shutil.rmtree(uri)
    shutil.move(tmp_path / "backup", uri)
    assert (follower.look().version, follower.history) == (1, 1)
    restored = KnowledgeBase.open(uri, encoder=FakeEncoder())
    restored.upsert([("e", "p1", "kept")])
    assert (follower.look().version, follower.history) == (2, 1)
    assert contents(read_snapshot(follower.look()))["e", "p1"] == "kept"


def test_a_log_that_forgets_old_commits_is_the_same_history(uri):
    kb = make(uri, 3)
    follower = TableFollower(uri)
    seen = follower.look()
    kb.upsert([("e", "p3", "v3")])
    TableLog.open(uri).delta.create_checkpoint()
    for version in range(3):
        (Path(uri) / "_delta_log" / f"{version:020d}.json").unlink()
    found = follower.look()
    assert (found.version, len(found.files), follower.history) == (3, len(seen.files) + 1, 0)
    kb.upsert([("e", "p4", "v4")])
    assert (follower.look().version, follower.history) == (4, 0)
    shutil.rmtree(uri)
    with pytest.raises(TableNotFoundError):
        follower.look()


def test_compaction_and_vacuum_are_versions_like_others(uri):
    kb = make(uri, 3)
    follower = TableFollower(uri)
    before = follower.look()
    kb.compact()
    compacted = follower.look()
    assert (compacted.version, follower.history) == (3, 0)
    assert contents(read_snapshot(compacted)) == contents(read_snapshot(before))
    kb.vacuum(0, allow_short=True)
    assert follower.look().version > 3
    with pytest.raises(DataFileGoneError):
        read_snapshot(before).facts  # noqa: B018


def test_no_table_yet_gone_and_back(uri):
    follower = TableFollower(uri)
    with pytest.raises(TableNotFoundError):
        follower.look()
    kb = make(uri, 2)
    seen = follower.look()
    shutil.move(uri, f"{uri} elsewhere")
    with pytest.raises(TableNotFoundError):
        follower.look()
    assert follower.log is seen
    shutil.move(f"{uri} elsewhere", uri)
    assert follower.look() is seen
    kb.upsert([("e", "p", "v")])
    assert (follower.look().version, follower.history) == (2, 0)


def test_a_damaged_commit_is_an_error_and_passes(uri):
    kb = make(uri, 2)
    follower = TableFollower(uri)
    follower.look()
    kb.upsert([("e", "p", "v")])
    commit = Path(uri) / "_delta_log" / f"{2:020d}.json"
    text = commit.read_text()
    commit.write_text("{damaged")
    with pytest.raises(TableError, match="cannot be read"):
        follower.look()
    commit.write_text(text)
    assert (follower.look().version, follower.history) == (2, 0)


@pytest.mark.timeout(120)
def test_a_store_that_is_down_is_an_error_and_passes(s3_uri):
    kb = make(f"{s3_uri}/kb")
    follower = TableFollower(kb.uri)
    seen = follower.look()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError):
            follower.look()
    assert follower.look() is seen
    kb.upsert([("e", "p", "v")])
    assert follower.look().version == 1


def test_a_location_that_cannot_be():
    with pytest.raises(InputError):
        TableFollower("ftp://host/kb")
