"""What all endpoints work with: the backend behind them, waiting for it while the client is there, and replying."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive

import kblam_ray
from kblam_ray.errors import NotServedInTimeError, UnavailableError
from kblam_ray.serving.backend import Backend
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.http.schema.base import ResponseBody
from kblam_ray.serving.http.schema.chat_request import Grounding
from kblam_ray.serving.messages import Written
from kblam_ray.serving.settings import LimitSettings

T = TypeVar("T")

MAX_WAIT_S = 600

WaitQuery = Annotated[bool, Query(description="answer when every replica serves it")]
TimeoutQuery = Annotated[
    float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="how long to wait for that; then 503")
]

CLIENT_GONE = 499
"""In logs and metrics: nobody was there any more to be answered."""


class ClientGoneError(HTTPException):
    """The client hung up before its answer was ready."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client is gone")


@dataclass(frozen=True)
class Services:
    """What the endpoints of one application share."""

    backend: Backend
    limits: LimitSettings
    keys: Keys
    grounding: Grounding
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: of the model and the code, which together make an answer."""
        text = f"{self.backend.model_name} {kblam_ray.__version__}"
        return f"fp_{sha256(text.encode()).hexdigest()[:12]}"


def services_of(request: Request) -> Services:
    """The services of the application that a request came to."""
    services: Services = request.app.state.services
    return services


async def _services(request: Request) -> Services:
    # A plain function would be called in a thread, which costs more than all the rest of a request.
    return services_of(request)


Service = Annotated[Services, Depends(_services)]


def note(request: Request, **fields: Any) -> None:
    """Add to the log line of a request: names, versions and counts, never a text."""
    request.scope["kblam_ray.noted"].update(fields)


async def within(work: Awaitable[T], deadline: float) -> T:
    """The result of work, if it comes before the deadline (of the event loop's clock).

    Raises:
        UnavailableError: it does not, and was cancelled.
    """
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise out_of_time() from None


def out_of_time() -> UnavailableError:
    """What a request is told that took longer than it may."""
    return UnavailableError("the request took longer than it may", help="ask again, for less or when less is asked")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of work; work is cancelled as soon as the client hangs up.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hung_up(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await stopped(task, gone)


async def hung_up(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def stopped(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and return when they have ended, however they did."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # taken note of, or the event loop complains


def write_deadline(services: Services, wait: bool, timeout_s: float) -> float:
    """When a write must be answered, waiting included, by the event loop's clock."""
    return asyncio.get_running_loop().time() + services.limits.request_timeout_s + (timeout_s if wait else 0)


def served_in_time(written: Written, timeout_s: float) -> Written:
    """A write that is served where that was waited for; raises NotServedInTimeError for others."""
    if written.is_served is False:
        raise NotServedInTimeError(written.kb_version, timeout_s)
    return written


def reply(body: ResponseBody, status: int = 200) -> Response:
    """A JSON response with the fields that were set, null ones too."""
    return Response(body.model_dump_json(exclude_unset=True), status, media_type="application/json")
