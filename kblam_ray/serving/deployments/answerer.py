"""The answerer as a deployment: a replica that loads its model and knowledge bases before it counts as ready."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from kblam_ray.errors import GenerationError, KblamError
from kblam_ray.serving.deployments.batches import in_batches, spacing_s
from kblam_ray.serving.deployments.calls import Failure, outcome
from kblam_ray.serving.deployments.registry import RegistryClient
from kblam_ray.serving.deployments.reporting import own_process_id
from kblam_ray.serving.logs import configure_logging, request_id_var
from kblam_ray.serving.messages import Event, FactFilter, FactsPage, Finished, KbRef, Question
from kblam_ray.serving.settings import ServeSettings
from kblam_ray.serving.wanted import TableFound

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAST_WORDS_S = 0.5
"""What a broken replica takes to say so to those who wait for it."""


class AnswererDeployment:
    """One replica; there may be many. Answers with `calls.Failure` instead of raising.

    Raises in its constructor what `Replica.start` raises; Serve tries again, and then gives up.
    """

    async def __init__(self, settings: ServeSettings, registry: Any) -> None:  # type: ignore[misc]
        # Gateways, which import this package, have no torch.
        from kblam_ray.serving.replica import Replica, one_thread_per_core

        configure_logging("answerer")
        self._num_streams = 0
        one_thread_per_core(settings)
        self._replica = Replica(settings, RegistryClient(registry), own_process_id("answerer"))
        await self._replica.start()

    async def stream(self, question: Question) -> AsyncGenerator[list[Event] | Failure, None]:
        """The events of `Replica.stream` in batches; the last item may be a failure."""
        request_id_var.set(question.request_id)
        batches = in_batches(self._replica.stream(question), lambda: spacing_s(self._num_streams))
        self._num_streams += 1
        try:
            async for batch in batches:
                yield batch
        except KblamError as error:
            yield self._failure(error)
        finally:
            self._num_streams -= 1
            await batches.aclose()

    async def complete(self, question: Question) -> Finished | Failure:
        """See `Replica`, as with the methods below."""
        request_id_var.set(question.request_id)
        return await self._outcome(self._replica.complete(question))

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage | Failure:
        return await outcome(self._replica.find_facts(kb, which))

    async def inspect(self, uri: str, version: int | None) -> TableFound | Failure:
        return await outcome(self._replica.inspect(uri, version))

    async def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        self._replica.check()

    async def __del__(self) -> None:
        # A constructor that failed leaves nothing to close.
        if (replica := getattr(self, "_replica", None)) is not None:
            await replica.close()

    async def _outcome(self, work: Awaitable[T]) -> T | Failure:
        try:
            return await work
        except KblamError as error:
            return self._failure(error)

    def _failure(self, error: KblamError) -> Failure:
        if isinstance(error, GenerationError):
            try:
                self._replica.check()
            except KblamError:
                logger.exception("this replica can answer no more and ends")
                # A replica that fails at once would draw all requests to itself until Serve notices.
                asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
                return Failure(error, is_broken=True)
        return Failure(error)
