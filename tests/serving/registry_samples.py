"""For tests of the registry: reports, and an event loop whose time passes only where everybody waits for it."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

from kblam_ray.serving.registry import Registry, StateStore
from kblam_ray.serving.wanted import KbReport, KbSpec, ProcessReport, Wanted

LEASE_S = 3.0
URI = "/tables/capitals"


class ClockLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything can run and jumps to the next timer when nothing can; threads run inline."""

    def __init__(self) -> None:
        self.now = 1_000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            future.set_exception(error)
        return future


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: ClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        assert ready or timeout is not None, "everybody waits, and for nothing"
        if not ready and timeout:
            self._loop.now += timeout
        return ready


def in_own_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test on a `ClockLoop`."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=ClockLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


def now() -> float:
    return asyncio.get_running_loop().time()


async def started(initial: dict[str, KbSpec] | None = None, store: StateStore | None = None) -> Registry:
    """A registry that has just been started, on the clock of the running loop."""
    registry = Registry(store or StateStore(None), initial or {}, LEASE_S, clock=asyncio.get_running_loop().time)
    await registry.start()
    return registry


async def settled(initial: dict[str, KbSpec] | None = None, store: StateStore | None = None) -> Registry:
    """A registry that has heard of every process that lives."""
    registry = await started(initial, store)
    await asyncio.sleep(LEASE_S)
    return registry


def kb_report(version: int | None, *, uri: str = URI, pinned: int | None = None, **fields: Any) -> KbReport:
    """What a replica says of one knowledge base."""
    base: dict[str, Any] = {
        "latest_version": version,
        "num_facts": None if version is None else 10 * version,
        "encoder": "minilm",
        "status": "loading" if version is None else "ready",
    }
    return KbReport(uri=uri, pinned=pinned, version=version, **{**base, **fields})


def answerer(process_id: str, wanted: Wanted | None = None, **knowledge_bases: KbReport) -> ProcessReport:
    return ProcessReport(process_id, "answerer", knowledge_bases, wanted)


class Process:
    """An answerer that reports what it is told to serve, every third of a lease, until it is cancelled.

    Args:
        serves: by name; a test changes it.
    """

    def __init__(self, registry: Registry, process_id: str, **serves: KbReport) -> None:
        self.registry, self.process_id, self.serves = registry, process_id, serves
        self.wanted = Wanted()

    async def report(self) -> None:
        await self.registry.report(answerer(self.process_id, self.wanted, **self.serves))

    async def follow(self) -> None:
        """Learn what is wanted, and say so."""
        self.wanted = await self.registry.wanted()
        await self.report()

    async def live(self) -> None:
        while True:
            await self.follow()
            await asyncio.sleep(LEASE_S / 3)
