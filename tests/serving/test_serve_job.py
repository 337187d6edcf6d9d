"""The server of `jobs/serve.py` under clients, changes, and processes that die; started once for all of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serve_samples import MODEL, Server, eventually, question_body, running_server
from serving_samples import ANSWER, CAPITALS, QUESTION, UNANSWERABLE, make_kb

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.serving.registry import State, StateStore
from kblam_ray.serving.wanted import KbSpec

ONGOING, QUEUED, REPLICAS = 4, 8, 2
KENYA = {"entity": "Kenya", "property": "capital"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Two replicas. The state object is one that an earlier server left: it pins a table at an older version."""
    make_kb(folder)
    pinned = make_kb(folder, "pinned")
    pinned.upsert([Fact("Kenya", "capital", "Mombasa")])
    StateStore(str(folder / "state.json")).write(State({"old": KbSpec(str(folder / "pinned"), 0)}))
    flags = [
        *("--kb", f"capitals={folder / 'capitals'}", "--grounding", "verbatim"),
        *("--state-uri", str(folder / "state.json")),
        *("--replicas-min-replicas", str(REPLICAS)),
        *("--limits-max-ongoing-requests", str(ONGOING), "--limits-max-queued-requests", str(QUEUED)),
        *("--limits-drain-timeout-s", "120"),  # a slow machine is to finish what runs, too
    ]
    with running_server(*flags, num_replicas=REPLICAS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_the_official_client_asks_and_streams(client):
    asked: dict[str, Any] = {"model": f"{MODEL}:capitals", "messages": [{"role": "user", "content": QUESTION}]}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == ANSWER
    assert answer.kb_version == 0
    assert answer.citations[0]["value"] == "Nairobi"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.refused for chunk in chunks if hasattr(chunk, "refused")] == [False]
    asked["messages"] = [{"role": "user", "content": UNANSWERABLE}]
    assert client.chat.completions.create(**asked).refused
    assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}:capitals", f"{MODEL}:old"]


def test_an_earlier_servers_knowledge_bases_and_pins_are_served(server, folder):
    assert text_of(server.ask(QUESTION, "old")) == ANSWER
    described = server.kb("old")
    assert (described["pinned"], described["version"], described["latest_version"]) == (True, 0, 1)
    refused = server.http.post("/v1/knowledge_bases/old/facts", json={"facts": [{**KENYA, "value": "Kisumu"}]})
    assert refused.status_code == 409
    # Unpinned, it follows; pinned, it rolls back; removed, it is gone, from the state object, too.
    place = {"uri": str(folder / "pinned")}
    put = server.http.put("/v1/knowledge_bases/old?wait=true", json={**place, "version": None})
    assert put.status_code == 200, put.text
    assert "Mombasa" in text_of(server.ask(QUESTION, "old"))
    assert server.http.put("/v1/knowledge_bases/old?wait=true", json={**place, "version": 0}).status_code == 200
    for _ in range(2 * REPLICAS):
        assert text_of(server.ask(QUESTION, "old")) == ANSWER
    state = json.loads((folder / "state.json").read_text())
    assert state["knowledge_bases"]["old"] == {"uri": place["uri"], "version": 0}
    assert server.http.delete("/v1/knowledge_bases/old").is_success
    eventually(lambda: server.ask(QUESTION, "old").status_code == 404, "a knowledge base that is gone")
    assert "old" not in json.loads((folder / "state.json").read_text())["knowledge_bases"]


def test_a_table_that_cannot_be_served_is_refused_and_changes_nothing(server, folder):
    missing = server.http.put("/v1/knowledge_bases/nothing", json={"uri": str(folder / "nothing"), "version": None})
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "table_not_found"
    assert set(server.health()["knowledge_bases"]) == {"capitals"}


def test_every_replica_serves_what_was_waited_for(server):
    for city in ("Mombasa", "Nakuru", "Nairobi"):
        written = server.http.post(
            "/v1/knowledge_bases/capitals/facts?wait=true", json={"facts": [{**KENYA, "value": city}]}
        )
        assert written.status_code == 200, written.text
        assert written.json()["changed"] == 1
        for _ in range(3 * REPLICAS):
            answer = server.ask(QUESTION)
            assert city in text_of(answer)
            assert answer.json()["kb_version"] == written.json()["kb_version"]


