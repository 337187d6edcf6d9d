"""What stands between Serve's proxy and the app: it counts open requests, and turns new ones away when asked to."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kblam_ray.errors import UnavailableError
from kblam_ray.serving.http.errors import response_to

_REQUEST_ID = b"x-request-id"


class Doorway:
    """An ASGI app around another.

    Attributes:
        num_served: requests answered to their end.
        num_open: those that are being answered.
    """

    def __init__(self, app: ASGIApp, retry_after_s: int) -> None:
        self.num_served = 0
        self._app, self._retry_after_s = app, retry_after_s
        self.num_open, self._is_closed = 0, False
        self._nobody_inside = asyncio.Event()
        self._nobody_inside.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; 503 with `Retry-After` after `drain`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._is_closed:
            stopping = UnavailableError("the server stops", where="server", help="ask again in a moment")
            await response_to(stopping, self._retry_after_s)(scope, receive, send)
            return
        self.num_open += 1
        self._nobody_inside.clear()
        try:
            await self._app(scope, receive, _without_second_id(scope, send))
            self.num_served += 1
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._nobody_inside.set()

    async def drain(self, timeout_s: float) -> int:
        """Let no more requests in, and wait for those inside. Returns how many are left when the time is over."""
        self._is_closed = True
        try:
            await asyncio.wait_for(self._nobody_inside.wait(), timeout_s)
        except TimeoutError:
            return self.num_open
        return 0


def _without_second_id(scope: Scope, send: Send) -> Send:
    """`send` without the app's request id where Serve's proxy, which passed it to the app, adds the same again."""
    given = [value for name, value in scope["headers"] if name == _REQUEST_ID]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [header for header in message.get("headers", ()) if header[0].lower() != _REQUEST_ID]
            own = [header[1] for header in message.get("headers", ()) if header[0].lower() == _REQUEST_ID]
            if own == given:
                message = {**message, "headers": headers}
        await send(message)

    return sending if len(given) == 1 else send
