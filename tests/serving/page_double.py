"""A stand-in for model and tables behind the real HTTP interface: it answers slowly and fails on request."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI

from kblam_ray.errors import ConflictError, GenerationError, KblamError, NotServedError
from kblam_ray.facts import Fact
from kblam_ray.facts.fact import fact_id
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.http.app import create_app
from kblam_ray.serving.messages import (
    Choice,
    Event,
    FactFilter,
    FactsPage,
    Finished,
    KbRef,
    Piece,
    Question,
    Started,
    Written,
)
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import LimitSettings
from kblam_ray.serving.wanted import KbDescription, KbSpec, Overview, Wanted

REFUSAL = "I am sorry, no fact of the knowledge base answers this question."


class Double:
    """A backend with one table under two names; tests change its attributes while it serves.

    Attributes:
        is_multi_valued: the identity rule of the table is all three fields.
        description: what differs in the description of the knowledge bases.
        failures: raised by the next questions, one each.
        breaks_off: an answer fails after its first piece.
        may_stream: while cleared, answers wait after their first piece.
        is_served: False: a write that waits runs out of time.
        asked: every question so far; `num_cancelled`: those that were hung up on.
    """

    model_name = "demo-model"

    def __init__(self) -> None:
        self.facts: dict[int, dict[str, Any]] = {}
        self.version = 3
        self.is_multi_valued = False
        self.description: dict[str, Any] = {}
        self.failures: list[KblamError] = []
        self.breaks_off = False
        self.may_stream = threading.Event()
        self.may_stream.set()
        self.is_served = True
        self.asked: list[Question] = []
        self.num_cancelled = 0

    def put(self, entity: str, property: str, value: str, metadata: str | None = None) -> str:
        """Add or change a fact, without another version; what happened: added, changed or unchanged."""
        identity = "entity,property,value" if self.is_multi_valued else "entity,property"
        id = fact_id(Fact(entity, property, value), identity)
        row = {"entity": entity, "property": property, "value": value, "metadata": metadata}
        before, self.facts[id] = self.facts.get(id), {"fact_id": str(id), **row}
        return "added" if before is None else "unchanged" if before == self.facts[id] else "changed"

    def _describe(self, name: str) -> KbDescription:
        known = KbDescription(
            name, f"/tables/{name}", self.version, self.version, False, len(self.facts), "MiniLM", "ready", 0.0
        )
        return replace(known, **self.description)

    async def stream(self, question: Question) -> AsyncIterator[Event]:
        if self.failures:
            raise self.failures.pop(0)
        self.asked.append(question)
        version = self.version if question.kb else None
        text, cited = self._answer(question)
        yield Started(version, 7)
        is_done = False
        try:
            for place, word in enumerate(re.findall(r"\s*\S+", text)):
                yield Piece(0, word)
                if place == 0 and self.breaks_off:
                    raise GenerationError("the engine has stopped", help="ask again")
                while not self.may_stream.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.002)
            is_done = True
        finally:
            self.num_cancelled += not is_done and not self.breaks_off
        is_refused = question.kb is not None and not cited
        yield Finished((Choice(text, "stop", is_refused, cited, 9),), version, 7)

    def _answer(self, question: Question) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        found = re.fullmatch(r"What is the (.+) of (.+)\?", question.messages[-1]["content"])
        asked = found.groups() if found else None
        rows = list(self.facts.values())
        cited = [row for row in rows if (row["property"], row["entity"]) == asked]
        if not cited or question.kb is None:
            return REFUSAL, ()
        others = [row for row in rows if row["entity"] == cited[0]["entity"] and row not in cited]
        told = " and ".join(row["value"] for row in cited)
        shares = [{**row, "score": 0.618 / 9**place} for place, row in enumerate([*cited, *others])]
        text = f"The {cited[0]['property']} of {cited[0]['entity']} is {told}."
        return text, tuple(shares[: question.max_citations]) if question.grounding != "off" else ()

    async def complete(self, question: Question) -> Finished:
        raise AssertionError("the page streams")

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage:
        def is_found(id: int, row: dict[str, Any]) -> bool:
            text = " ".join((row["entity"], row["property"], row["value"])).casefold()
            is_named = which.entity in (None, row["entity"]) and which.property in (None, row["property"])
            return is_named and (which.text or "").casefold() in text and (not which.after or id > int(which.after))

        rows = [row for id, row in sorted(self.facts.items()) if is_found(id, row)]
        page = tuple(
            {**row, "metadata": row["metadata"] and json.loads(row["metadata"])} for row in rows[: which.limit]
        )
        return FactsPage(page, page[-1]["fact_id"] if len(rows) > which.limit else None, self.version)

    async def write_facts(
        self, name: str, facts: Sequence[Mapping[str, Any]], *, wait: bool = False, timeout_s: float = 30
    ) -> Written:
        if self.description.get("pinned"):
            raise ConflictError("the knowledge base is pinned", help="follow the newest version")
        happened = [self.put(**fact) for fact in facts]
        self.version += happened != ["unchanged"]
        counts = {what: happened.count(what) for what in ("added", "changed", "unchanged")}
        return Written(self.version, **counts, is_served=self.is_served)

    async def delete_facts(
        self,
        name: str,
        *,
        identities: Sequence[Mapping[str, str]] = (),
        fact_ids: Sequence[int] = (),
        wait: bool = False,
        timeout_s: float = 30,
    ) -> Written:
        for id in fact_ids:
            if self.facts.pop(id, None) is None:
                raise NotServedError("there is no such fact", help="look it up again")
        self.version += 1
        return Written(self.version, deleted=len(fact_ids), is_served=self.is_served)

    async def put_knowledge_base(
        self, name: str, uri: str, version: int | None, *, wait: bool = False, timeout_s: float = 30
    ) -> KbDescription:
        self.description = {"pinned": version is not None}
        return self._describe(name)

    async def remove_knowledge_base(self, name: str) -> None:
        raise AssertionError("the page removes none")

    async def overview(self) -> Overview:
        names = ("capitals", "others")
        wanted = Wanted(1, {name: KbSpec(f"/tables/{name}") for name in names})
        return Overview(wanted, {name: self._describe(name) for name in names}, {"one": "answerer"}, {})

    async def metrics(self) -> str:
        return ""


def app_of(backend: Any, keys: Keys | None = None, limits: LimitSettings | None = None) -> FastAPI:
    """The real application over a backend."""
    return create_app(backend, limits or LimitSettings(), keys or Keys(), Metrics("page", "gateway"))


@contextmanager
def served(app: FastAPI, backend: Any = None) -> Iterator[str]:
    """Run an app on a loopback port of its own, its backend on the same event loop if it is to be started and closed.

    Yields:
        the address, with a slash at its end.
    """
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)

    async def serve() -> None:
        if backend is None:
            return await server.serve()
        async with backend:
            await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server has not started"
        assert time.monotonic() < deadline, "the server has not started in time"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        # Browsers keep connections open that a graceful end would wait for.
        server.should_exit = server.force_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server has not stopped in time"
