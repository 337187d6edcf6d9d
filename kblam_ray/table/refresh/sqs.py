"""S3's event notifications from a queue: hints that an object changed, each held until what it says is taken up.

A thread receives by long polling and keeps what was received from being handed out again while it is worked on. A
message is deleted when every object that it names is taken up, or when it names none of ours. One that cannot be
read, or that names a file which is refused, is left to come back, and in the end to the queue's own policy for
messages that nobody can use.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kblam_ray.errors import InputError, StorageError
from kblam_ray.table.refresh import s3
from kblam_ray.table.refresh.events import ObjectEvent, UnreadableMessageError, events_in
from kblam_ray.table.refresh.sources import is_utf8

WAIT_S = 5
"""Of one long poll: what was received is extended, and a stop seen, at least so often."""

MIN_VISIBILITY_S = 120
_EXTEND_EVERY_S = MIN_VISIBILITY_S / 3
_MAX_HELD = 1_000
_MAX_BACKOFF_S = 30.0

_MAX_IN_VAIN = 10
"""Answers with nothing but what came before, or was sent later, until no more of the queue is expected."""

_URL = re.compile(r"https?://[^/]+/.+")
_REGION = re.compile(r"https?://sqs\.([a-z0-9-]+)\.")


@dataclass(frozen=True)
class Message:
    """A message that is held: what it says of objects that are sources."""

    id: str
    receipt: str
    events: tuple[ObjectEvent, ...]


class EventQueue:
    """The messages of one queue; `start`, then `take` and `done` from one thread.

    Args:
        url: the queue's.
        means: whether a URI is one of the sources.

    Attributes:
        failures: how often the queue did not answer or refused since `start`.
        trouble: how it failed last, None where it has answered since.

    Raises:
        InputError: the URL is none.
    """

    def __init__(self, url: str, means: Callable[[str], bool]) -> None:
        if not _URL.fullmatch(url):
            raise InputError(
                "not the URL of a queue", where=url, help="write https://sqs.REGION.amazonaws.com/ACCOUNT/NAME"
            )
        region = _REGION.match(url)
        self.url, self._means, self._region = url, means, region.group(1) if region else None
        self._received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._held: dict[str, Message] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._reported: set[str] = set()
        self._thread: threading.Thread | None = None
        self.failures = 0
        self.trouble: StorageError | None = None

    def start(self) -> None:
        """Receive in the background from now on."""
        self._thread = threading.Thread(target=self._run, name="refresh-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Receive no more; what is held comes back to the queue when its time is over."""
        self._stopping.set()

    def take(self) -> list[Message]:
        """What was received since the last call."""
        found = []
        while not self._received.empty():
            found.append(self._received.get())
        return found

    @property
    def has_received(self) -> bool:
        """Whether `take` would return something."""
        return not self._received.empty()

    def receive_all(self) -> list[Message]:
        """What the queue holds now, without waiting for more, and perhaps some of what is sent meanwhile.

        Raises:
            StorageError: the queue does not answer or refuses.
        """
        begun_ms = time.time() * 1_000
        # Of a long queue the first messages come again before the last have come, in any order: the new ones count.
        seen: set[str] = set()
        num_in_vain = 0
        while num_in_vain < _MAX_IN_VAIN:
            sent_ms = self._receive(wait_s=0)
            if not sent_ms:
                break
            is_news = any(at_ms <= begun_ms for id_, at_ms in sent_ms.items() if id_ not in seen)
            num_in_vain = 0 if is_news else num_in_vain + 1
            seen.update(sent_ms)
        return self.take()

    def done(self, messages: Iterable[Message]) -> None:
        """Delete messages whose objects are all taken up.

        Raises:
            StorageError: the queue does not answer; they come back, and change nothing then.
        """
        messages = list(messages)
        for start in range(0, len(messages), 10):
            batch = messages[start : start + 10]
            entries = [{"Id": str(i), "ReceiptHandle": message.receipt} for i, message in enumerate(batch)]
            with s3.client_errors(self.url):
                self._client().delete_message_batch(QueueUrl=self.url, Entries=entries)
            self.forget(batch)

    def forget(self, messages: Iterable[Message]) -> None:
        """Hold messages no longer: they come back."""
        with self._lock:
            for message in messages:
                self._held.pop(message.id, None)

    def _client(self) -> Any:
        return s3.client("sqs", self._region)

    def _run(self) -> None:
        backoff_s, extended_at = 1.0, time.monotonic()
        while not self._stopping.is_set():
            try:
                if time.monotonic() - extended_at > _EXTEND_EVERY_S:
                    self._extend()
                    extended_at = time.monotonic()
                with self._lock:
                    is_full = len(self._held) >= _MAX_HELD
                if is_full:
                    self._stopping.wait(1.0)
                else:
                    self._receive(WAIT_S)
                    if self.trouble is not None:
                        self.trouble = None
                        print("refresh: the queue works again", file=sys.stderr, flush=True)
                backoff_s = 1.0
            except StorageError as error:
                if str(error) != str(self.trouble):
                    print(f"refresh: {error} (trying again, and so on)", file=sys.stderr, flush=True)
                self.trouble = error
                self.failures += 1
                self._stopping.wait(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _receive(self, wait_s: int) -> dict[str, float]:
        """Take in the next messages; by id when they were sent, milliseconds since 1970, 0 where that is not said."""
        with s3.client_errors(self.url):
            answer = self._client().receive_message(
                QueueUrl=self.url,
                AttributeNames=["SentTimestamp"],
                MaxNumberOfMessages=10,
                WaitTimeSeconds=wait_s,
                VisibilityTimeout=MIN_VISIBILITY_S,
            )
        received = answer.get("Messages", [])
        of_others: list[Message] = []
        for item in received:
            message_id, receipt = item["MessageId"], item["ReceiptHandle"]
            try:
                events = events_in(item.get("Body", ""))
            except UnreadableMessageError as error:
                if message_id not in self._reported:
                    self._reported.add(message_id)
                    print(f"refresh: message {message_id} is left in the queue: {error}", file=sys.stderr, flush=True)
                continue
            for uri in {event.uri for event in events if not is_utf8(event.uri)} - self._reported:
                # No object has such a key, so there is nothing that the message could be held or come back for.
                self._reported.add(uri)
                print(
                    f"refresh: passed over: an event of a key that is not UTF-8: {uri!r}", file=sys.stderr, flush=True
                )
            ours = tuple(event for event in events if is_utf8(event.uri) and self._means(event.uri))
            message = Message(message_id, receipt, ours)
            if not ours:
                of_others.append(message)
                continue
            with self._lock:
                self._held[message_id] = message
            self._received.put(message)
        self.done(of_others)
        return {item["MessageId"]: float(item.get("Attributes", {}).get("SentTimestamp", 0)) for item in received}

    def _extend(self) -> None:
        with self._lock:
            held = list(self._held.values())
        for start in range(0, len(held), 10):
            entries = [
                {"Id": str(i), "ReceiptHandle": message.receipt, "VisibilityTimeout": MIN_VISIBILITY_S}
                for i, message in enumerate(held[start : start + 10])
            ]
            with s3.client_errors(self.url):
                self._client().change_message_visibility_batch(QueueUrl=self.url, Entries=entries)
