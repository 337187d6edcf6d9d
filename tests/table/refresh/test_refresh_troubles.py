"""What does not work is said once and stands in the status and the metrics for as long as it does not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refresh_samples import once, put, wait_until, watcher

from kblam_ray.errors import BadRowError, InputError, StorageError
from kblam_ray.table.refresh import sqs, taking
from kblam_ray.table.refresh.metrics import RefreshMetrics


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "kb.refresh" / "status.json").read_text())


def test_a_queue_that_fails_is_said_once_and_counted(tmp_path, monkeypatch, capfd):
    url = "https://sqs.us-east-1.amazonaws.com/1/q"
    refresher = watcher(tmp_path / "kb", tmp_path / "in", "s3://b/in/", sqs_queue_url=url)
    refresher._report.metrics = RefreshMetrics("kb", "127.0.0.1", 0)
    counted: list[int] = []
    monkeypatch.setattr(refresher._report.metrics, "failed", lambda code, num: counted.append(num))
    events, reason = refresher._events, ["there is no such queue"]

    def receive(wait_s: int) -> list[float]:
        events._stopping.wait(0.01)
        for text in reason:  # looked at once: it is taken away by another thread
            raise StorageError(text, where=url, help="check it")
        return []

    monkeypatch.setattr(events, "_receive", receive)
    monkeypatch.setattr(sqs, "_MAX_BACKOFF_S", 0.02)
    events.start()
    try:
        wait_until(lambda: events.failures >= 3)
        refresher._note_queue()
        assert "no such queue" in status(tmp_path)["trouble"]
        assert status(tmp_path)["failures"] == sum(counted) >= 3
        reason[0] = "the right to receive is missing"
        wait_until(lambda: "right to receive" in str(events.trouble))
        refresher._note_queue()
        reason.clear()
        wait_until(lambda: events.trouble is None)
        refresher._note_queue()
        assert status(tmp_path)["trouble"] is None
    finally:
        events.stop()
        refresher._report.metrics.close()
    said = capfd.readouterr().err
    assert [said.count(text) for text in ("no such queue", "right to receive", "works again")] == [1, 1, 1]


def test_a_sync_that_is_held_stands_in_the_status_until_it_is_over(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    (folder / "empty.json").write_text("[]")
    refresher = watcher(kb, folder, mode="sync")
    refresher._pass()
    (folder / "a.jsonl").unlink()
    for _ in range(3):
        refresher._pass()
    held = status(tmp_path)
    assert "a sync would delete the whole table" in held["trouble"]
    assert held["failures"] == 1
    put(folder / "a.jsonl", ("a", "p", "2"))
    refresher._pass()
    assert status(tmp_path)["trouble"] is None
    assert refresher._report.refreshes == 2


def test_the_error_that_ends_a_run_stands_in_the_status(tmp_path, monkeypatch):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(taking, "commit", lambda *_: (_ for _ in ()).throw(StorageError("away", help="wait")))
        with pytest.raises(StorageError):
            once(kb, folder)
    last = status(tmp_path)
    assert (last["state"], last["trouble"], last["failures"]) == ("stopped", "away. Help: wait", 1)
    once(kb, folder)
    assert status(tmp_path)["trouble"] is None
    path.write_text("{")
    with pytest.raises(BadRowError):
        once(kb, folder)
    last = status(tmp_path)
    assert "all else is taken up" in last["trouble"]
    assert last["failures"] == 1
    put(path, ("a", "p", "2"))
    with pytest.raises(InputError):
        watcher(kb, folder, encoder="hashing:32").run()
    assert "hashing:32" in status(tmp_path)["trouble"]
