"""S3's events from a queue, and listings of a bucket, against a server that speaks both protocols."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from refresh_samples import Job, contents, holds, lines, once, settings, wait_until, watcher

from kblam_ray.errors import BadRowError, StorageError
from kblam_ray.table.refresh import s3, sqs
from kblam_ray.table.refresh.events import ObjectEvent, UnreadableMessageError, events_in
from kblam_ray.table.refresh.run import Refresher
from kblam_ray.table.refresh.sources import Pattern, Sources


def record(key: str, *, name: str = "ObjectCreated:Put", etag: str | None = "e", bucket: str = "b") -> dict[str, Any]:
    said = {"key": key, "size": 3, **({"eTag": etag} if etag else {})}
    return {
        "eventSource": "aws:s3",
        "eventName": name,
        "eventTime": "2026-01-02T03:04:05.678Z",
        "s3": {"bucket": {"name": bucket}, "object": said},
    }


AT_US = 1_767_323_045_678_000


def test_the_three_shapes_of_an_event():
    plain = json.dumps({"Records": [record("a+b/%C3%BC%2Bx.jsonl")]})
    expected = [ObjectEvent("s3://b/a b/ü+x.jsonl", AT_US, "e", False)]
    assert events_in(plain) == expected
    assert events_in(json.dumps({"Type": "Notification", "TopicArn": "arn", "Message": plain})) == expected
    bridge = {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "time": "2026-01-02T03:04:05Z",
        "detail": {"bucket": {"name": "b"}, "object": {"key": "a b/ü+x.jsonl", "etag": "e"}},
    }
    assert events_in(json.dumps(bridge)) == [ObjectEvent("s3://b/a b/ü+x.jsonl", AT_US - 678_000, "e", False)]
    assert events_in(json.dumps({**bridge, "detail-type": "Object Tags Added"})) == []


def test_removals_tests_and_events_of_no_interest():
    removed = events_in(json.dumps({"Records": [record("a", name="ObjectRemoved:Delete", etag=None)]}))
    assert removed == [ObjectEvent("s3://b/a", AT_US, None, True)]
    assert events_in(json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"})) == []
    assert events_in(json.dumps({"Records": [record("a", name="ObjectTagging:Put")]})) == []


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"Records": 7}',
        '{"Records": [{}]}',
        '{"Records": [{"eventName": "ObjectCreated:Put"}]}',
        '{"TopicArn": "x", "Message": "no JSON"}',
        '{"source": "aws.s3", "detail": {}}',
        '{"source": "aws.ec2"}',
    ],
)
def test_messages_that_cannot_be_read(body):
    with pytest.raises(UnreadableMessageError):
        events_in(body)


def test_what_an_input_means():
    prefix = Pattern("s3://b/in/")
    assert prefix.means("s3://b/in/x/y.jsonl.gz")
    assert not any(
        prefix.means(f"s3://b/{key}")
        for key in ("in.jsonl", "input/x.jsonl", "in/x.txt", "in/_tmp/x.csv", "in/.x.csv", "in/x/", "in//x.csv")
    )
    glob = Pattern("s3://b/in/*/part-[0-9].csv")
    assert glob.means("s3://b/in/x/part-1.csv")
    assert not glob.means("s3://b/in/x/y/part-1.csv")
    assert Pattern("s3://b/in/**/*.csv").means("s3://b/in/x/y/z.csv")
    assert Pattern("s3://b").means("s3://b/x.csv")
    assert Pattern("s3://b/one.csv").means("s3://b/one.csv")
    sources = Sources(["s3://b/"], "s3://b/kb", 0)
    assert not sources.means("s3://b/kb.refresh/status.json")
    assert not sources.means("s3://b/kb/part-1.parquet")


class Bucket:
    """A bucket that tells a queue of its changes, as S3 does where it is set up to."""

    def __init__(self, uri: str) -> None:
        self.name = uri.removeprefix("s3://")
        self.s3, self.sqs = boto3.client("s3"), boto3.client("sqs")
        self.queue: str = self.sqs.create_queue(QueueName=f"q-{uuid.uuid4().hex[:12]}")["QueueUrl"]

    def put(self, key: str, *rows: tuple[str, str, str], body: str | None = None, tell: bool = True) -> None:
        etag = self.s3.put_object(Bucket=self.name, Key=key, Body=(body or lines(rows)).encode())["ETag"]
        if tell:
            self.tell(record(key.replace(" ", "+"), etag=etag.strip('"'), bucket=self.name))

    def tell(self, *records: dict[str, Any]) -> None:
        self.send(json.dumps({"Records": records}))

    def send(self, body: str) -> None:
        self.sqs.send_message(QueueUrl=self.queue, MessageBody=body)

    def num_messages(self) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=self.queue, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)


@pytest.fixture
def bucket(s3_uri: str) -> Iterator[Bucket]:
    s3._CLIENTS.clear()
    yield Bucket(s3_uri)
    s3._CLIENTS.clear()


@pytest.fixture
def started() -> Iterator[Callable[[Refresher], Refresher]]:
    """Starts a watch in a thread of this process, and ends it with the test."""
    running: list[tuple[Refresher, threading.Thread]] = []

    def start(refresher: Refresher) -> Refresher:
        thread = threading.Thread(target=refresher.run)
        thread.start()
        running.append((refresher, thread))
        return refresher

    yield start
    for refresher, thread in running:
        refresher.stopping = True
        thread.join(60)
        assert not thread.is_alive()


def test_a_prefix_is_listed_and_read_by_etag(bucket, tmp_path):
    kb = f"s3://{bucket.name}/kb"
    bucket.put("in/a b.jsonl", ("a", "p", "1"), tell=False)
    bucket.put("in/ü.csv", body="entity,property,value\nb,p,1\n", tell=False)
    bucket.put("input.jsonl", ("c", "p", "1"), tell=False)
    assert once(kb, f"s3://{bucket.name}/in/")["added"] == 2
    # The same second, the same size.
    bucket.put("in/a b.jsonl", ("a", "p", "2"), tell=False)
    summary = once(kb, f"s3://{bucket.name}/in/")
    assert (summary["changed"], summary["files_read"]) == (1, 1)
    assert contents(kb) == {("a", "p"): "2", ("b", "p"): "1"}
    keys = {item["Key"] for item in bucket.s3.list_objects_v2(Bucket=bucket.name, Prefix="kb.refresh/")["Contents"]}
    assert keys == {"kb.refresh/ledger.json", "kb.refresh/status.json"}


def test_a_key_with_two_slashes_is_said_and_passed_over(bucket, tmp_path, capfd):
    bucket.put("in/a.jsonl", ("a", "p", "1"), tell=False)
    for key in ("in/x//b.jsonl", "in//c.jsonl", "in/_x//d.jsonl", "in//e.txt", "in.jsonl"):
        bucket.put(key, ("b", "p", "1"), tell=False)
    assert once(tmp_path / "kb", f"s3://{bucket.name}/in/")["num_facts"] == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "empty part between slashes" in line]
    assert sorted(line.rpartition("/in/")[2] for line in said) == ["/c.jsonl'", "x//b.jsonl'"]


def test_other_tables_below_a_prefix_are_no_sources(bucket, tmp_path):
    base = f"s3://{bucket.name}/data"
    bucket.put("data/a.jsonl", ("a", "p", "1"), tell=False)
    bucket.put("data/later.refresh/status.json", body="{}", tell=False)
    once(f"{base}/kb1", base)
    bucket.put("data/kb1.rejected/x.jsonl", body="{}", tell=False)
    sources = Sources([base], f"{base}/kb2", 0)
    part = next(
        item["Key"]
        for item in bucket.s3.list_objects_v2(Bucket=bucket.name, Prefix="data/kb1/")["Contents"]
        if item["Key"].endswith(".parquet") and "_delta_log" not in item["Key"]
    )
    assert list(sources.list()) == [f"{base}/a.jsonl"]
    assert sources.passed_over == {f"{base}/kb1": "a table of its own"}
    # An event of the other table's is of no interest either.
    bucket.tell(record(part, bucket=bucket.name))
    assert once(f"{base}/kb2", base, sqs_queue_url=bucket.queue)["files_read"] == 1
    assert bucket.num_messages() == 0


def test_events_are_taken_up_and_then_deleted(bucket, tmp_path, started):
    kb = tmp_path / "kb"
    source = f"s3://{bucket.name}/in/"
    bucket.put("in/0.jsonl", ("a", "p", "0"))
    bucket.send(json.dumps({"Event": "s3:TestEvent"}))
    bucket.put("elsewhere/1.jsonl", ("b", "p", "1"))
    started(watcher(kb, source, sqs_queue_url=bucket.queue, list_every_s=3_600))
    wait_until(lambda: holds(kb, {("a", "p"): "0"}))
    bucket.put("in/a b.jsonl", ("c", "p", "1"))
    wait_until(lambda: holds(kb, {("a", "p"): "0", ("c", "p"): "1"}))
    # An event that comes late, and one that comes twice, and one of an object that is gone.
    bucket.tell(record("in/0.jsonl", etag="older", bucket=bucket.name))
    bucket.tell(record("in/a+b.jsonl", bucket=bucket.name))
    bucket.tell(record("in/gone.jsonl", bucket=bucket.name))
    wait_until(lambda: bucket.num_messages() == 0)
    assert contents(kb) == {("a", "p"): "0", ("c", "p"): "1"}


def test_messages_that_help_nobody_are_left_to_the_queue(bucket, tmp_path, capfd):
    kb, source = tmp_path / "kb", f"s3://{bucket.name}/in/"
    bucket.send("no JSON")
    bucket.put("in/bad.jsonl", body='{"entity": "x", "prop')
    bucket.put("in/good.jsonl", ("a", "p", "1"))
    with pytest.raises(BadRowError, match=r"bad\.jsonl"):
        once(kb, source, sqs_queue_url=bucket.queue)
    assert "left in the queue: it is not JSON" in capfd.readouterr().err
    assert bucket.num_messages() == 2
    assert contents(kb) == {("a", "p"): "1"}


def test_a_message_is_kept_until_its_commit(bucket, tmp_path, monkeypatch):
    kb, source = tmp_path / "kb", f"s3://{bucket.name}/in/"
    bucket.put("in/a.jsonl", ("a", "p", "1"))
    from kblam_ray.table.refresh import taking

    with monkeypatch.context() as patch:
        patch.setattr(taking, "commit", lambda *_: (_ for _ in ()).throw(StorageError("away", help="wait")))
        with pytest.raises(StorageError, match="away"):
            once(kb, source, sqs_queue_url=bucket.queue)
    assert bucket.num_messages() == 1
    once(kb, source, sqs_queue_url=bucket.queue)
    assert contents(kb) == {("a", "p"): "1"}


def test_what_is_held_is_held_longer_while_a_refresh_takes_long(bucket, tmp_path, monkeypatch):
    from kblam_ray.table.refresh import sqs

    refresher = watcher(tmp_path / "kb", f"s3://{bucket.name}/in/", sqs_queue_url=bucket.queue)
    monkeypatch.setattr(sqs, "MIN_VISIBILITY_S", 3)
    monkeypatch.setattr(sqs, "_EXTEND_EVERY_S", 0.2)
    monkeypatch.setattr(sqs, "WAIT_S", 0)
    bucket.put("in/a.jsonl", ("a", "p", "1"))
    events = refresher._events
    events.start()
    try:
        wait_until(lambda: events.has_received)
        (message,) = events.take()
        time.sleep(4)  # longer than the queue would wait without being asked
        assert not events.has_received
        assert [event.uri for event in message.events] == [f"s3://{bucket.name}/in/a.jsonl"]
        events.done([message])
        assert bucket.num_messages() == 0
    finally:
        events.stop()


def test_what_is_sent_all_the_time_is_not_all_waited_for(bucket, tmp_path, monkeypatch):
    refresher = watcher(tmp_path / "kb", f"s3://{bucket.name}/in/", sqs_queue_url=bucket.queue)
    for number in range(12):
        bucket.put(f"in/{number}.jsonl", ("a", "p", "1"))
    real, calls = refresher._events._receive, []

    def receive(wait_s: int) -> dict[str, float]:
        calls.append(wait_s)
        assert len(calls) < 20, "it never ends"
        bucket.put(f"in/later {len(calls)}.jsonl", ("b", "p", "1"))
        return real(wait_s)

    monkeypatch.setattr(refresher._events, "_receive", receive)
    found = {event.uri for message in refresher._events.receive_all() for event in message.events}
    assert {f"s3://{bucket.name}/in/{number}.jsonl" for number in range(12)} <= found


def test_what_comes_again_before_the_queue_is_through_is_not_waited_for(bucket, tmp_path, monkeypatch):
    """As from a queue so long that the time in which its first messages are out of sight is over before the end."""
    monkeypatch.setattr(sqs, "MIN_VISIBILITY_S", 0)
    refresher = watcher(tmp_path / "kb", f"s3://{bucket.name}/in/", sqs_queue_url=bucket.queue)
    for number in range(3):
        bucket.put(f"in/{number}.jsonl", ("a", "p", "1"))
    bucket.send("no event")
    real, calls = refresher._events._receive, []

    def receive(wait_s: int) -> dict[str, float]:
        calls.append(wait_s)
        assert len(calls) < 20, "it never ends"
        return real(wait_s)

    monkeypatch.setattr(refresher._events, "_receive", receive)
    found = {event.uri for message in refresher._events.receive_all() for event in message.events}
    assert found == {f"s3://{bucket.name}/in/{number}.jsonl" for number in range(3)}


def test_an_object_that_is_forbidden_holds_up_no_other_event(bucket, tmp_path, monkeypatch, capfd):
    kb, source = tmp_path / "kb", f"s3://{bucket.name}/in/"
    real = s3.look_at

    def look_at(uri: str):
        if "locked" in uri:
            raise StorageError("the service does not answer or refuses: 403 Forbidden", where=uri, help="ask")
        return real(uri)

    refresher = watcher(kb, source, sqs_queue_url=bucket.queue, list_every_s=3_600)
    refresher._pass()
    with monkeypatch.context() as patch:
        patch.setattr(s3, "look_at", look_at)
        for name in ("in/locked1.jsonl", "in/a.jsonl", "in/locked2.jsonl"):
            bucket.put(name, (name, "p", "1"))
        for _ in range(2):
            refresher._watch.look(receive=True)
            refresher._pass()
        assert contents(kb) == {("in/a.jsonl", "p"): "1"}
        assert bucket.num_messages() == 2
        assert sorted(refresher._report.refused) == [f"{source}locked1.jsonl", f"{source}locked2.jsonl"]
        assert capfd.readouterr().err.count("kept out: ") == refresher._report.failures == 2
        # Nothing can be seen any more: that is the store, and not the objects.
        for number in range(4):
            bucket.put(f"in/locked again {number}.jsonl", ("b", "p", "1"))
        with pytest.raises(StorageError, match="403"):
            refresher._watch.look(receive=True)
    for known in refresher._watch._unseen.values():
        known.retry_at = 0.0
    refresher._pass()
    assert len(contents(kb)) == 4
    assert not refresher._report.refused
    assert bucket.num_messages() == 0


def test_the_message_of_an_object_that_stays_forbidden_goes_back(bucket, tmp_path, monkeypatch):
    refresher = watcher(tmp_path / "kb", f"s3://{bucket.name}/in/", sqs_queue_url=bucket.queue, list_every_s=3_600)
    refresher._pass()
    monkeypatch.setattr(s3, "look_at", lambda uri: (_ for _ in ()).throw(StorageError("no", where=uri, help="ask")))
    bucket.put("in/a.jsonl", ("a", "p", "1"))
    refresher._watch.look(receive=True)
    for _ in range(5):
        assert refresher._events._held
        refresher._watch._unseen[f"s3://{bucket.name}/in/a.jsonl"].retry_at = 0.0
        refresher._watch.look()
    assert not refresher._events._held


def test_an_event_of_a_key_that_is_not_utf8_is_said_once_and_settled(bucket, tmp_path, capfd):
    kb, source = tmp_path / "kb", f"s3://{bucket.name}/in/"
    bucket.put("in/a.jsonl", ("a", "p", "1"))
    detail = {"bucket": {"name": bucket.name}, "object": {"key": "in/\ud800.jsonl"}}
    for _ in range(2):
        bucket.send(json.dumps({"source": "aws.s3", "detail-type": "Object Created", "detail": detail}))
    assert once(kb, source, sqs_queue_url=bucket.queue)["added"] == 1
    assert bucket.num_messages() == 0
    assert capfd.readouterr().err.count("not UTF-8") == 1
    # Nor does an error that quotes such a name keep the status from being written.
    refresher = watcher(kb, source)
    refresher._report.fail(StorageError("no", where="in/\ud800.jsonl", help="wait"), 1.0)
    status = json.loads((tmp_path / "kb.refresh" / "status.json").read_bytes())
    assert "\ud800" in status["trouble"]


def test_a_sync_by_events_takes_removals_up(bucket, tmp_path, started):
    kb, source = tmp_path / "kb", f"s3://{bucket.name}/in/"
    bucket.put("in/a.jsonl", ("a", "p", "1"))
    bucket.put("in/b.jsonl", ("b", "p", "1"))
    started(watcher(kb, source, mode="sync", sqs_queue_url=bucket.queue, list_every_s=3_600))
    wait_until(lambda: holds(kb, {("a", "p"): "1", ("b", "p"): "1"}))
    bucket.s3.delete_object(Bucket=bucket.name, Key="in/b.jsonl")
    bucket.tell(record("in/b.jsonl", name="ObjectRemoved:Delete", etag=None, bucket=bucket.name))
    wait_until(lambda: holds(kb, {("a", "p"): "1"}))
    wait_until(lambda: bucket.num_messages() == 0)


def test_a_store_that_goes_away_and_comes_back(bucket, tmp_path, started, monkeypatch):
    kb, source = tmp_path / "kb", f"s3://{bucket.name}/in/"
    bucket.put("in/a.jsonl", ("a", "p", "1"), tell=False)
    real, failed = s3.list_objects, threading.Event()
    refresher = started(watcher(kb, source))
    wait_until(lambda: holds(kb, {("a", "p"): "1"}))

    def away(base: str):
        failed.set()
        raise StorageError("the service does not answer", where=base, help="wait")
        yield

    monkeypatch.setattr(s3, "list_objects", away)
    wait_until(failed.is_set)
    bucket.put("in/b.jsonl", ("b", "p", "1"), tell=False)
    wait_until(lambda: refresher._report.failures > 0)
    monkeypatch.setattr(s3, "list_objects", real)
    wait_until(lambda: holds(kb, {("a", "p"): "1", ("b", "p"): "1"}))


def test_metrics_and_status_say_how_far_behind(tmp_path, started):
    import urllib.request

    from refresh_samples import put

    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    (folder / "bad.jsonl").write_text("{")
    refresher = started(watcher(kb, folder, metrics_port=0))
    wait_until(lambda: (tmp_path / "kb.refresh" / "status.json").exists())
    wait_until(lambda: refresher._report.refreshes == 1 and refresher._report.refused)

    def metrics() -> str:
        url = f"http://127.0.0.1:{refresher._report.metrics.port}/metrics"
        return urllib.request.urlopen(url, timeout=30).read().decode()

    for line in (
        f'kblam_refresh_refused_files{{kb="{kb}"}} 1.0',
        f'kblam_refresh_refreshes_total{{kb="{kb}"}} 1.0',
        f'kblam_refresh_lag_seconds_count{{kb="{kb}"}} 1.0',
        f'kblam_refresh_facts_total{{kb="{kb}",what="added"}} 1.0',
        f'kblam_refresh_failures_total{{code="bad_row",kb="{kb}"}} 1.0',
        f'kblam_refresh_kb_version{{kb="{kb}"}} 0.0',
    ):
        wait_until(lambda line=line: line in metrics())
    status = json.loads((tmp_path / "kb.refresh" / "status.json").read_text())
    assert status["version"] == 0
    assert status["lag_s"]["max"] >= 0
    assert set(settings(kb, folder).model_dump()) >= {"metrics_port"}


def test_the_job_under_its_own_name(bucket):
    kb = f"s3://{bucket.name}/kb"
    bucket.put("in/a.jsonl", ("a", "p", "1"))
    summary = Job(kb, f"s3://{bucket.name}/in/", sqs_queue_url=bucket.queue, max_refreshes=1).finished()
    assert (summary["job"], summary["ok"], summary["num_facts"]) == ("refresh_kb", True, 1)
    assert "lag" in summary["stderr"]
