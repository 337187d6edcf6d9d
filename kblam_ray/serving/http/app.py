"""The application: endpoints, errors, keys, limits, logs and the web page over one backend."""

from __future__ import annotations

from fastapi import FastAPI

from kblam_ray.serving.backend import Backend
from kblam_ray.serving.http import chat, facts, knowledge_bases, models, operations
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.http.document import install_document
from kblam_ray.serving.http.errors import install_handlers
from kblam_ray.serving.http.limiting import BodyLimit
from kblam_ray.serving.http.observing import Observer
from kblam_ray.serving.http.page import mount_page
from kblam_ray.serving.http.schema.chat_request import Grounding
from kblam_ray.serving.http.services import Services
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import LimitSettings

ROUTERS = (
    chat.router,
    models.router,
    knowledge_bases.asking,
    knowledge_bases.writing,
    facts.asking,
    facts.writing,
    operations.router,
)


def create_app(
    backend: Backend, limits: LimitSettings, keys: Keys, metrics: Metrics, *, grounding: Grounding = "cite"
) -> FastAPI:
    """The ASGI application over a backend.

    Args:
        backend: answers and writes; started and closed by whoever made it.
        keys: empty ones let clients of this machine only come in.
        metrics: of this process; requests are counted here, answers where they are made.
        grounding: of questions to a knowledge base that name none.
    """
    app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    services = Services(backend, limits, keys, grounding)
    app.state.services = services
    for router in ROUTERS:
        # Flat, not included: including would match every path twice.
        app.router.routes.extend(router.routes)
    install_handlers(app, limits.retry_after_s)
    install_document(app, services)
    mount_page(app)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_middleware(Observer, keys=keys, metrics=metrics, retry_after_s=limits.retry_after_s)
    return app
