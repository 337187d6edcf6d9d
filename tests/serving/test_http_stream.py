"""Streams: pieces as they come, errors as events, nothing lost to keep-alives, and no work for those who have left."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import pytest
from http_samples import CHAT, Exchange, events_of, make_app, memory_backend, question, serving, wait_until

from kblam_ray.errors import GenerationError
from kblam_ray.serving.http import sse
from kblam_ray.serving.logs import ACCESS_LOGGER


@pytest.fixture
def backend():
    return memory_backend()


async def ask(app, **fields):
    return Exchange(app, "POST", CHAT, question(stream=True, **fields))


def text_of(exchange):
    chunks = [json.loads(data) for _, data in events_of(exchange.text) if data != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_pieces_are_sent_as_they_come(backend):
    async def run():
        backend.gate.clear()
        exchange = await ask(make_app(backend))
        await exchange.until(lambda: "assistant" in exchange.text)
        assert (exchange.status, text_of(exchange)) == (200, "")
        backend.gate.set()
        await exchange.task
        return exchange

    exchange = asyncio.run(run())
    assert text_of(exchange) == "The capital of Kenya is Nairobi."
    assert exchange.is_whole
    assert len(exchange.sent) > 8


def test_hanging_up_cancels_at_once(backend):
    """While the backend works, and nothing is being sent that could fail."""

    async def run():
        backend.gate.clear()
        exchange = await ask(make_app(backend))
        await exchange.until(lambda: "assistant" in exchange.text)
        assert backend.num_running == 1
        exchange.hang_up()
        async with asyncio.timeout(20):
            await exchange.task
        assert (backend.num_running, backend.num_cancelled) == (0, 1)
        return exchange

    assert not asyncio.run(run()).is_whole


def test_hanging_up_before_the_first_event(backend):
    class Slow(type(backend)):
        async def stream(self, question):
            self.num_running += 1
            try:
                await asyncio.Event().wait()
                yield
            finally:
                self.num_running -= 1

    async def run():
        slow = Slow(backend.tables, backend.served)
        exchange = await ask(make_app(slow))
        async with asyncio.timeout(20):
            while not slow.num_running:
                await asyncio.sleep(0)
            exchange.hang_up()
            await exchange.task
        return slow.num_running

    assert asyncio.run(run()) == 0


def test_a_server_that_stops_cancels_too(backend):
    async def run():
        backend.gate.clear()
        exchange = await ask(make_app(backend))
        await exchange.until(lambda: "assistant" in exchange.text)
        exchange.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.task
        return backend.num_running

    assert asyncio.run(run()) == 0


def test_a_server_that_stops_before_anything_was_sent_cancels_too(backend):
    async def run():
        exchange = await ask(app := make_app(backend))
        exchange.task.cancel()
        exchange.feed(json.dumps(question(stream=True)).encode(), more=False)
        is_sending = asyncio.Event()

        async def stuck(message):
            is_sending.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(app(exchange.scope, exchange._receive, stuck))
        await is_sending.wait()
        assert backend.num_running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return backend.num_running

    assert asyncio.run(run()) == 0


def test_a_connection_that_breaks_while_something_is_sent(backend):
    async def run():
        exchange = await ask(make_app(backend))
        send = exchange._send

        async def broken(message):
            if b"Kenya" in message.get("body", b""):
                raise OSError("broken pipe")
            await send(message)

        exchange._send = broken
        exchange.task.cancel()
        app = make_app(backend)
        exchange.feed(json.dumps(question(stream=True)).encode(), more=False)
        with pytest.raises(OSError, match="broken pipe"):
            await app(exchange.scope, exchange._receive, broken)
        return backend.num_running, backend.num_cancelled

    assert asyncio.run(run()) == (0, 1)


def test_closing_a_real_connection_cancels(backend):
    backend.gate.clear()
    with serving(make_app(backend)) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(question(stream=True))
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
            wait_until(lambda: backend.num_running == 1)
        wait_until(lambda: (backend.num_running, backend.num_cancelled) == (0, 1))


@pytest.mark.parametrize("num_pieces", [0, 3])
def test_an_error_after_the_start_is_the_last_event(backend, num_pieces):
    backend.failures.error = GenerationError("the engine died", help="ask again")
    backend.failures.after_pieces = num_pieces

    async def run():
        exchange = await ask(make_app(backend))
        await exchange.task
        return exchange

    exchange = asyncio.run(run())
    assert (exchange.status, exchange.is_whole) == (200, True)
    *before, (name, data) = events_of(exchange.text)
    assert name == "error"
    assert json.loads(data)["error"]["code"] == "generation_failed"
    assert len(before) == 1 + num_pieces
    assert "[DONE]" not in exchange.text
    assert backend.num_running == 0


def test_a_defect_after_the_start_cuts_the_connection(backend, caplog):
    backend.failures.error = ZeroDivisionError("a defect")

    async def run():
        exchange = await ask(make_app(backend))
        with pytest.raises(ZeroDivisionError):
            await exchange.task
        return exchange

    assert not asyncio.run(run()).is_whole
    assert "a defect" in caplog.text


def test_time_runs_out_in_the_middle(backend):
    async def run():
        backend.gate.clear()
        exchange = await ask(make_app(backend, request_timeout_s=0.5))
        await exchange.task
        return exchange

    exchange = asyncio.run(run())
    name, data = events_of(exchange.text)[-1]
    assert (name, json.loads(data)["error"]["code"]) == ("error", "unavailable")
    assert (backend.num_running, backend.num_cancelled) == (0, 1)


@pytest.mark.parametrize("events", [[], ["piece"], ["started"]])
def test_a_backend_that_breaks_off_is_not_taken_for_an_end(events):
    from kblam_ray.serving.messages import Piece, Started

    class Short(type(memory_backend())):
        async def stream(self, question):
            for each in events:
                yield Started(1, 1) if each == "started" else Piece(0, "x")

    async def run():
        exchange = await ask(make_app(Short()))
        await exchange.task
        return exchange

    exchange = asyncio.run(run())
    assert exchange.status == (200 if events == ["started"] else 503)
    assert "generation_failed" in exchange.text
    assert "[DONE]" not in exchange.text


def test_keep_alives_lose_nothing():
    async def numbers():
        for number in range(5):
            await asyncio.sleep(0.03)
            yield sse.event(str(number))

    async def run():
        async def app(scope, receive, send):
            await sse.EventStream(numbers(), keep_alive_s=0.01)(scope, receive, send)

        exchange = Exchange(app, "GET", "/")
        await exchange.task
        return exchange

    exchange = asyncio.run(run())
    assert [data for _, data in events_of(exchange.text)] == list("01234")
    assert exchange.text.count(": keep-alive") >= 5
    assert exchange.is_whole


def test_proxies_are_told_to_pass_events_on(backend):
    async def run():
        exchange = await ask(make_app(backend))
        await exchange.task
        return dict(exchange.sent[0]["headers"])

    headers = asyncio.run(run())
    assert headers[b"cache-control"] == b"no-cache, no-transform"
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers


def test_how_a_stream_ended_is_logged(backend, caplog):
    caplog.set_level(logging.INFO, ACCESS_LOGGER)

    async def run(leaves):
        backend.gate.clear() if leaves else backend.gate.set()
        exchange = await ask(make_app(backend))
        await exchange.until(lambda: "assistant" in exchange.text)
        if leaves:
            exchange.hang_up()
        await exchange.task

    asyncio.run(run(leaves=False))
    whole = vars(caplog.records[-1])
    assert (whole["status"], whole["kb_version"], whole["completion_tokens"]) == (200, 1, 6)
    assert "outcome" not in whole
    asyncio.run(run(leaves=True))
    assert vars(caplog.records[-1])["outcome"] == "client_gone"
