"""The chaos suite: three fixed seeds with every run of the tests, more with `make chaos`; and the model by itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.chaos import autoscale
from tests.chaos.cluster import Cluster, Endpoint
from tests.chaos.model import Model, generations_in, rows_of
from tests.chaos.run import run_seed, workload_of
from tests.chaos.serve import Serve

# The job and the store; a worker; a node and another writer.
ALWAYS = [(4, "refresh"), (8, "embed"), (1, "embed")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(variable, "")  # so that it is put back
        cluster = Cluster()
        yield cluster
        Serve.stop_server()
        cluster.stop()


@pytest.mark.parametrize(("seed", "workload"), ALWAYS)
def test_nothing_is_lost(cluster, seed, workload):
    verdict = run_seed(cluster, seed, workload)
    assert verdict["ok"], verdict
    assert min(verdict["hits"], verdict["acknowledged"], verdict["reads"]) > 0, verdict


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 112))
def test_nothing_is_lost_with_other_seeds(cluster, seed):
    verdict = run_seed(cluster, seed, workload_of(seed))
    assert verdict["ok"], verdict


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_come_for_a_backlog_and_go():
    # Not pytest's folder: Ray's sockets lie below it, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="grow-") as home:
        report = autoscale.run(200_000, 3, Path(home))
    assert report["exact"], report
    assert report["is_watching_when_gone"]
    assert report["nodes"]["most"] > report["nodes"]["before"] == report["nodes"]["after"] == 1
    assert report["nodes_that_worked"] > 1


def test_the_endpoint_is_killed_and_has_what_it_answered_for(tmp_path):
    endpoint = Endpoint(tmp_path / "objects")
    try:
        s3 = endpoint.client()
        s3.create_bucket(Bucket="bucket")
        for name in ("kept é+%", "gone", "gone too", "parts"):
            s3.put_object(Bucket="bucket", Key=name, Body=name.encode())
        s3.delete_object(Bucket="bucket", Key="gone")
        s3.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "gone too"}]})
        upload = {"Bucket": "bucket", "Key": "parts", "UploadId": ""}
        upload["UploadId"] = s3.create_multipart_upload(Bucket="bucket", Key="parts")["UploadId"]
        part = s3.upload_part(**upload, PartNumber=1, Body=b"x" * 6_000_000)["ETag"]
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": [{"ETag": part, "PartNumber": 1}]})
        before = s3.list_objects_v2(Bucket="bucket")["Contents"]
        for _ in range(2):
            endpoint.kill(0)
            with (tmp_path / "objects").open("ab") as journal:
                journal.write((tmp_path / "objects").read_bytes()[:30])  # a record that the next kill has cut off
            assert s3.list_objects_v2(Bucket="bucket")["Contents"] == before
        assert [found["Key"] for found in before] == ["kept é+%", "parts"]
        assert s3.get_object(Bucket="bucket", Key="kept é+%")["Body"].read() == "kept é+%".encode()
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="bucket", Key="parts", Body=b"", IfNoneMatch="*")
        # The way to it was cut: the next commit is done, its answer lost, and who tries again is told of another one.
        endpoint.cut(0)
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="bucket", Key="kb/_delta_log/1.json", Body=b"whose?", IfNoneMatch="*")
        assert s3.get_object(Bucket="bucket", Key="kb/_delta_log/1.json")["Body"].read() == b"whose?"
        # This one was not done.
        s3.put_object(Bucket="bucket", Key="kb/_delta_log/2.json", Body=b"", IfNoneMatch="*")
        endpoint.cut(0)
        s3.put_object(Bucket="bucket", Key="kb/_delta_log/3.json", Body=b"", IfNoneMatch="*")
    finally:
        endpoint.stop()


def test_generations_that_are_swapped_are_other_facts_and_stand_together_only_if_torn():
    one, two = rows_of("swapped-a/3", 1), rows_of("swapped-a/3", 2)
    assert not {row[:2] for row in one} & {row[:2] for row in two}
    assert generations_in(one) == ({"swapped-a/3": 1}, [])
    assert generations_in(two) == ({"swapped-a/3": 2}, [])
    assert "torn" in generations_in([*one, *two])[1][0]
    assert "torn" in generations_in(one[:2])[1][0]


@pytest.fixture
def model() -> Model:
    """Generation 1 was acknowledged in version 3, 2 was begun."""
    model = Model()
    model.issue("a/3", 1)
    model.acknowledge("a/3", 1, 3)
    model.issue("a/3", 2)
    return model


def test_the_model_takes_what_was_acknowledged_and_what_came_after_it(model):
    assert model.check_end(rows_of("a/3", 1)) == model.check_end(rows_of("a/3", 2)) == []
    model.acknowledge("a/3", 2, 5)
    assert model.check_end(rows_of("a/3", 2)) == []
    assert model.check_end(rows_of("a/3", 1)) == ["a/3 shows 1; 2 was acknowledged"]
    assert model.check_read(4, {"a/3": 1}) == model.check_read(2, {}) == []
    assert model.check_read(5, {"a/3": 1})
    assert model.check_read(3, {})


def test_the_model_does_not_take_what_was_in_doubt_before_what_was_acknowledged():
    model = Model()
    model.issue("a/3", 1)
    model.issue("a/3", 2)
    model.acknowledge("a/3", 2, 5)
    assert model.num_in_doubt == 1
    assert model.check_end(rows_of("a/3", 1))
    assert model.check_read(6, {"a/3": 1})
    assert model.check_read(4, {"a/3": 1}) == []


def test_the_model_knows_what_was_taken_away(model):
    model.issue("a/3", 3, absent=True)
    assert model.check_end([]) == model.check_read(4, {}) == []
    model.acknowledge("a/3", 3, 6)
    assert model.check_end([]) == []
    assert model.check_end(rows_of("a/3", 2)) == ["a/3 shows 2; 3 was acknowledged"]
    assert model.check_read(7, {"a/3": 2})
    model.issue("a/3", 4)
    assert model.check_end(rows_of("a/3", 4)) == model.check_end([]) == []


def test_the_model_sees_what_is_torn_lost_doubled_or_strange(model):
    one, two = rows_of("a/3", 1), rows_of("a/3", 2)
    assert model.check_end(one[:2])[0] == "torn: a/3 shows {1: 2}"
    assert "torn" in model.check_end([one[0], *two[1:]])[0]
    assert "a/3#0 appears twice" in model.check_end([*one, one[0]])
    assert model.check_end([]) == ["a/3 shows None; 1 was acknowledged"]
    assert model.check_end([*one, *rows_of("b/1", 1)]) == ["nobody wrote b/1"]
    assert model.check_end(rows_of("a/3", 3))
    assert generations_in([("x", "colour", "red")])[1]
    again = [{"version": 4, "groups": {"a/3": g}, "problems": []} for g in (1, 2)]
    assert model.check_reads(again) == ["version 4 was not the same when it was read again"]
    assert model.check_reads([{"problems": ["torn"]}]) == ["torn"]


def test_the_model_sees_what_goes_back_or_goes_away_though_nothing_was_acknowledged():
    model = Model()
    for generation in (1, 2):
        model.issue("a/3", generation)

    def problems(*shown):
        reads = [{"version": at, "groups": {"a/3": g} if g else {}, "problems": []} for at, g in enumerate(shown)]
        return model.check_reads(reads)

    assert problems(None, 1, 1, 2) == problems(2, 2) == []
    assert problems(2, 1) == ["version 1 shows a/3 in 1 after 2"]
    assert problems(1, None, 1)[0] == "version 1 lacks a/3, which was in 1"
    model.issue("a/3", 3, absent=True)
    assert problems(1, None) == problems(2, None, None) == []
    assert problems(1, None, 2) == ["version 2 shows a/3 in 2 after 3"]
