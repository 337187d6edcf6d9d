"""Server-sent events that stop the work behind them at once when the client hangs up, and keep quiet lines alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kblam_ray.serving.http.services import hung_up, stopped

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
"""Proxies cut connections on which nothing was said for a minute or so."""

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: str, name: str | None = None) -> bytes:
    """One event; `data` is JSON on one line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode()


class EventStream(Response):
    """A response of events, each sent as soon as it is there.

    Args:
        events: encoded. It is closed, and what it awaits cancelled, when the client hangs up or the server stops.
        on_end: called once all is over, also where that is before the first event was asked for, when closing a
            generator runs none of its code.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_end: Callable[[], Awaitable[None]] | None = None,
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        # no-transform and no buffering: proxies that compress or collect would hold tokens back.
        headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=MEDIA_TYPE)
        del self.headers["content-length"]
        self._events, self._on_end, self._keep_alive_s = events, on_end, keep_alive_s
        self._last_sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._stream(receive, send)
        finally:
            await self._events.aclose()
            if self._on_end is not None:
                await self._on_end()

    async def _stream(self, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(hung_up(receive))
        alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await stopped(pump, gone, alive)
        if not pump.cancelled():
            pump.result()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        # Closed in the task that reads it: cancelling what it awaits is all that is left to do for others.
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._last_sent = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            quiet_s = time.monotonic() - self._last_sent
            if quiet_s >= self._keep_alive_s:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._last_sent = time.monotonic()
                quiet_s = 0.0
            await asyncio.sleep(self._keep_alive_s - quiet_s)
