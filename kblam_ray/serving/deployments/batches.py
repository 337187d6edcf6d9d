"""Events of an answer that come close together travel together: a message between processes costs more than a token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from kblam_ray.serving.messages import Event, Started

SPACING_S = 0.025
"""Least time between two messages of one answer: 40 a second read as smoothly as any number."""

MOST_PER_S = 200
"""Messages of all answers of a replica: more would take the time that its engine needs."""


def spacing_s(num_streams: int) -> float:
    """Time between two messages of one of so many answers."""
    return max(SPACING_S, num_streams / MOST_PER_S)


async def in_batches(events: AsyncIterator[Event], spacing_s: Callable[[], float]) -> AsyncGenerator[list[Event], None]:
    """All events in their order. The first text does not wait, later ones wait for `spacing_s()`, the end never.

    `Started` alone makes no batch: whoever passes events on holds it back until there is something to say. Closing this
    closes `events`; an error of `events` is raised after what came before it.
    """
    ready: list[Event] = []
    has_more = asyncio.Event()

    async def collect() -> None:
        try:
            async for event in events:
                ready.append(event)
                if not isinstance(event, Started):
                    has_more.set()
        finally:
            has_more.set()
            if (close := getattr(events, "aclose", None)) is not None:
                await close()

    collecting = asyncio.create_task(collect())
    try:
        while True:
            await has_more.wait()
            has_more.clear()
            if ready:
                batch = ready[:]
                ready.clear()
                yield batch
            if collecting.done() and not ready:
                await collecting
                return
            await asyncio.wait({collecting}, timeout=spacing_s())
            if collecting.done():
                has_more.set()
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
