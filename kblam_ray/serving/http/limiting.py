"""Bodies larger than the server takes are refused while they come in, before they are held in memory."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kblam_ray.errors import TooLargeError
from kblam_ray.serving.http.errors import RefusedError

MAX_DISCARDED_BYTES = 256_000_000
MAX_DISCARD_S = 10
"""How much of a refused body is read and thrown away: many clients look for an answer only after sending all of it,
and one whose connection is cut in the middle never sees it."""


class BodyLimit:
    """ASGI middleware: reading more than `max_bytes` of a body raises the error 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, send, self._max_bytes)
        await self._app(scope, body.receive, body.send)


class _Body:
    """One request's body, counted."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        self._declared = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 19 else 0
        # A client that waits to be told to go on has sent nothing and need not.
        self._waits = headers.get("expect", "").lower() == "100-continue"
        self._receive, self._send, self._max_bytes = receive, send, max_bytes
        self._num_bytes, self._is_refused, self._is_whole = 0, False, False

    async def receive(self) -> Message:
        if self._declared > self._max_bytes:
            raise self._refusal()
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._num_bytes > self._max_bytes:
                raise self._refusal()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.body" or message.get("more_body", False) or not self._is_refused:
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        if not (self._is_whole or (self._waits and not self._num_bytes)):
            await self._discard()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _refusal(self) -> RefusedError:
        self._is_refused = True
        return RefusedError(
            TooLargeError(
                f"the body has more than {self._max_bytes:,} bytes",
                where="body",
                help="send less at a time; jobs/embed_kb.py writes any number of facts",
            )
        )

    async def _discard(self) -> None:
        until, num_bytes = time.monotonic() + MAX_DISCARD_S, 0
        while num_bytes < MAX_DISCARDED_BYTES and (left_s := until - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self._receive(), left_s)
            except TimeoutError:
                return
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):  # nor has a disconnect
                return
