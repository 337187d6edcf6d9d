"""A backend in memory that follows `Backend` to the letter, with delays and failures on demand, and servers over it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from kblam_ray.errors import (
    ConflictError,
    InputError,
    KblamError,
    NotServedError,
    NotServedInTimeError,
    TableNotFoundError,
)
from kblam_ray.facts import Fact, fact_id
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
    TokenLogprob,
    Written,
)
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import LimitSettings
from kblam_ray.serving.wanted import KbDescription, KbSpec, Overview, Wanted

MODEL = "tiny"
KB = "capitals"
CHAT = "/v1/chat/completions"
FACTS_PATH = f"/v1/knowledge_bases/{KB}/facts"
URI = "/tables/capitals"
OTHER_URI = "s3://tables/rivers"
ASKING_KEY, ADMIN_KEY = "sk-asking-1", "sk-admin-1"
KEYS = Keys.of(asking=[ASKING_KEY, "sk-asking-2"], admin=[ADMIN_KEY])

Row = dict[str, Any]
State = dict[int, Row]


def fact(entity: str, property: str, value: str, **metadata: Any) -> Row:
    """A live row; metadata is JSON text, as tables keep it."""
    return {
        "entity": entity,
        "property": property,
        "value": value,
        "metadata": json.dumps(metadata) if metadata else None,
    }


FACTS = [
    fact("Kenya", "capital", "Nairobi", source="atlas"),
    fact("France", "capital", "Paris"),
    fact("Kenya", "currency code", "KES"),
]


def id_of(row: Mapping[str, Any]) -> int:
    """The id that the fact has in a real table, too."""
    return fact_id(Fact(row["entity"], row["property"], row.get("value", "-")))


@dataclass
class Failures:
    """What goes wrong.

    Attributes:
        before: raised instead of the first event, or by any other method.
        after_pieces: this many pieces come, then `error`.
        unserved: writes are committed and never served.
        replicas: processes that answer.
    """

    before: BaseException | None = None
    error: BaseException | None = None
    after_pieces: int = 0
    unserved: bool = False
    replicas: int = 1


@dataclass
class MemoryBackend:
    """Tables of facts by URI, each a list of versions; knowledge bases by name.

    Attributes:
        gate: pieces of answers come only while it is set.
        questions: asked so far.
        num_running: answers in work; 0 again after every cancel.
        num_cancelled: answers that were given up before they were finished.
    """

    tables: dict[str, list[State]] = field(default_factory=dict)
    served: dict[str, KbSpec] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    questions: list[Question] = field(default_factory=list)
    num_running: int = 0
    num_cancelled: int = 0
    model_name: str = MODEL

    async def stream(self, question: Question) -> AsyncIterator[Event]:
        self.questions.append(question)
        self._fail()
        version, facts = self._facts(question.kb, question.min_kb_version)
        choice = _answer(question, facts)
        self.num_running += 1
        is_finished = False
        try:
            yield Started(version, 7)
            words = re.findall(r"\s*\S+", choice.text)
            for number in range(question.sampling.num_choices):
                for position, word in enumerate(words):
                    if self.failures.error is not None and position >= self.failures.after_pieces:
                        raise self.failures.error
                    await self.gate.wait()
                    yield Piece(number, word, choice.logprobs[position : position + 1])
            is_finished = True
            yield Finished((choice,) * question.sampling.num_choices, version, 7)
        finally:
            self.num_running -= 1
            self.num_cancelled += not is_finished

    async def complete(self, question: Question) -> Finished:
        async for event in self.stream(question):
            if isinstance(event, Finished):
                return event
        raise AssertionError("no end")

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage:
        self._fail()
        version, facts = self._facts(kb, None)
        text = (which.text or "").casefold()
        found = [
            {"fact_id": str(number), **row}
            for number, row in sorted(facts.items())
            if (which.after is None or number > int(which.after))
            and (which.entity in (None, row["entity"]))
            and (which.property in (None, row["property"]))
            and any(text in row[name].casefold() for name in ("entity", "property", "value"))
        ]
        page = found[: which.limit]
        assert version is not None
        return FactsPage(tuple(page), page[-1]["fact_id"] if len(found) > len(page) else None, version)

    async def write_facts(
        self, name: str, facts: Sequence[Mapping[str, Any]], *, wait: bool = False, timeout_s: float = 30
    ) -> Written:
        versions = self._writable(name)
        old = versions[-1]
        new = old | {id_of(row): {"metadata": None, **row} for row in facts}
        added = len(new) - len(old)
        changed = sum(number in old and old[number] != row for number, row in new.items())
        return self._commit(versions, new, wait, added=added, changed=changed, unchanged=len(facts) - added - changed)

    async def delete_facts(
        self,
        name: str,
        *,
        identities: Sequence[Mapping[str, str]] = (),
        fact_ids: Sequence[int] = (),
        wait: bool = False,
        timeout_s: float = 30,
    ) -> Written:
        versions = self._writable(name)
        gone = {*map(id_of, identities), *fact_ids} & versions[-1].keys()
        if not gone and fact_ids:
            raise NotServedError("there is no such fact", where=f"fact {fact_ids[0]}", help="look it up")
        new = {number: row for number, row in versions[-1].items() if number not in gone}
        return self._commit(versions, new, wait, deleted=len(gone))

    async def put_knowledge_base(
        self, name: str, uri: str, version: int | None, *, wait: bool = False, timeout_s: float = 30
    ) -> KbDescription:
        self._fail()
        versions = self.tables.get(uri)
        if versions is None or (version is not None and version >= len(versions)):
            raise TableNotFoundError("there is no table with this version", where=uri, help="write one")
        self.served[name] = KbSpec(uri, version)
        if wait and self.failures.unserved:
            raise NotServedInTimeError(len(versions) - 1 if version is None else version, timeout_s)
        return self._describe(name)

    async def remove_knowledge_base(self, name: str) -> None:
        self._fail()
        if self.served.pop(name, None) is None:
            raise NotServedError(f"there is no knowledge base {name!r}", where="name", help="list them")

    async def overview(self) -> Overview:
        self._fail()
        processes = {"gateway-1": "gateway", **{f"answerer-{n}": "answerer" for n in range(self.failures.replicas)}}
        known = {name: self._describe(name) for name in self.served}
        return Overview(Wanted(1, dict(self.served)), known, processes, {})  # type: ignore[arg-type]

    async def metrics(self) -> str:
        self._fail()
        return "# HELP kblam_things Things.\n# TYPE kblam_things gauge\nkblam_things 1.0\n"

    def _fail(self) -> None:
        if self.failures.before is not None:
            raise self.failures.before

    def _spec(self, name: str) -> KbSpec:
        if name not in self.served:
            raise NotServedError(f"there is no knowledge base {name!r}", where="name", help="list them")
        return self.served[name]

    def _facts(self, kb: KbRef | None, least: int | None) -> tuple[int | None, State]:
        if kb is None:
            if least is not None:
                raise InputError("a version of no knowledge base", where="min_kb_version", help="name one")
            return None, {}
        spec = self._spec(kb.name)
        versions = self.tables[spec.uri]
        served = len(versions) - 1 if spec.version is None else spec.version
        version = served if kb.version is None else kb.version
        if version >= len(versions):
            raise NotServedError(f"there is no version {version}", where=spec.uri, help="ask for an older one")
        if least is not None and version < least:
            raise ConflictError(f"version {version} is served", where="min_kb_version", help="ask again later")
        return version, versions[version]

    def _writable(self, name: str) -> list[State]:
        self._fail()
        spec = self._spec(name)
        if spec.version is not None:
            raise ConflictError(f"{name} is pinned at version {spec.version}", help="PUT it with version null")
        return self.tables[spec.uri]

    def _commit(self, versions: list[State], new: State, wait: bool, **counts: int) -> Written:
        if new != versions[-1]:
            versions.append(new)
        return Written(len(versions) - 1, **counts, is_served=not self.failures.unserved if wait else None)

    def _describe(self, name: str) -> KbDescription:
        spec = self.served[name]
        latest = len(self.tables[spec.uri]) - 1
        version = latest if spec.version is None else spec.version
        num_facts = len(self.tables[spec.uri][version])
        return KbDescription(
            name, spec.uri, version, latest, spec.version is not None, num_facts, "hashing", "ready", 0.0
        )


def _answer(question: Question, facts: State) -> Choice:
    asked = question.messages[-1]["content"]
    best = [
        {"fact_id": str(number), **row, "score": 0.5}
        for number, row in facts.items()
        if row["entity"] in asked and row["property"] in asked
    ][: question.max_citations]
    text = f"The {best[0]['property']} of {best[0]['entity']} is {best[0]['value']}." if best else "I do not know that."
    tokens = re.findall(r"\s*\S+", text)
    count = question.sampling.num_logprobs
    top = (("The", -0.5), ("é", -1.0))[: count or 0]
    logprobs = () if count is None else tuple(TokenLogprob(token, -0.5, top) for token in tokens)
    return Choice(text, "stop", not best, tuple(best), len(tokens), logprobs)


def memory_backend() -> MemoryBackend:
    """Two tables, of which one is served; answers flow."""
    first = {id_of(row): row for row in FACTS[:2]}
    second = {id_of(row): row for row in FACTS}
    rivers = {id_of(row): row for row in [fact("Nile", "length", "6,650 km")]}
    backend = MemoryBackend({URI: [first, second], OTHER_URI: [rivers]}, {KB: KbSpec(URI)})
    backend.gate.set()
    return backend


class Broken(KblamError):
    """An error of no particular kind."""


def make_app(backend: Any = None, *, keys: Keys | None = None, grounding: Any = "cite", **limits: Any) -> Any:
    """An application over a backend; by default one in memory, without keys."""
    metrics = Metrics("gateway-1", "gateway")
    app = create_app(backend or memory_backend(), LimitSettings(**limits), keys or Keys(), metrics, grounding=grounding)
    app.state.metrics = metrics
    return app


@contextmanager
def client_of(app: Any, *, client: tuple[str, int] = ("127.0.0.1", 5000), **headers: str) -> Iterator[Client]:
    """A client of an application without a socket between."""
    with asyncio.Runner() as runner:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
        inner = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)
        yield Client(runner, inner)
        runner.run(inner.aclose())


class Client:
    """`httpx.AsyncClient` for tests that are not asynchronous."""

    def __init__(self, runner: asyncio.Runner, inner: httpx.AsyncClient) -> None:
        self._runner, self._inner = runner, inner

    def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self._runner.run(self._inner.request(method, path, **options))

    def ask(self, text: str = "What is the capital of Kenya?", **fields: Any) -> httpx.Response:
        """A chat request."""
        return self("POST", CHAT, question(text, **fields))


class Exchange:
    """One request spoken to an application by hand: its body as it comes, its answer as it goes, and hanging up."""

    def __init__(self, app: Any, method: str, path: str, body: Any = None, **headers: str) -> None:
        self.sent: list[Any] = []
        self.num_received = 0
        self._incoming: asyncio.Queue[Any] = asyncio.Queue()
        self._changed = asyncio.Event()
        given = {"host": "127.0.0.1", "content-type": "application/json", **headers}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 5000),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()],
        }
        if body is not None:
            self.scope["headers"].append((b"transfer-encoding", b"chunked"))
            self.feed(json.dumps(body).encode(), more=False)
        self.task = asyncio.ensure_future(app(self.scope, self._receive, self._send))

    def feed(self, data: bytes, *, more: bool = True) -> None:
        """Send a part of the body."""
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def hang_up(self) -> None:
        """Close the connection."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def until(self, condition: Any) -> None:
        """Return when something holds of what was sent."""
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()

    @property
    def is_whole(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)

    async def _receive(self) -> Any:
        message = await self._incoming.get()
        self.num_received += 1
        return message

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self._changed.set()


