"""The writer as a deployment of one replica, and the client that repeats a write whose writer died."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from kblam_ray.errors import NotServedError
from kblam_ray.serving.administration import WriterLike
from kblam_ray.serving.deployments.calls import Failure, asked, outcome, repeated
from kblam_ray.serving.deployments.registry import RegistryClient
from kblam_ray.serving.deployments.reporting import Reporter, own_process_id
from kblam_ray.serving.logs import configure_logging
from kblam_ray.serving.messages import Written
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import ServeSettings
from kblam_ray.table.knowledge_base import KnowledgeBase

WHAT = "the writer"

PATIENCE_S = 300.0
"""How long a write may take, a writer that is replaced included. Who asked for it may well wait for less."""


class WriterDeployment:
    """One replica: embeds and commits facts. Answers with `calls.Failure` instead of raising."""

    async def __init__(self, settings: ServeSettings, registry: Any) -> None:  # type: ignore[misc]
        # The encoders need torch; gateways, which import this module for the client, have none.
        from kblam_ray.serving.writer import Writer

        configure_logging("writer")
        process_id = own_process_id("writer")
        metrics = Metrics(process_id, "writer")
        self._writer = Writer(metrics)
        self._reporter = Reporter(RegistryClient(registry), process_id, "writer", metrics, settings.replicas.lease_s)
        self._reporter.start()

    async def write(self, name: str, uri: str, facts: Sequence[Mapping[str, Any]]) -> Written | Failure:
        """See `Writer`, as with the method below."""
        return await outcome(self._writer.write(name, uri, facts))

    async def delete(
        self, name: str, uri: str, identities: Sequence[Mapping[str, str]], fact_ids: Sequence[int]
    ) -> Written | Failure:
        return await outcome(self._writer.delete(name, uri, identities, fact_ids))

    async def newest_version(self, uri: str) -> int | Failure:
        """The newest version of a table that has facts."""
        kb = await outcome(asyncio.to_thread(KnowledgeBase.open, uri))
        return kb if isinstance(kb, Failure) else kb.version or 0

    async def __del__(self) -> None:
        await self._reporter.close()
        await asyncio.to_thread(self._writer.close)


class WriterClient(WriterLike):
    """The writer as a gateway sees it. A write whose writer died is made again: the second time changes nothing.

    Args:
        handle: of the deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def write(self, name: str, uri: str, facts: Sequence[Mapping[str, Any]]) -> Written:
        """See `Writer.write`; UnavailableError where no writer answers in time."""
        return await self._repeated(lambda _: self._once("write", name, uri, list(facts)))

    async def delete(
        self, name: str, uri: str, identities: Sequence[Mapping[str, str]], fact_ids: Sequence[int]
    ) -> Written:
        """See `Writer.delete`; UnavailableError where no writer answers in time."""

        async def delete(is_repeated: bool) -> Written:
            try:
                return await self._once("delete", name, uri, list(identities), list(fact_ids))
            except NotServedError:
                if not is_repeated:
                    raise
                # The writer that was lost had deleted them.
                return Written(await self._once("newest_version", uri), deleted=len(fact_ids))

        return await self._repeated(delete)

    async def _repeated(self, ask: Callable[[bool], Awaitable[Written]]) -> Written:
        return await repeated(ask, deadline=time.monotonic() + PATIENCE_S, what=WHAT)

    async def _once(self, method: str, *arguments: Any) -> Any:
        # A write that was begun is finished, whatever becomes of who asked for it.
        return await asked(lambda: getattr(self._handle, method).remote(*arguments), cancels=False)
