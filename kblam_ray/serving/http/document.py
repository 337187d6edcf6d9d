"""The OpenAPI document at `/openapi.json`, with this server's own limits in it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import kblam_ray
from kblam_ray.serving.http.routes import AskingRoute, WritingRoute
from kblam_ray.serving.http.schema.chat_answer import ChatCompletionChunk
from kblam_ray.serving.http.services import Services

DESCRIPTION = """\
Answers from live knowledge bases, in OpenAI's schema: the `openai` clients work unchanged. A model is named `base`,
`base:kb` or `base:kb@version`; answers say which version they come from and which facts they attended to."""

SCHEME = "key"


def install_document(app: FastAPI, services: Services) -> None:
    """Have `app` describe itself."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, services)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, services: Services) -> dict[str, Any]:
    document = get_openapi(title="kblam-ray", version=kblam_ray.__version__, description=DESCRIPTION, routes=app.routes)
    schemas = document["components"]["schemas"]
    schemas["ChatRequest"]["properties"]["n"]["anyOf"][0]["maximum"] = services.limits.max_choices
    for name in ("NewFacts", "FactNames"):
        schemas[name]["properties"]["facts"]["maxItems"] = services.limits.max_facts
    chunk = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    for name, part in {**chunk.pop("$defs"), "ChatCompletionChunk": chunk}.items():
        schemas.setdefault(name, part)
    _forget_validation_errors(document)
    if services.keys:
        document["components"]["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
        for route in app.routes:
            if isinstance(route, AskingRoute | WritingRoute):
                for method in route.methods or ():
                    document["paths"][route.path_format][method.lower()]["security"] = [{SCHEME: []}]
    return document


def _forget_validation_errors(document: dict[str, Any]) -> None:
    """Take out the framework's own 422, which it adds to operations that name none: ours have another body."""
    for operation in (each for path in document["paths"].values() for each in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
