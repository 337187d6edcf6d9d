"""`GET /v1/models` and `GET /v1/models/{model}`."""

from __future__ import annotations

from starlette.responses import Response

from kblam_ray.errors import NotServedError
from kblam_ray.serving.http.naming import kb_of
from kblam_ray.serving.http.routes import asking_router
from kblam_ray.serving.http.schema.errors import errors
from kblam_ray.serving.http.schema.operations import ModelBody, ModelList
from kblam_ray.serving.http.services import Service, Services, reply

router = asking_router("models")


@router.get(
    "/v1/models",
    summary="List models",
    response_model=ModelList,
    responses=errors(400, 401, 403, 503),
)
async def list_models(services: Service) -> Response:
    """The base model alone, and with each knowledge base."""
    base = services.backend.model_name
    served = sorted((await services.backend.overview()).knowledge_bases)
    names = [base, *(f"{base}:{name}" for name in served)]
    return reply(ModelList(object="list", data=[_model(name, services) for name in names]))


@router.get(
    "/v1/models/{model:path}",
    summary="Look up a model",
    response_model=ModelBody,
    responses=errors(400, 401, 403, 404, 503),
)
async def retrieve_model(model: str, services: Service) -> Response:
    """One model, at a version of its knowledge base where the name has one."""
    kb = kb_of(model, services.backend.model_name)
    if kb is not None:
        known = (await services.backend.overview()).knowledge_bases.get(kb.name)
        latest = None if known is None else known.latest_version
        if known is None or (kb.version is not None and (latest is None or kb.version > latest)):
            raise NotServedError(
                f"there is no model {model!r}", where="model", help="GET /v1/models lists what there is"
            )
    return reply(_model(model, services))


def _model(name: str, services: Services) -> ModelBody:
    return ModelBody(id=name, object="model", created=services.started_at, owned_by="kblam-ray")
