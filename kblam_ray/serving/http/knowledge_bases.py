"""`/v1/knowledge_bases`: which tables are served, under which names, at which versions."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import Request
from starlette.responses import Response

from kblam_ray.serving.http.naming import KbPath, unknown_kb
from kblam_ray.serving.http.routes import asking_router, writing_router
from kblam_ray.serving.http.schema.errors import errors
from kblam_ray.serving.http.schema.knowledge import (
    KnowledgeBaseBody,
    KnowledgeBaseList,
    KnowledgeBaseRemoved,
    TableChoice,
)
from kblam_ray.serving.http.services import Service, TimeoutQuery, WaitQuery, note, reply, within, write_deadline
from kblam_ray.serving.wanted import KbDescription

TAG = "knowledge bases"

asking = asking_router(TAG)
writing = writing_router(TAG)

PATH = "/v1/knowledge_bases/{name}"


@asking.get(
    "/v1/knowledge_bases",
    summary="List knowledge bases",
    response_model=KnowledgeBaseList,
    responses=errors(400, 401, 403, 503),
)
async def list_knowledge_bases(services: Service) -> Response:
    """All that are served, by name."""
    known = (await services.backend.overview()).knowledge_bases
    return reply(KnowledgeBaseList(object="list", data=[_body(known[name]) for name in sorted(known)]))


@asking.get(
    PATH,
    summary="Look up a knowledge base",
    response_model=KnowledgeBaseBody,
    responses=errors(400, 401, 403, 404, 503),
)
async def get_knowledge_base(name: KbPath, services: Service) -> Response:
    """Which version is served and which is the newest."""
    known = (await services.backend.overview()).knowledge_bases.get(name)
    if known is None:
        raise unknown_kb(name)
    return reply(_body(known))


@writing.put(
    PATH,
    summary="Serve a table, follow it, or go to another of its versions",
    response_model=KnowledgeBaseBody,
    responses=errors(400, 401, 403, 404, 409, 413, 422, 429, 503),
)
async def put_knowledge_base(
    name: KbPath,
    body: TableChoice,
    request: Request,
    services: Service,
    wait: WaitQuery = False,
    timeout_s: TimeoutQuery = 30,
) -> Response:
    """The table is checked first: nothing changes if it cannot be served. A version pins: that is a rollback, too."""
    note(request, kb=name)
    work = services.backend.put_knowledge_base(name, body.uri, body.version, wait=wait, timeout_s=timeout_s)
    served = await within(work, write_deadline(services, wait, timeout_s))
    note(request, kb_version=served.version)
    return reply(_body(served))


@writing.delete(
    PATH,
    summary="Serve it no more; its table stays",
    response_model=KnowledgeBaseRemoved,
    responses=errors(400, 401, 403, 404, 503),
)
async def delete_knowledge_base(name: KbPath, request: Request, services: Service) -> Response:
    """Running answers are finished."""
    note(request, kb=name)
    deadline = asyncio.get_running_loop().time() + services.limits.request_timeout_s
    await within(services.backend.remove_knowledge_base(name), deadline)
    return reply(KnowledgeBaseRemoved(name=name, deleted=True))


def _body(known: KbDescription) -> KnowledgeBaseBody:
    return KnowledgeBaseBody(**asdict(known))
