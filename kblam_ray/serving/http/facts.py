"""`/v1/knowledge_bases/{name}/facts`: look facts up, write them, delete them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sized
from typing import Annotated, Any

from fastapi import Query, Request
from starlette.responses import Response

from kblam_ray.errors import NotServedError, TooLargeError
from kblam_ray.serving.http.knowledge_bases import PATH
from kblam_ray.serving.http.naming import FACT_ID_PATTERN, FactIdPath, KbPath, unknown_kb
from kblam_ray.serving.http.routes import asking_router, writing_router
from kblam_ray.serving.http.schema.base import MAX_INT64, metadata_object
from kblam_ray.serving.http.schema.errors import errors
from kblam_ray.serving.http.schema.knowledge import FactBody, FactList, FactNames, FactsDeleted, FactsWritten, NewFacts
from kblam_ray.serving.http.services import (
    Service,
    Services,
    TimeoutQuery,
    WaitQuery,
    note,
    reply,
    served_in_time,
    within,
    write_deadline,
)
from kblam_ray.serving.messages import FactFilter, KbRef, Written

TAG = "facts"
MAX_PAGE = 1_000

asking = asking_router(TAG)
writing = writing_router(TAG)

_WRITE_ERRORS = errors(400, 401, 403, 404, 409, 413, 422, 429, 503)


@asking.get(
    f"{PATH}/facts",
    summary="Look facts up",
    response_model=FactList,
    responses=errors(400, 401, 403, 404, 409, 422, 429, 503),
)
async def list_facts(
    name: KbPath,
    request: Request,
    services: Service,
    q: Annotated[str, Query(description="occurs in entity, property or value, in any case")] = "",
    entity: Annotated[str, Query(description="is the entity")] = "",
    property: Annotated[str, Query(description="is the property")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="most facts")] = 100,
    after: Annotated[str, Query(pattern=rf"{FACT_ID_PATTERN}|^$", description="`next` of the page before")] = "",
) -> Response:
    """By ascending id; `next` of a page is `after` of the following one. Every page says its version."""
    note(request, kb=name)
    which = FactFilter(q or None, entity or None, property or None, limit, after or None)
    try:
        page = await within(services.backend.find_facts(KbRef(name), which), write_deadline(services, False, 0))
    except NotServedError:
        raise unknown_kb(name) from None
    note(request, kb_version=page.kb_version)
    return reply(FactList(data=[_fact(each) for each in page.data], next=page.next, kb_version=page.kb_version))


@writing.post(
    f"{PATH}/facts",
    summary="Write facts",
    response_model=FactsWritten,
    responses=_WRITE_ERRORS,
)
async def write_facts(
    name: KbPath,
    body: NewFacts,
    request: Request,
    services: Service,
    wait: WaitQuery = False,
    timeout_s: TimeoutQuery = 30,
) -> Response:
    """All are embedded and committed at once, or none. A fact of the same identity is replaced."""
    _check_count(body.facts, services)
    facts = [each.model_dump(exclude_none=True) for each in body.facts]
    work = services.backend.write_facts(name, facts, wait=wait, timeout_s=timeout_s)
    done = await _written(work, name, request, services, wait, timeout_s)
    return reply(
        FactsWritten(kb_version=done.kb_version, added=done.added, changed=done.changed, unchanged=done.unchanged)
    )


@writing.post(
    f"{PATH}/facts/delete",
    summary="Delete facts by name",
    response_model=FactsDeleted,
    responses=_WRITE_ERRORS,
)
async def delete_facts(
    name: KbPath,
    body: FactNames,
    request: Request,
    services: Service,
    wait: WaitQuery = False,
    timeout_s: TimeoutQuery = 30,
) -> Response:
    """All at once. Facts that are not there are passed over."""
    _check_count(body.facts, services)
    names = [each.model_dump(exclude_none=True) for each in body.facts]
    work = services.backend.delete_facts(name, identities=names, wait=wait, timeout_s=timeout_s)
    done = await _written(work, name, request, services, wait, timeout_s)
    return reply(FactsDeleted(kb_version=done.kb_version, deleted=done.deleted))


@writing.delete(
    f"{PATH}/facts/{{fact_id:fact_id}}",
    summary="Delete a fact",
    response_model=FactsDeleted,
    responses=errors(400, 401, 403, 404, 409, 422, 429, 503),
)
async def delete_fact(
    name: KbPath,
    fact_id: FactIdPath,
    request: Request,
    services: Service,
    wait: WaitQuery = False,
    timeout_s: TimeoutQuery = 30,
) -> Response:
    """The fact of an id, as facts and citations show it."""
    number = int(fact_id)
    if not -MAX_INT64 - 1 <= number <= MAX_INT64:
        raise NotServedError("there is no such fact", where="fact_id", help="ids are numbers of 64 bits")
    work = services.backend.delete_facts(name, fact_ids=[number], wait=wait, timeout_s=timeout_s)
    done = await _written(work, name, request, services, wait, timeout_s)
    return reply(FactsDeleted(kb_version=done.kb_version, deleted=done.deleted))


async def _written(
    work: Awaitable[Written], name: str, request: Request, services: Services, wait: bool, timeout_s: float
) -> Written:
    note(request, kb=name)
    written = await within(work, write_deadline(services, wait, timeout_s))
    note(request, kb_version=written.kb_version)
    return served_in_time(written, timeout_s)


def _check_count(facts: Sized, services: Services) -> None:
    most = services.limits.max_facts
    if len(facts) > most:
        raise TooLargeError(
            f"{len(facts):,} facts, more than {most:,}",
            where="facts",
            help="send less at a time, or use jobs/embed_kb.py; nothing was written",
        )


def _fact(given: Mapping[str, Any]) -> FactBody:
    return FactBody(**{**given, "metadata": metadata_object(given.get("metadata"))})
