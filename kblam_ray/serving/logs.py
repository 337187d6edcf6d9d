"""Logs of the server: one JSON object per line, with the id of the request it was written for, and never a key.

`request_id_var` is set where a request comes in; whatever is logged while it is worked on carries its id. Everything
that is written, tracebacks and further fields included, goes through `redacted` first.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from kblam_ray.serving.wanted import Role

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being worked on; None outside of one."""

ACCESS_LOGGER = "kblam_ray.serving.access"

_access = logging.getLogger(ACCESS_LOGGER)

_REDACTED = "[redacted]"
_SECRETS = (
    # What stands after the name of a header or a setting, in a line, a mapping or a pair, whatever the scheme.
    (re.compile(r"""(?i)(\b(?:proxy-)?authorization\b["']?\s*[:=,]\s*b?["']?)[^"'\r\n]+"""), rf"\1{_REDACTED}"),
    (re.compile(r"""(?i)(\bKBLAM_(?:API|ADMIN)_KEYS\b["']?\s*[:=,]\s*b?["']?)[^"'\r\n]+"""), rf"\1{_REDACTED}"),
    (re.compile(r"""(?i)((?<![a-z0-9])api[-_]?keys?\b["']?\s*[:=,]\s*b?["']?)[^\s"'&]+"""), rf"\1{_REDACTED}"),
    (re.compile(r"(?i)\b(bearer)(?:\s|%20|\+)+\S+"), rf"\1 {_REDACTED}"),
    (re.compile(r"(?<![A-Za-z0-9])sk-[\w.~+/=-]+"), _REDACTED),
)
_SECRET_NAMES = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "api_key"})

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""What every record has; other attributes were given with `extra=`."""


def redacted(text: str) -> str:
    """`text` without keys: what follows `Bearer` or stands in an Authorization header, and whatever begins `sk-`."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class JsonFormatter(logging.Formatter):
    """A record as one line of ASCII JSON: `time, level, role, logger, message`, `request_id` inside a request, then
    the fields given with `extra=`, then `exception`."""

    def __init__(self, role: Role | str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": _message(record),
        }
        if (request_id := request_id_var.get()) is not None:
            line["request_id"] = request_id
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(_clean(line))


class JsonHandler(logging.StreamHandler[TextIO]):
    """The handler that `configure_logging` installs, told from others by its class."""

    def handleError(self, record: logging.LogRecord) -> None:
        # Logging's own would print the record's arguments as they are, keys and all.
        kind = sys.exc_info()[0]
        with suppress(OSError, ValueError):
            reason = kind.__name__ if kind else "unknown error"
            print(f"a log line of {record.name} could not be written: {reason}", file=sys.stderr)


def configure_logging(role: Role | str, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Write all logs of this process as JSON lines; calling it again replaces what it did before.

    Args:
        role: of the process, in every line.
        level: of this package's own loggers; others' are written from WARNING up.
        stream: where to; stderr unless given.
    """
    handler = JsonHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(role))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, JsonHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("kblam_ray").setLevel(level)


def access_log(*, method: str, endpoint: str, status: int, seconds: float, **fields: Any) -> None:
    """Log a request that was answered or given up.

    Args:
        endpoint: the route, without the query and without names from the path.
        seconds: from the first byte in to the last one out.
        fields: what else is known: model, kb_version, tokens; None is left out. Never a question's text.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    extra = {"method": method, "endpoint": endpoint, "status": status, "seconds": round(seconds, 4), **known}
    _access.info("%s %s %d", method, endpoint, status, extra=extra)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        # Left to logging, the arguments would be printed as they are, keys and all.
        return f"{record.msg} {record.args}"


def _clean(value: Any) -> Any:
    """`value` as JSON can say it, without keys."""
    if isinstance(value, str):
        return redacted(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {redacted(str(name)): _REDACTED if _is_secret(name) else _clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = list(value)
        if len(items) == 2 and _is_secret(items[0]):  # a header, as ASGI gives it
            return [_clean(items[0]), _REDACTED]
        return [_clean(item) for item in items]
    return redacted(str(value))


def _is_secret(name: Any) -> bool:
    text = name.decode("latin-1") if isinstance(name, bytes) else str(name)
    return text.lower() in _SECRET_NAMES
