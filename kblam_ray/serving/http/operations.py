"""`GET /health` and `GET /metrics`: for load balancers and Prometheus, without a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kblam_ray.serving.http.schema.errors import ErrorBody, errors
from kblam_ray.serving.http.schema.operations import Health, KnowledgeBaseHealth
from kblam_ray.serving.http.services import Service, reply
from kblam_ray.serving.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])

_PROMETHEUS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}
}


@router.get(
    "/health",
    summary="Whether questions are answered",
    response_model=Health,
    responses={503: {"model": Health | ErrorBody, "description": "No replica answers, or nobody knows of one."}},
)
async def health(services: Service) -> Response:
    """Needs no key. Degraded: answers go on, from the last good version of each knowledge base."""
    known = await services.backend.overview()
    replicas = sum(role == "answerer" for role in known.processes.values())
    is_whole = all(kb.status in ("ready", "unloaded") for kb in known.knowledge_bases.values())
    body = Health(
        status="unavailable" if not replicas else "ok" if is_whole else "degraded",
        model=services.backend.model_name,
        replicas=replicas,
        knowledge_bases={
            name: KnowledgeBaseHealth(
                status=kb.status, version=kb.version, latest_version=kb.latest_version, lag_s=kb.lag_s
            )
            for name, kb in sorted(known.knowledge_bases.items())
        },
    )
    response = reply(body, 200 if replicas else 503)
    if not replicas:
        response.headers["Retry-After"] = str(services.limits.retry_after_s)
    return response


@router.get(
    "/metrics",
    summary="Prometheus metrics of all processes",
    response_class=Response,
    responses={**_PROMETHEUS, **errors(503)},
)
async def metrics(services: Service) -> Response:
    """Needs no key; every sample has the label `process`."""
    return Response(await services.backend.metrics(), media_type=CONTENT_TYPE)
