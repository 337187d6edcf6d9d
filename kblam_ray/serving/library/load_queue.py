"""Whole knowledge bases are loaded a few at a time, what was asked for last first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

LOADS_AT_A_TIME = 2
"""More would need more memory at a time and share the same disk; with one, a small table waits for a large one."""


class LoadQueue:
    """Waiting places for loads. Urgency is asked when a place is free: it may have grown while waiting."""

    def __init__(self, num_at_a_time: int = LOADS_AT_A_TIME) -> None:
        self._num_free = num_at_a_time
        self._waiting: list[tuple[Callable[[], float], asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, urgency: Callable[[], float]) -> AsyncIterator[None]:
        """Wait for a place and hold it."""
        if self._num_free:
            self._num_free -= 1
        else:
            await self._wait(urgency)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, urgency: Callable[[], float]) -> None:
        place = (urgency, asyncio.get_running_loop().create_future())
        self._waiting.append(place)
        try:
            await place[1]
        except asyncio.CancelledError:
            if place in self._waiting:
                self._waiting.remove(place)
            else:
                self._pass_on()  # it was our turn just now
            raise

    def _pass_on(self) -> None:
        if not self._waiting:
            self._num_free += 1
            return
        # Of equally urgent ones `max` takes the first, who has waited longest.
        most_urgent = max(self._waiting, key=lambda place: place[0]())
        self._waiting.remove(most_urgent)
        most_urgent[1].set_result(None)
