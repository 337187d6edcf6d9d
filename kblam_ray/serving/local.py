"""A whole server in one process, without Ray: one replica, a writer and the registry, called directly.

For embedding answers into a program of one's own, and what the distributed server is measured against.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Self

from kblam_ray.errors import OverloadedError
from kblam_ray.model import KnowledgeModel
from kblam_ray.serving.administration import Administration
from kblam_ray.serving.messages import Event, FactFilter, FactsPage, Finished, KbRef, Question
from kblam_ray.serving.metrics import Metrics, merged
from kblam_ray.serving.registry import Registry, StateStore
from kblam_ray.serving.replica import Replica
from kblam_ray.serving.settings import LimitSettings, ServeSettings
from kblam_ray.serving.wanted import KbSpec
from kblam_ray.serving.writer import Writer


class LocalBackend(Administration):
    """A `Backend` of this process. Use as an asynchronous context manager, or `start` and `close` it.

    Args:
        knowledge_bases: what to serve from the start, beside what the state object remembers.
        model: a loaded one; by default the one that the settings name is loaded.
    """

    def __init__(
        self,
        settings: ServeSettings,
        knowledge_bases: Mapping[str, KbSpec] | None = None,
        model: KnowledgeModel | None = None,
    ) -> None:
        self.model_name = settings.model_name or "kblam"
        self.process_metrics = Metrics("gateway", "gateway")
        self._own_registry = Registry(StateStore(settings.state_uri), knowledge_bases or {}, settings.replicas.lease_s)
        self._table_writer = Writer(self.process_metrics)
        self.replica = Replica(settings, self._own_registry, "local", model)
        self._admission = Admission(settings.limits, self.process_metrics)
        super().__init__(self._own_registry, self._table_writer, self.replica.inspect)

    async def start(self) -> None:
        """Read the state, load the model and the knowledge bases."""
        await self._own_registry.start()
        await self.replica.start()

    async def close(self) -> None:
        """Stop; running requests are cancelled, a running write is finished."""
        await self.replica.close()
        await asyncio.to_thread(self._table_writer.close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def stream(self, question: Question) -> AsyncIterator[Event]:
        """See `Backend`."""
        async with self._admission.admitted():
            events = self.replica.stream(question)
            try:
                async for event in events:
                    yield event
            finally:
                await events.aclose()  # type: ignore[attr-defined]

    async def complete(self, question: Question) -> Finished:
        """See `Backend`."""
        async with self._admission.admitted():
            return await self.replica.complete(question)

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage:
        """See `Backend`."""
        return await self.replica.find_facts(kb, which)

    async def metrics(self) -> str:
        """See `Backend`."""
        return merged([self.process_metrics.text(), self.replica.metrics.text()])


class Admission:
    """Lets as many requests work as the limits say, as many more wait, and refuses the rest."""

    def __init__(self, limits: LimitSettings, metrics: Metrics) -> None:
        self._working = asyncio.Semaphore(limits.max_ongoing_requests)
        self._limits, self._metrics, self._waiting = limits, metrics, 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait for a place.

        Raises:
            OverloadedError: as many wait already as may.
        """
        if self._working.locked() and self._waiting >= self._limits.max_queued_requests:
            raise OverloadedError(
                f"{self._waiting} requests wait, and no more may",
                where="max_queued_requests",
                help="ask again in a second, or let the server have more replicas",
            )
        self._count(1)
        try:
            await self._working.acquire()
        finally:
            self._count(-1)
        try:
            yield
        finally:
            self._working.release()

    def _count(self, change: int) -> None:
        self._waiting += change
        self._metrics.waiting_requests.set(self._waiting)