def question(text: str = "What is the capital of Kenya?", **fields: Any) -> Row:
    """The body of a chat request."""
    return {"model": f"{MODEL}:{KB}", "messages": [{"role": "user", "content": text}], **fields}


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """A real server on a loopback port, in a thread; gives its address."""

    @asynccontextmanager
    async def made() -> AsyncIterator[Any]:
        yield app

    with serving_made(made) as address:
        yield address


@contextmanager
def serving_made(make: Callable[[], AbstractAsyncContextManager[Any]]) -> Iterator[str]:
    """As `serving`, of an application that is made, and unmade, in the server's own event loop."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        servers: list[uvicorn.Server] = []

        async def serve() -> None:
            async with make() as app:
                config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
                servers.append(uvicorn.Server(config))
                await servers[0].serve(sockets=[listener])

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        try:
            wait_until(lambda: not thread.is_alive() or (servers and servers[0].started), 60)
            assert thread.is_alive(), "the server did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            if servers:
                servers[0].should_exit = True
            thread.join()


def wait_until(condition: Any, deadline_s: float = 20) -> None:
    """Return when a condition holds; fail when it does not in time."""
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def events_of(text: str) -> list[tuple[str | None, str]]:
    """Name and data of each server-sent event."""
    events = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        fields = {name: value for name, _, value in lines}
        if "data" in fields:
            events.append((fields.get("event"), fields["data"]))
    return events
