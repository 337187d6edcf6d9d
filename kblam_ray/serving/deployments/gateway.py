"""The gateway as a deployment: it speaks HTTP, has no model, and passes every request on."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import ASGIApp

from kblam_ray.serving.deployments.admission import Admission
from kblam_ray.serving.deployments.backend import ServeBackend
from kblam_ray.serving.deployments.doorway import Doorway
from kblam_ray.serving.deployments.registry import RegistryClient
from kblam_ray.serving.deployments.reporting import Reporter, own_process_id
from kblam_ray.serving.deployments.writer import WriterClient
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.http.app import create_app
from kblam_ray.serving.logs import configure_logging
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import ServeSettings

logger = logging.getLogger(__name__)


class GatewayDeployment:
    """The ingress of the application: `serve.ingress()` makes it answer HTTP.

    Args:
        model_name: what clients call the model.
        answerers, writer, registry: handles of the other deployments.
        keys: hashes only.
    """

    def __init__(
        self, settings: ServeSettings, model_name: str, answerers: Any, writer: Any, registry: Any, keys: Keys
    ) -> None:
        configure_logging("gateway")
        process_id = own_process_id("gateway")
        self._settings, self._keys = settings, keys
        self._metrics = Metrics(process_id, "gateway")
        self._registry = RegistryClient(registry)
        self._admission = Admission(settings.limits, self._metrics, settings.replicas.gateways)
        self._backend = ServeBackend(
            model_name,
            settings.limits,
            answerers,
            WriterClient(writer),
            self._registry,
            self._metrics,
            process_id,
            self._admission,
        )
        self._reporter = Reporter(
            self._registry, process_id, "gateway", self._metrics, settings.replicas.lease_s, self._count
        )
        self._reporter.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        limits = self._settings.limits
        app = create_app(self._backend, limits, self._keys, self._metrics, grounding=self._settings.grounding)
        self._doorway = Doorway(app, limits.retry_after_s)
        return self._doorway

    async def drain(self, timeout_s: float) -> dict[str, int]:
        """Turn new requests away, wait for those inside; says how many were served and how many are left."""
        left = await self._doorway.drain(timeout_s)
        return {"served": self._doorway.num_served, "left": left}

    async def serves(self) -> dict[str, dict[str, Any]]:
        """Knowledge bases by name: URI, version and status."""
        known = (await self._backend.overview()).knowledge_bases
        return {name: {"uri": kb.uri, "version": kb.version, "status": kb.status} for name, kb in sorted(known.items())}

    async def __del__(self) -> None:
        await self._reporter.close()

    def _count(self, num_answerers: int) -> None:
        """How many requests are let in depends on how many answerers there are."""
        self._admission.num_answerers = num_answerers
