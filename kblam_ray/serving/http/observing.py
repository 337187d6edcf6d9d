"""Around every request: its id, its line in the log, its metrics, and an answer where all else failed."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kblam_ray.errors import PermissionDeniedError
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.http.errors import internal_error, response_to
from kblam_ray.serving.http.services import CLIENT_GONE
from kblam_ray.serving.logs import access_log, request_id_var
from kblam_ray.serving.metrics import Metrics

logger = logging.getLogger(__name__)

NO_ROUTE = "none"
"""Endpoint of requests that came to none: paths are what clients please to send."""

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Observer:
    """ASGI middleware, the outermost. HEAD is answered as GET without the body."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, retry_after_s: int) -> None:
        self._app, self._keys, self._metrics, self._retry_after_s = app, keys, metrics, retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        token = request_id_var.set(request_id)
        method = scope["method"]
        scope = {**scope, "method": "GET" if method == "HEAD" else method, "kblam_ray.noted": {}}
        answer = _Answer(send, request_id, is_head=method == "HEAD")
        started = time.monotonic()
        try:
            await self._answer(scope, receive, answer)
        except asyncio.CancelledError:
            answer.status = CLIENT_GONE
            raise
        finally:
            self._record(scope, method, answer.status, time.monotonic() - started)
            request_id_var.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            self._keys.check_client((scope.get("client") or (None,))[0], hosts)
        except PermissionDeniedError as error:
            await response_to(error, self._retry_after_s)(scope, receive, answer.send)
            return
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            logger.exception("a request failed in a way that nobody foresaw")
            if answer.is_started:
                raise  # the connection is cut: the only way left to say that the answer is not whole
            await internal_error()(scope, receive, answer.send)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", NO_ROUTE)
        noted: dict[str, Any] = scope["kblam_ray.noted"]
        access_log(method=method, endpoint=endpoint, status=status, seconds=seconds, **noted)
        self._metrics.requests.labels(endpoint=endpoint, status=status).inc()
        self._metrics.request_seconds.labels(endpoint=endpoint).observe(seconds)


class _Answer:
    """Sends a response under a request id, and remembers its status."""

    def __init__(self, send: Send, request_id: str, *, is_head: bool) -> None:
        self._send, self._request_id, self._is_head = send, request_id, is_head
        self.status, self.is_started = CLIENT_GONE, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.is_started = message["status"], True
            headers = [*message.get("headers", ()), (b"x-request-id", self._request_id.encode())]
            message = {**message, "headers": headers}
        elif self._is_head:
            message = {**message, "body": b""}
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """What the client calls its request, where that can stand in a log; else one made up."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    return given[0].decode() if len(given) == 1 and _ID.fullmatch(given[0]) else uuid4().hex