def test_facts_are_looked_up_and_deleted(server):
    added = {"entity": "Wakanda", "property": "capital", "value": "Birnin Zana"}
    facts = "/v1/knowledge_bases/capitals/facts"
    assert server.http.post(f"{facts}?wait=true", json={"facts": [added]}).json()["added"] == 1
    (found,) = server.http.get(facts, params={"entity": "Wakanda"}).json()["data"]
    assert found["value"] == "Birnin Zana"
    assert server.http.delete(f"{facts}/{found['fact_id']}?wait=true").is_success
    assert server.http.get(facts, params={"entity": "Wakanda"}).json()["data"] == []
    assert server.http.delete(f"{facts}/{found['fact_id']}").status_code == 404


def test_errors_of_replicas_arrive_as_themselves(server):
    too_long = server.ask("word " * 5000)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    unknown = server.ask(QUESTION, "atlas")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert server.ask(QUESTION, stream=True, min_kb_version=10**6).status_code == 409


def test_more_requests_than_may_wait_are_turned_away(server):
    places = REPLICAS * ONGOING + QUEUED
    # Hot enough not to end at once: most are at work when the last one comes.
    body = question_body(QUESTION, grounding="off", temperature=2.0, max_tokens=60)

    async def burst(num: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.address, timeout=120, limits=httpx.Limits()) as many:
            return await asyncio.gather(*(many.post("/v1/chat/completions", json=body) for _ in range(num)))

    answers = asyncio.run(burst(places + 10))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= places
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}
    # As many as have places all get one, however sudden they come.
    assert {answer.status_code for answer in asyncio.run(burst(places))} == {200}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(server, stream):
    # Metrics are a lease's third old: the answer must not be over before it is seen there.
    body = json.dumps(question_body(QUESTION, grounding="off", temperature=2.0, max_tokens=1_000, n=8, stream=stream))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def num_running() -> float:
        return sum(server.samples("kblam_running_requests", "answerer").values())

    eventually(lambda: num_running() == 0, "replicas with nothing to do")
    with socket.create_connection(server.address.removeprefix("http://").split(":")) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        eventually(num_running, "a request that runs")
    eventually(lambda: num_running() == 0, "replicas with nothing to do")


def test_metrics_are_those_of_all_processes(server):
    assert sum(server.samples("kblam_requests_total", "gateway").values()) > 0
    assert len(server.samples("kblam_kb_version", "answerer")) == REPLICAS
    assert sum(server.samples("kblam_answer_tokens_total", "answerer").values()) > 0
    assert sum(server.samples("kblam_kb_facts_written_total", "writer").values()) > 0
    memory = "kblam_process_memory_bytes"
    assert [len(server.samples(memory, role)) for role in ("gateway", "writer", "answerer")] == [1, 1, REPLICAS]


def test_request_ids_come_back_once(server):
    answer = server.http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert len(server.http.get("/v1/models").headers.get_list("x-request-id")) == 1


