"""The lease of a process that serves no knowledge base: its metrics, and what it knows to be wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from ray import serve

from kblam_ray.errors import KblamError
from kblam_ray.serving.deployments.registry import RegistryClient
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.wanted import ProcessReport, Role

logger = logging.getLogger(__name__)


def own_process_id(role: Role) -> str:
    """What tells this replica of Serve from all others, in reports, metrics and logs."""
    return f"{role}-{serve.get_replica_context().replica_id.unique_id}"


class Reporter:
    """Renews a lease until it is closed; a registry that does not answer is asked again at the next turn.

    Args:
        on_renewed: told how many answerers live, each time.
    """

    def __init__(
        self,
        registry: RegistryClient,
        process_id: str,
        role: Role,
        metrics: Metrics,
        lease_s: float,
        on_renewed: Callable[[int], None] = lambda num_answerers: None,
    ) -> None:
        self._on_renewed = on_renewed
        self._registry, self._process_id, self._role = registry, process_id, role
        self._metrics, self._every_s = metrics, lease_s / 3
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._task = asyncio.create_task(self._keep_reporting())

    async def close(self) -> None:
        """Give the lease back, if the registry still listens."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with suppress(KblamError):
            await self._registry.leave(self._process_id)

    async def _keep_reporting(self) -> None:
        while True:
            try:
                # Whoever knows what is wanted helps a registry that lost its memory.
                report = ProcessReport(
                    self._process_id, self._role, wanted=self._registry.last_wanted, metrics=self._metrics.text()
                )
                self._on_renewed(await self._registry.renew(report))
            except KblamError as error:
                logger.warning("the registry does not take a report: %s", error)
            await asyncio.sleep(self._every_s)
