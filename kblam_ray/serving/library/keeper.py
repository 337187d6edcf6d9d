"""Keeps one name at the version that is wanted: looks at its table, fetches what is new, says what went wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from kblam_ray.errors import KblamError, StorageError
from kblam_ray.serving.library.fetcher import Sighting
from kblam_ray.serving.library.kept import Kept
from kblam_ray.serving.library.served import Served
from kblam_ray.serving.library.shelf import NoRoomError, Shelf
from kblam_ray.serving.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 5.0
"""Longest pause before a table that cannot be read is tried again."""

SLOW_LOOK_S = 5.0
"""A store that has not answered for so long counts as unreachable, though the question stands."""


class Keeper:
    """Follows tables for the names of one library.

    Args:
        poll_s: pause between two looks at a table that is well.
        settle: called after each switch (with the memory that is new) and failure (with None).
        announce: called when what is reported of a name has changed.
    """

    def __init__(
        self,
        poll_s: float,
        metrics: Metrics,
        settle: Callable[[Served, Kept | None], None],
        announce: Callable[[Served], None],
    ) -> None:
        self._poll_s, self._metrics = poll_s, metrics
        self._settle, self._announce = settle, announce

    async def keep(self, served: Served, shelf: Shelf) -> None:
        """Until cancelled. Whatever changes while something is fetched is fetched together at the next step."""
        while True:
            served.poked.clear()
            if served.may_rest:
                await served.poked.wait()
                continue
            step = asyncio.ensure_future(self._step(served, shelf))
            try:
                await asyncio.wait({step})
            finally:
                step.cancel()
            error = step.exception()
            if error is not None:
                self.failed(served, error)
            await until(served.poked, self._pause_s(served))

    def failed(self, served: Served, error: BaseException) -> None:
        """Take note of an error: the last good memory goes on, and the next step tries again."""
        if not isinstance(error, NoRoomError):
            self._metrics.refresh_failures.labels(kb=served.name).inc()
        is_news = served.fail(error)
        self._settle(served, None)
        if not is_news:
            return
        level = logging.INFO if isinstance(error, NoRoomError) else logging.WARNING
        unexpected = None if isinstance(error, KblamError) else error
        logger.log(level, "knowledge base %s is %s: %s", served.name, served.status, error, exc_info=unexpected)
        self._announce(served)

    async def _step(self, served: Served, shelf: Shelf) -> None:
        """Ask the table for news, fetch them, and serve them."""
        if served.status == "unloaded":
            served.status = "loading"
        at_least = served.spec.at_least
        seen = await self._look(served, shelf)
        version = served.saw(seen)
        if served.may_rest:
            return  # unloaded meanwhile: to load it again would unload what is asked for
        self._metrics.kb_latest_version.labels(kb=served.name).set(seen.log.version)
        if served.serves(version, seen.history):
            # A look that began before it was told of a newer version does not know; the next one follows at once.
            if served.spec.at_least == at_least and served.recover():
                self._announce(served)
            self._settle(served, None)
            self._measure(served)
            return
        served.fall_behind(time.monotonic())
        kept = await shelf.obtain(version, seen)
        if served.may_rest:
            return
        if served.spec.version not in (None, version):
            served.poked.set()  # it was pinned elsewhere meanwhile
            return
        self._switch(served, kept)
        if served.spec.at_least != at_least and (served.spec.at_least or 0) > kept.version:
            served.fall_behind(time.monotonic())

    async def _look(self, served: Served, shelf: Shelf) -> Sighting:
        look = asyncio.ensure_future(shelf.look())
        try:
            done, _ = await asyncio.wait({look}, timeout=SLOW_LOOK_S)
            if not done:
                self.failed(
                    served,
                    StorageError(
                        f"the store has not answered for {SLOW_LOOK_S:g} s",
                        where=shelf.uri,
                        help="see that it runs and can be reached",
                    ),
                )
            return await look
        finally:
            look.cancel()

    def _switch(self, served: Served, kept: Kept) -> None:
        before = served.version
        served.switch(kept, time.monotonic())
        if served.shelf is not None:
            # Another name's switch may have let go of it in the moment when it was made and nobody served it yet.
            served.shelf.keep(kept)
        served.recover()
        self._settle(served, kept)
        if before is not None and served.refresh_s is not None:
            self._metrics.refresh_seconds.labels(kb=served.name).observe(served.refresh_s)
        self._metrics.kb_version.labels(kb=served.name).set(kept.version)
        self._metrics.kb_facts.labels(kb=served.name).set(kept.memory.num_facts)
        self._measure(served)
        logger.info(
            "knowledge base %s serves version %d (before: %s), %d facts",
            served.name,
            kept.version,
            before,
            kept.memory.num_facts,
        )
        self._announce(served)

    def _measure(self, served: Served) -> None:
        # Again at each look: indexes, and what the first questions derive from the facts, come later.
        if served.kept is not None:
            served.kept.measure()
        self._metrics.kb_memory_bytes.labels(kb=served.name).set(0 if served.kept is None else served.kept.nbytes)

    def _pause_s(self, served: Served) -> float:
        if not served.num_failures:
            return self._poll_s
        return min(max(self._poll_s, MAX_BACKOFF_S), self._poll_s * 2 ** min(served.num_failures - 1, 32))


async def until(event: asyncio.Event, timeout_s: float | None) -> None:
    """Wait until the event is set or the time is over."""
    # Unlike `asyncio.wait_for` of this Python, it never loses a cancellation that comes together with the event.
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
