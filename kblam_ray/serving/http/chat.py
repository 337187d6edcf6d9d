"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from uuid import uuid4

from fastapi import Request
from starlette.responses import Response

from kblam_ray.errors import GenerationError, InputError, KblamError, NotServedError
from kblam_ray.serving.http import sse
from kblam_ray.serving.http.answers import Answering, usage_of
from kblam_ray.serving.http.errors import body_of
from kblam_ray.serving.http.naming import kb_of
from kblam_ray.serving.http.routes import asking_router
from kblam_ray.serving.http.schema.chat_answer import ChatCompletion
from kblam_ray.serving.http.schema.chat_request import ChatRequest
from kblam_ray.serving.http.schema.errors import errors
from kblam_ray.serving.http.services import (
    Service,
    Services,
    note,
    out_of_time,
    reply,
    while_connected,
    within,
)
from kblam_ray.serving.logs import request_id_var
from kblam_ray.serving.messages import Event, Finished, Piece, Question, Sampling, Started

router = asking_router("chat")

_CHUNK = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("ChatCompletionChunk", "ErrorBody")]}
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["message", "error"]},
        "data": {
            "anyOf": [
                {"const": "[DONE]"},
                {"type": "string", "contentMediaType": "application/json", "contentSchema": _CHUNK},
            ]
        },
    },
    "required": ["data"],
}
_STREAMED = {
    "description": "An answer; with `stream` its events: chunks, then `[DONE]`, or one named `error` that ends them.",
    "content": {sse.MEDIA_TYPE: {"schema": _EVENT}},
}


class ModelNotFoundError(NotServedError):
    """The model of a request names nothing that is served."""

    code = "model_not_found"


@router.post(
    "/v1/chat/completions",
    summary="Answer a question",
    response_model=ChatCompletion,
    responses={200: _STREAMED, **errors(400, 401, 403, 404, 409, 413, 422, 429, 503)},
)
async def create_chat_completion(body: ChatRequest, request: Request, services: Service) -> Response:
    """An answer with the facts that it attended to; in events while it is written with `stream: true`."""
    deadline = asyncio.get_running_loop().time() + services.limits.request_timeout_s
    question = question_of(body, services)
    note(request, model=body.model, grounding=question.grounding, stream=bool(body.stream))
    answering = Answering(
        id=f"chatcmpl-{uuid4().hex}",
        model=body.model,
        created=int(time.time()),
        fingerprint=services.fingerprint,
        num_choices=question.sampling.num_choices,
        has_logprobs=question.sampling.num_logprobs is not None,
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    try:
        if body.stream:
            events = services.backend.stream(question)
            started = await _first(events, request, deadline)
            chunks = _chunks(answering, started, events, request, deadline)
            return sse.EventStream(chunks, on_end=lambda: _close(events))
        finished = await while_connected(request.receive, within(services.backend.complete(question), deadline))
    except NotServedError as error:
        raise ModelNotFoundError(error.what, where="model", help=error.help) from None
    _note_end(request, finished)
    return reply(answering.whole(finished))


def question_of(body: ChatRequest, services: Services) -> Question:
    """The question that a body asks.

    Raises:
        ModelNotFoundError: its model is no name of ours.
        InputError: more choices than the server gives.
    """
    try:
        kb = kb_of(body.model, services.backend.model_name)
    except NotServedError as error:
        raise ModelNotFoundError(error.what, where="model", help=error.help) from None
    most = services.limits.max_choices
    if body.n is not None and body.n > most:
        raise InputError(f"{body.n} choices, more than {most}", where="n", help=f"ask for at most {most}")
    limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    return Question(
        request_id=request_id_var.get() or uuid4().hex,
        messages=tuple(
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in body.messages
        ),
        kb=kb,
        grounding=body.grounding or (services.grounding if kb else "off"),
        selection=body.selection,
        max_citations=5 if body.max_citations is None else body.max_citations,
        min_kb_version=body.min_kb_version,
        sampling=Sampling(
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_tokens=min(limits, default=None),
            stop=tuple(body.stop or ()),
            seed=body.seed,
            num_choices=body.n or 1,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
    )


async def _first(events: AsyncIterator[Event], request: Request, deadline: float) -> Started:
    """The first event: what is wrong with a request is told before it, with a status of its own."""
    try:
        started = await while_connected(request.receive, within(anext(events), deadline))
    except StopAsyncIteration:
        raise _cut_off() from None
    except BaseException:
        await _close(events)
        raise
    if not isinstance(started, Started):
        await _close(events)
        raise _cut_off()
    return started


async def _chunks(
    answering: Answering, started: Started, events: AsyncIterator[Event], request: Request, deadline: float
) -> AsyncGenerator[bytes, None]:
    """The rest of an answer as server-sent events. An error is an event, too, the last one."""
    note(request, kb_version=started.kb_version, prompt_tokens=started.prompt_tokens, outcome="client_gone")
    try:
        for chunk in answering.first_chunks():
            yield sse.event(chunk.model_dump_json(exclude_unset=True))
        while True:
            # Not around the loop: a deadline must not fall while somebody else's code runs, at a `yield`.
            happened = await _next(events, deadline)
            if isinstance(happened, Piece):
                yield sse.event(answering.chunk(happened).model_dump_json(exclude_unset=True))
            elif isinstance(happened, Finished):
                break
        for chunk in answering.last_chunks(happened):
            yield sse.event(chunk.model_dump_json(exclude_unset=True))
        _note_end(request, happened)
        yield sse.DONE
    except KblamError as error:
        note(request, outcome=error.code)
        yield sse.event(body_of(error).model_dump_json(exclude_unset=True), "error")


async def _next(events: AsyncIterator[Event], deadline: float) -> Event:
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(events)
    except TimeoutError:
        raise out_of_time() from None
    except StopAsyncIteration:
        raise _cut_off() from None


async def _close(events: Any) -> None:
    if hasattr(events, "aclose"):
        await events.aclose()


def _cut_off() -> GenerationError:
    return GenerationError("the answer broke off", help="ask again; the server's log says why")


def _note_end(request: Request, finished: Finished) -> None:
    usage = usage_of(finished)
    note(
        request,
        kb_version=finished.kb_version,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        refused=finished.choices[0].refused,
        outcome=None,
    )
