"""A stand-in for the server's HTTP interface that streams slowly and fails on request, to see what the page makes of it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from kblam_ray.facts import Fact
from kblam_ray.facts.fact import fact_id

MODEL = "demo-model"
REFUSAL = "I am sorry, no fact of the knowledge base answers this question."


@dataclass
class Double:
    """What the server knows and how it shall behave; tests change it while it runs.

    Attributes:
        failures: path of a request to the refusals that its next ones get: (status, error, headers).
        may_stream: cleared, answers stop after their first piece until it is set.
        breaks_off: answers end with an error event after their first piece.
        written_is_served: False: a write that waits runs out of time.
        key, admin_key: wanted in Authorization; None: nobody is asked.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = 3
    is_multi_valued: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, list[tuple[int, dict[str, Any], dict[str, str]]]] = field(default_factory=dict)
    may_stream: threading.Event = field(default_factory=threading.Event)
    breaks_off: bool = False
    written_is_served: bool = True
    key: str | None = None
    admin_key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_stream.set()

    def put(self, entity: str, property: str, value: str, metadata: str | None = None) -> str:
        """Add or change a fact; what happened: added, changed or unchanged."""
        identity = "entity,property,value" if self.is_multi_valued else "entity,property"
        id = str(fact_id(Fact(entity, property, value), identity))
        before = self.facts.get(id)
        self.facts[id] = {
            "fact_id": id,
            "entity": entity,
            "property": property,
            "value": value,
            "metadata": metadata,
        }
        return "added" if before is None else "unchanged" if before == self.facts[id] else "changed"

    def describe(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "uri": f"/tables/{name}",
            "version": self.version,
            "latest_version": self.version,
            "pinned": False,
            "num_facts": len(self.facts),
            "encoder": "all-MiniLM-L6-v2",
            "status": "ready",
            "lag_s": 0.0,
            **self.state,
        }

    def answer(self, question: str) -> tuple[str, list[dict[str, Any]]]:
        """Text and citations."""
        found = re.fullmatch(r"What is the (.+) of (.+)\?", question)
        cited = [
            fact for fact in self.facts.values() if found and (fact["property"], fact["entity"]) == tuple(found.groups())
        ]
        if not cited:
            return REFUSAL, []
        others = [fact for fact in self.facts.values() if fact["entity"] == cited[0]["entity"] and fact not in cited]
        told = " and ".join(fact["value"] for fact in cited)
        citations = [
            {**fact, "score": 0.618 / 9**place} for place, fact in enumerate([*cited, *others][:5])
        ]
        return f"The {cited[0]['property']} of {cited[0]['entity']} is {told}.", citations


def refusal(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **more):
    error = {"message": message, "type": "error", "param": None, "code": code, **more}
    return JSONResponse({"error": error}, status, headers)


def make_app(double: Double) -> FastAPI:
    """The endpoints that the page uses."""
    app = FastAPI()
    writing = ("POST", "PUT", "DELETE")

    @app.middleware("http")
    async def guard(request: Request, go_on):
        path = request.url.path
        if not path.startswith("/v1/"):
            return await go_on(request)
        if double.failures.get(path):
            status, error, headers = double.failures[path].pop(0)
            return JSONResponse({"error": error}, status, headers)
        if double.key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if given not in (double.key, double.admin_key):
                return refusal(401, "Incorrect API key provided", "invalid_api_key")
            if request.method in writing and "knowledge_bases" in path and given != double.admin_key:
                return refusal(403, "This key may not write", "permission_denied")
        return await go_on(request)

    @app.get("/v1/models")
    def models():
        ids = [MODEL, f"{MODEL}:capitals", f"{MODEL}:other"]
        return {"object": "list", "data": [{"id": id, "object": "model"} for id in ids]}

    @app.get("/v1/knowledge_bases/{name}")
    def describe(name: str):
        return double.describe(name)

    @app.put("/v1/knowledge_bases/{name}")
    async def pin(name: str, request: Request):
        double.state = {"pinned": (await request.json())["version"] is not None}
        return double.describe(name)

    @app.get("/v1/knowledge_bases/{name}/facts")
    def find(name: str, q: str = "", entity: str = "", property: str = "", limit: int = 100, after: str = ""):
        def is_wanted(fact):
            text = " ".join((fact["entity"], fact["property"], fact["value"])).casefold()
            wanted = (entity in ("", fact["entity"])) and (property in ("", fact["property"]))
            return q.casefold() in text and wanted and (not after or int(fact["fact_id"]) > int(after))

        rows = sorted(filter(is_wanted, double.facts.values()), key=lambda fact: int(fact["fact_id"]))
        page = rows[:limit]
        return {
            "data": page,
            "next": page[-1]["fact_id"] if len(rows) > limit else None,
            "kb_version": double.version,
        }

    def written(**counts: int):
        double.version += 1
        if not double.written_is_served:
            return refusal(503, "Not every replica serves it yet", "unavailable", kb_version=double.version)
        return {"kb_version": double.version, "added": 0, "changed": 0, "unchanged": 0, **counts}

    @app.post("/v1/knowledge_bases/{name}/facts")
    async def write(name: str, request: Request):
        if double.state.get("pinned"):
            return refusal(409, "The knowledge base is pinned", "conflict")
        happened = [double.put(**fact) for fact in (await request.json())["facts"]]
        return written(**{what: happened.count(what) for what in set(happened)})

    @app.delete("/v1/knowledge_bases/{name}/facts/{id}")
    def delete(name: str, id: str):
        del double.facts[id]
        return written(deleted=1)

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        asked = await request.json()
        double.asked.append(asked)
        text, citations = double.answer(asked["messages"][-1]["content"])
        has_kb = ":" in asked["model"]
        return StreamingResponse(stream(double, text, citations, has_kb), media_type="text/event-stream")

    return app


def stream(double: Double, text: str, citations: list[dict[str, Any]], has_kb: bool) -> Iterator[str]:
    """Events of an answer, a word at a time, with what servers may send besides: comments and other ends of lines."""

    def chunk(delta: dict[str, str], end: str = "\n\n", **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'choices': [choice], **more})}{end}"

    yield ": hello\n\n"
    yield chunk({"role": "assistant", "content": ""})
    for place, word in enumerate(re.findall(r"\s*\S+", text)):
        event = chunk({"content": word}, end="\r\n\r\n")
        yield event[:25]
        yield event[25:]
        if place == 0:
            if double.breaks_off:
                yield 'event: error\ndata: {"error": {"message": "The engine has stopped", "code": "generation_failed"}}\n\n'
                return
            # A generator whose client has left is closed at its next yield.
            while not double.may_stream.wait(0.05):
                yield ": waiting\n\n"
        time.sleep(0.005)
    end = {"index": 0, "delta": {}, "finish_reason": "stop"}
    refused = has_kb and not citations
    last = {"kb_version": double.version if has_kb else None, "refused": refused, "citations": citations}
    yield f"data: {json.dumps({'id': 'x', 'choices': [end]})}\n\n"
    yield f"data: {json.dumps({'id': 'x', 'choices': [], **last})}\n\n"
    yield "data: [DONE]\n\n"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Run an app on a loopback port of its own; the address, with a slash at its end."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server has not started"
        assert time.monotonic() < deadline, "the server has not started in time"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
