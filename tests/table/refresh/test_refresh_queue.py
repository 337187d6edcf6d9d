"""Receiving from a queue that is longer than its messages stay out of sight, as S3's may be after a large upload."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from kblam_ray.table.refresh.sqs import EventQueue

BODY = json.dumps(
    {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "eventName": "ObjectCreated:Put",
                "s3": {"bucket": {"name": "bucket"}, "object": {"key": "a.jsonl", "eTag": "0", "size": 1}},
            }
        ]
    }
)


class LongQueue:
    """Hands out any ten of the messages that are in sight; one comes into sight again after some calls."""

    def __init__(self, size: int, out_of_sight: int, seed: int) -> None:
        self._random, self._out_of_sight = random.Random(seed), out_of_sight
        self._until = dict.fromkeys(map(str, range(size)), 0)
        self.num_calls = 0
        self.received: set[str] = set()

    def receive_message(self, **_: Any) -> dict[str, Any]:
        self.num_calls += 1
        assert self.num_calls < 5_000, "it never ends"
        in_sight = [name for name, until in self._until.items() if until < self.num_calls]
        names = self._random.sample(in_sight, min(10, len(in_sight)))
        self._until.update(dict.fromkeys(names, self.num_calls + self._out_of_sight))
        self.received.update(names)
        said = {"ReceiptHandle": "r", "Body": BODY, "Attributes": {"SentTimestamp": "1000"}}
        return {"Messages": [{"MessageId": name, **said} for name in names]}


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_again_is_not_taken_for_the_end_of_a_long_queue(seed, monkeypatch):
    queue = LongQueue(size=1_500, out_of_sight=30, seed=seed)
    events = EventQueue("https://sqs.eu-west-1.amazonaws.com/1/queue", lambda _: True)
    monkeypatch.setattr(events, "_client", lambda: queue)
    found = {message.id for message in events.receive_all()}
    assert found == queue.received
    assert len(found) > 0.9 * 1_500
