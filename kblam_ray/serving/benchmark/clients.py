"""Closed-loop clients: each asks its next question when the last one is answered, over HTTP or in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from kblam_ray.errors import GenerationError
from kblam_ray.serving.backend import Backend
from kblam_ray.serving.messages import Finished, KbRef, Piece, Question, Sampling


@dataclass(frozen=True)
class Answered:
    """One answer as a client saw it; times are seconds from asking."""

    question: str
    text: str
    kb_version: int | None
    refused: bool
    citations: Sequence[Mapping[str, Any]]
    first_token_s: float
    seconds: float


Ask = Callable[[str], Awaitable[Answered]]


@dataclass(frozen=True)
class Load:
    """What a number of clients got in a time."""

    answers: list[Answered]
    seconds: float

    @property
    def per_second(self) -> float:
        return len(self.answers) / self.seconds

    def first_token_s(self, quantile: float) -> float:
        return of_sorted([answer.first_token_s for answer in self.answers], quantile)

    def total_s(self, quantile: float) -> float:
        return of_sorted([answer.seconds for answer in self.answers], quantile)


def of_sorted(times: Iterable[float], quantile: float) -> float:
    """A quantile by nearest rank."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


async def closed_loop(ask: Ask, questions: list[str], num_clients: int, goes_on: Callable[[int], bool]) -> Load:
    """Ask the questions round by round with some clients until `goes_on` (of requests begun so far) is false."""
    begun, answers = 0, []

    async def client() -> None:
        nonlocal begun
        while goes_on(begun):
            begun += 1
            answers.append(await ask(questions[begun % len(questions)]))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client())
    return Load(answers, time.perf_counter() - started)


def in_process(backend: Backend, kb: str, grounding: str, max_tokens: int, *, stream: bool = True) -> Ask:
    """Asks a backend without HTTP, for a stream or for whole answers."""

    async def ask(question: str) -> Answered:
        started, first_s = time.perf_counter(), None
        asked = Question(
            request_id="benchmark",
            messages=({"role": "user", "content": question},),
            kb=KbRef(kb),
            grounding=grounding,
            sampling=Sampling(max_tokens=max_tokens),
        )
        if not stream:
            finished = await backend.complete(asked)
            seconds, choice = time.perf_counter() - started, finished.choices[0]
            told = choice.text, finished.kb_version, choice.refused, choice.citations
            return Answered(question, *told, seconds, seconds)
        async for event in backend.stream(asked):
            if isinstance(event, Piece):
                first_s = first_s or time.perf_counter() - started
            elif isinstance(event, Finished):
                seconds, choice = time.perf_counter() - started, event.choices[0]
                told = choice.text, event.kb_version, choice.refused, choice.citations
                return Answered(question, *told, first_s or seconds, seconds)
        raise GenerationError("an answer without an end", where=question, help="see the engine's log")

    return ask


@asynccontextmanager
async def over_http(
    address: str, model: str, grounding: str, max_tokens: int, *, stream: bool = True
) -> AsyncIterator[Ask]:
    """Asks a server over connections that are kept, for a stream or for whole answers."""
    settings = {"model": model, "stream": stream, "grounding": grounding, "max_tokens": max_tokens}
    # aiohttp (Ray brings it) costs the load generator a fraction of what the official client does.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def ask(question: str) -> Answered:
            body = {**settings, "messages": [{"role": "user", "content": question}]}
            started, first_s, text, last = time.perf_counter(), None, [], {}
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise _failed(question, response.status, await response.text())
                if not stream:
                    whole = await response.json()
                    seconds = time.perf_counter() - started
                    said = whole["choices"][0]["message"]["content"]
                    return Answered(question, said, *_grounds(whole), seconds, seconds)
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise _failed(question, 200, line.decode())
                    for choice in chunk["choices"]:
                        if piece := choice["delta"].get("content"):
                            first_s = first_s or time.perf_counter() - started
                            text.append(piece)
                    if "kb_version" in chunk:
                        last = chunk
            seconds = time.perf_counter() - started
            if not last:
                raise _failed(question, 200, "the stream broke off")
            return Answered(question, "".join(text), *_grounds(last), first_s or seconds, seconds)

        yield ask


async def post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON body, whatever its status."""
    async with aiohttp.ClientSession() as session, session.post(f"{address}{path}", json=body) as response:
        return {**(await response.json()), "status": response.status}


def _grounds(said: dict[str, Any]) -> tuple[int | None, bool, list[dict[str, Any]]]:
    return said["kb_version"], said["refused"], said["citations"]


def _failed(question: str, status: int, told: str) -> GenerationError:
    return GenerationError(f"status {status}: {told[:500]}", where=question, help="see the server's log")
