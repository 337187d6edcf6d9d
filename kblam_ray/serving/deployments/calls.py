"""Calls between the processes of a server: our errors travel as data, and a call whose process died is made again.

Serve's replicas may die at any time. A call that is safe to repeat goes to another replica, or to the one that Serve
puts in the dead one's place, until a deadline; only then does the caller hear of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError, RequestCancelledError

from kblam_ray.errors import KblamError, UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5

_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, ReplicaUnavailableError)
"""What Ray raises when the process that had the call is not there any more; other errors are the callee's own."""


class LostError(Exception):
    """The process that had the call died, or can do no more; the call may or may not have been carried out."""


@dataclass(frozen=True)
class Failure:
    """One of our errors on its way to the caller. Raised in the callee, Ray would wrap it and log its traceback.

    Attributes:
        is_broken: the process failed, not the request: another may do better.
    """

    error: KblamError
    is_broken: bool = False


async def outcome(work: Awaitable[T]) -> T | Failure:
    """What `work` gives, or the error of ours that it raises, as the answer to a call."""
    try:
        return await work
    except KblamError as error:
        return Failure(error)


def opened(answer: Any) -> Any:
    """What `outcome` gave, in the caller's process.

    Raises:
        KblamError: the callee's.
        LostError: the callee is broken.
    """
    if isinstance(answer, Failure):
        if answer.is_broken:
            raise LostError(str(answer.error)) from answer.error
        raise answer.error
    return answer


async def asked(call: Callable[[], Any], *, cancels: bool = True) -> Any:
    """One call over a Serve handle, once.

    Args:
        call: makes it: `lambda: handle.method.remote(...)`.
        cancels: whether the callee is told when the caller is cancelled.

    Raises:
        KblamError: the callee's.
        LostError: the callee died.
        UnavailableError: the deployment failed to deploy.
    """
    response = call()
    try:
        return opened(await response)
    except asyncio.CancelledError:
        if _is_ours():
            if cancels:
                response.cancel()
            raise
        raise LostError("the call was cancelled from elsewhere") from None
    except (RequestCancelledError, *_GONE) as error:
        raise LostError(first_line(error)) from error
    except DeploymentUnavailableError as error:
        raise _not_deployed(error) from error


async def streamed(call: Callable[[], Any], is_last: Callable[[Any], bool]) -> AsyncGenerator[Any, None]:
    """The items of a streaming call over a Serve handle; leaving before the last one cancels it. Raises as `asked`."""
    response = call()
    is_done = False
    try:
        while True:
            try:
                item = await anext(response)
            except StopAsyncIteration:
                is_done = True
                return
            item = opened(item)
            is_done = is_last(item)
            yield item
    except asyncio.CancelledError:
        if _is_ours():
            raise
        is_done = True
        raise LostError("the call was cancelled from elsewhere") from None
    except (RequestCancelledError, *_GONE) as error:
        is_done = True
        raise LostError(first_line(error)) from error
    except DeploymentUnavailableError as error:
        is_done = True
        raise _not_deployed(error) from error
    finally:
        if not is_done:
            response.cancel()


async def repeated(ask: Callable[[bool], Awaitable[T]], *, deadline: float, what: str) -> T:
    """`ask(is_repeated)` until it is not lost any more. What it does must be safe to do twice.

    Args:
        deadline: on the clock of `time.monotonic`.
        what: names what does not answer, in the error.

    Raises:
        UnavailableError: not before the deadline.
    """
    pauses = Pauses(deadline, what)
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
            while True:
                try:
                    return await ask(pauses.num_lost > 0)
                except LostError as error:
                    await pauses.after(error)
    except TimeoutError:
        raise not_in_time(what) from None


class Pauses:
    """Waits between the tries of one call, longer each time, until the deadline. Arguments as in `repeated`."""

    def __init__(self, deadline: float, what: str) -> None:
        self.num_lost = 0
        self._deadline, self._what, self._pause_s = deadline, what, FIRST_PAUSE_S

    async def after(self, error: LostError) -> None:
        """Return when the call should be made again. UnavailableError when there is no time left for that."""
        self.num_lost += 1
        if time.monotonic() + self._pause_s > self._deadline:
            raise not_in_time(self._what) from error
        logger.warning("%s is lost, asking again: %s", self._what, error)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def not_in_time(what: str) -> UnavailableError:
    """The error of a call that nothing answered."""
    return UnavailableError(f"{what} does not answer", where="server", help="ask again in a moment")


def first_line(error: BaseException) -> str:
    """What an error of Ray says, without the pages that follow."""
    with suppress(IndexError):
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return type(error).__name__


def _not_deployed(error: DeploymentUnavailableError) -> UnavailableError:
    return UnavailableError(error.message, where="server", help="see `serve status` and the replicas' logs")


def _is_ours() -> bool:
    """Whether a CancelledError is meant for this task. Serve raises one, too, where the callee's task was cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