class Clients:
    """Clients that ask all the time, each in a thread, without retries."""

    def __init__(self, server: Server, num: int, num_streaming: int = 0) -> None:
        self.answers: list[list[httpx.Response | str]] = [[] for _ in range(num)]
        self.over = threading.Event()
        self._server = server
        self._threads = [
            threading.Thread(target=self._ask, args=(answers, number < num_streaming), daemon=True)
            for number, answers in enumerate(self.answers)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(120)

    def all_answered_again(self) -> None:
        """Every client gets two more answers: one of them was asked for after this began."""
        before = [len(answers) for answers in self.answers]
        eventually(
            lambda: all(len(now) >= then + 2 for now, then in zip(self.answers, before, strict=True)),
            "an answer for every client",
            120,
        )

    def _ask(self, answers: list[httpx.Response | str], is_streaming: bool) -> None:
        country = list(CAPITALS)[id(answers) % len(CAPITALS)]
        body = question_body(f"What is the capital of {country}?", stream=is_streaming)
        with httpx.Client(base_url=self._server.address, timeout=120) as http:
            while not self.over.is_set():
                try:
                    answers.append(http.post("/v1/chat/completions", json=body))
                except httpx.HTTPError as error:
                    answers.append(repr(error))
                    time.sleep(0.1)


def test_nobody_notices_that_a_replica_dies(server):
    with Clients(server, num=8, num_streaming=2) as clients:
        clients.all_answered_again()
        victim, survivor = server.processes("Answerer")
        os.kill(victim.pid, signal.SIGKILL)
        clients.all_answered_again()
    for answers in clients.answers:
        for answer in answers:
            assert isinstance(answer, httpx.Response), answer
            assert answer.status_code == 200, answer.text
            # Of a stream, only one that had begun to say something may break off.
            if "event: error" in answer.text:
                assert '"content"' in answer.text.partition("event: error")[0]
    assert survivor.is_running()
    # Another takes its place, and serves what is served.
    eventually(lambda: victim.pid not in [each.pid for each in server.processes("Answerer")], "its end")

    def versions() -> list[float]:
        return list(server.samples("kblam_kb_version", "answerer").values())

    eventually(lambda: len(versions()) == REPLICAS == server.health()["replicas"], "a new replica", 150)
    assert len(set(versions())) == 1


def test_a_write_that_waits_outlives_the_registry(server, folder):
    table = str(folder / "capitals")
    before = KnowledgeBase.open(table).version
    stopped = server.processes("Answerer")[0]
    written: list[httpx.Response] = []

    def write() -> None:
        facts = {"facts": [{**KENYA, "value": "Eldoret"}]}
        written.append(server.http.post("/v1/knowledge_bases/capitals/facts?wait=true&timeout_s=90", json=facts))

    # A replica that stands still keeps the write waiting.
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        writing = threading.Thread(target=write)
        writing.start()
        eventually(lambda: KnowledgeBase.open(table).version != before, "a commit")
        (registry,) = server.processes("Registry")
        assert not written
        os.kill(registry.pid, signal.SIGKILL)
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    # Questions need no registry.
    assert server.ask(QUESTION).status_code == 200
    writing.join(120)
    assert written[0].status_code == 200, written[0].text
    for _ in range(3 * REPLICAS):
        assert "Eldoret" in text_of(server.ask(QUESTION))
    eventually(lambda: server.health()["replicas"] == REPLICAS, "all replicas")
    eventually(lambda: [one.pid for one in server.processes("Registry") if one.pid != registry.pid], "another registry")


def test_a_write_outlives_the_writer(server):
    facts = [{"entity": f"Place {number}", "property": "capital", "value": f"Town {number}"} for number in range(400)]
    written: list[httpx.Response] = []

    def write() -> None:
        path = "/v1/knowledge_bases/capitals/facts?wait=true&timeout_s=90"
        written.append(server.http.post(path, json={"facts": facts}))

    (writer,) = server.processes("Writer")
    writing = threading.Thread(target=write)
    writing.start()
    eventually(lambda: ".write" in "".join(writer.cmdline()) or written, "a write that runs")
    os.kill(writer.pid, signal.SIGKILL)
    writing.join(120)
    assert written[0].status_code == 200, written[0].text
    assert server.kb()["num_facts"] >= 400
    found = server.http.get("/v1/knowledge_bases/capitals/facts", params={"entity": "Place 399"}).json()
    assert found["data"][0]["value"] == "Town 399"


def test_stopping_finishes_what_runs_and_tells_what_was_served(server, folder):
    """The last test of this server."""
    slow = question_body(QUESTION, grounding="off", temperature=2.0, max_tokens=150, n=4, stream=True)
    said: list[str] = []

    def ask() -> None:
        with http.stream("POST", "/v1/chat/completions", json=slow) as answer:
            said.extend(filter(None, answer.iter_lines()))

    with httpx.Client(base_url=server.address, timeout=120) as http:
        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: said, "an answer that has begun")
        server.process.send_signal(signal.SIGTERM)
        turned_away = eventually(
            lambda: (answer := server.http.get("/v1/models")).status_code == 503 and answer, "a closed door"
        )
        assert turned_away.headers["Retry-After"] == "1"
        assert turned_away.json()["error"]["code"] == "unavailable"
        asking.join(120)
    assert said[-1] == "data: [DONE]"
    summary = server.stop()
    assert summary["returncode"] == 0
    assert summary["ok"]
    assert summary["address"] == server.address
    assert summary["requests"] > 50
    assert summary["unfinished"] == 0
    assert summary["knowledge_bases"]["capitals"]["uri"] == str(folder / "capitals")
