"""The same table through the S3 protocol: commits are conditional puts, a dead endpoint is an error within seconds."""

from __future__ import annotations

import multiprocessing
import socket
import time

import boto3
import deltalake
import pytest
from fake_encoder import FakeEncoder
from rows import INFO, contents, upsert_part

from kblam_ray import KnowledgeBase, storage
from kblam_ray.errors import InputError, StorageError, TableNotFoundError
from kblam_ray.facts.fact import Fact
from kblam_ray.table.log import TableLog, commit_parts
from kblam_ray.table.opening import check_location

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def uri(s3_uri: str) -> str:
    return f"{s3_uri}/team a/kb"


def objects(uri: str) -> list[str]:
    bucket = uri.removeprefix("s3://").split("/")[0]
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])
    return sorted(item["Key"] for item in listed)


def test_the_whole_life_of_a_knowledge_base(uri):
    kb = KnowledgeBase.create(uri, FakeEncoder())
    assert objects(uri) == []
    assert kb.upsert([("France", "capital", "Lyon"), ("Spain", "capital", "Madrid")]) == 0
    assert kb.upsert([("France", "capital", "Paris")]) == 1
    assert kb.delete([("Spain", "capital")]) == 2
    assert contents(kb.snapshot()) == {("France", "capital"): "Paris"}
    assert contents(kb.snapshot(0)) == {("France", "capital"): "Lyon", ("Spain", "capital"): "Madrid"}
    found = kb.changes(0, 2)
    assert contents(found.upserts) == {("France", "capital"): "Paris"}
    assert len(found.deleted_ids) == 1
    assert kb.compact() == 3
    assert len(kb.vacuum(0, allow_short=True)) == 3
    assert contents(KnowledgeBase.open(uri).snapshot()) == {("France", "capital"): "Paris"}
    with pytest.raises(StorageError, match="no longer exists"):
        kb.snapshot(0)
    assert all(key.startswith("team a/kb/") for key in objects(uri))


def append(uri: str, writer: int, num_commits: int, start, versions) -> None:
    kb = KnowledgeBase.create(uri, FakeEncoder())
    start.wait()
    for number in range(num_commits):
        versions.put(kb.upsert([(f"writer {writer}", f"p{number}", "v")]))


def test_two_processes_write_at_the_same_time(uri):
    """Both read version n and put version n + 1: without a conditional put one commit would replace the other."""
    start, versions = SPAWN.Barrier(2), SPAWN.Queue()
    writers = [SPAWN.Process(target=append, args=(uri, writer, 4, start, versions)) for writer in range(2)]
    for writer in writers:
        writer.start()
    reported = [versions.get(timeout=120) for _ in range(8)]
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(reported) == list(range(8))
    expected = {(f"writer {writer}", f"p{number}"): "v" for writer in range(2) for number in range(4)}
    assert contents(KnowledgeBase.open(uri).snapshot()) == expected


def test_commits_ask_for_a_conditional_put(uri):
    options = storage.delta_storage_options(uri)
    assert options is not None
    assert options["aws_conditional_put"] == "etag"


def test_no_table_and_no_bucket(uri):
    with pytest.raises(TableNotFoundError, match="there is no table"):
        KnowledgeBase.open(uri)
    with pytest.raises(StorageError, match="cannot read or write") as caught:
        KnowledgeBase.open("s3://no-such-bucket-here/kb")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.fixture
def endpoint_down(monkeypatch) -> None:
    """The endpoint's port is closed from here on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


@pytest.mark.timeout(120)
def test_an_endpoint_that_is_down(uri, endpoint_down):
    with pytest.raises(StorageError, match=r"cannot read or write.*AWS_ENDPOINT_URL"):
        KnowledgeBase.open(uri)
    with pytest.raises(StorageError, match=r"cannot read or write.*AWS_ENDPOINT_URL"):
        KnowledgeBase.create(uri, FakeEncoder())


@pytest.mark.timeout(120)
def test_an_endpoint_that_goes_down_before_the_commit_leaves_the_table(uri):
    kb = KnowledgeBase.create(uri, FakeEncoder())
    kb.upsert([("a", "b", "1")])
    part = upsert_part(uri, [Fact("a", "b", "2")], time.time_ns() // 1_000, "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError):
            commit_parts(uri, INFO, [part], "w")
        with pytest.raises(StorageError):
            upsert_part(uri, [Fact("a", "b", "3")], time.time_ns() // 1_000, "w2")
    assert TableLog.open(uri).version == 0
    assert contents(kb.snapshot()) == {("a", "b"): "1"}
    assert commit_parts(uri, INFO, [part], "w") == 1


def test_a_store_that_was_away_for_a_moment_lacks_no_version(uri, monkeypatch):
    kb = KnowledgeBase.create(uri, FakeEncoder())
    kb.upsert([("a", "b", "1")])
    real = deltalake.DeltaTable

    def away_for_a_version(*given, version=None, **others):
        if version is not None:
            raise OSError("Kernel error -> Generic S3 error\n  tcp connect error\n  Connection refused (os error 111)")
        return real(*given, **others)

    monkeypatch.setattr(deltalake, "DeltaTable", away_for_a_version)
    with pytest.raises(StorageError, match="cannot read or write: Kernel error -> Generic S3 error tcp connect error"):
        TableLog.open(uri, 0)
    with pytest.raises(TableNotFoundError, match="no version 1 "):
        TableLog.open(uri, 1)


@pytest.mark.parametrize("name", ["a#b", "a?b", "100%", "a//b", "a/../b", "./a"])
def test_keys_that_deltalake_would_misread_are_refused(name):
    with pytest.raises(InputError, match=r"cannot stand in a table's location|an empty, '\.' or '\.\.' folder"):
        check_location(f"s3://bucket/{name}")
