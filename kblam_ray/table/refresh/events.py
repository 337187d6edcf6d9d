"""What a queue's message says of objects: S3's own notification, the same through SNS, or an event of EventBridge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus


class UnreadableMessageError(ValueError):
    """A message is none that S3 sends; the text is the reason."""


@dataclass(frozen=True)
class ObjectEvent:
    """One object that was written or removed.

    Attributes:
        at_us: when, microseconds since 1970; None where the event does not say.
        etag: of what was written, None where the event does not say.
        is_removal: whether the object went.
    """

    uri: str
    at_us: int | None
    etag: str | None
    is_removal: bool


def events_in(body: str) -> list[ObjectEvent]:
    """The objects that a message names; none for the message with which S3 tries a new queue.

    Raises:
        UnreadableMessageError: it is no event of S3's.
    """
    said = _parsed(body)
    if isinstance(said.get("Message"), str) and ("TopicArn" in said or said.get("Type") == "Notification"):
        said = _parsed(said["Message"])
    if said.get("Event") == "s3:TestEvent":
        return []
    try:
        if "Records" in said:
            return list(_records(said["Records"]))
        if said.get("source") == "aws.s3" and "detail" in said:
            return list(_event_bridge(said))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableMessageError(f"an event of S3's with a part missing: {error!r}") from None
    raise UnreadableMessageError("it is no event of S3's")


def _parsed(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise UnreadableMessageError("it is not JSON") from None
    if not isinstance(said, dict):
        raise UnreadableMessageError("it is no event of S3's")
    return said


def _records(records: list[Mapping[str, Any]]) -> Iterator[ObjectEvent]:
    for record in records:
        name = record["eventName"]
        if record.get("eventSource", "aws:s3") != "aws:s3" or not name.startswith(("ObjectCreated", "ObjectRemoved")):
            continue  # restores, tags, replication: the content is as before
        found = record["s3"]
        # Keys are encoded as in a form: a blank is a plus.
        uri = f"s3://{found['bucket']['name']}/{unquote_plus(found['object']['key'])}"
        etag = found["object"].get("eTag")
        yield ObjectEvent(uri, _microseconds(record.get("eventTime")), etag, name.startswith("ObjectRemoved"))


def _event_bridge(said: Mapping[str, Any]) -> Iterator[ObjectEvent]:
    kind, detail = said["detail-type"], said["detail"]
    if kind not in ("Object Created", "Object Deleted"):
        return
    # Here keys come as they are.
    uri = f"s3://{detail['bucket']['name']}/{detail['object']['key']}"
    yield ObjectEvent(uri, _microseconds(said.get("time")), detail["object"].get("etag"), kind == "Object Deleted")


def _microseconds(text: str | None) -> int | None:
    if not text:
        return None
    return round(datetime.fromisoformat(text).timestamp() * 1_000_000)
