"""Whatever goes wrong, however odd the request: OpenAI's error body, a status that fits, and never a 5xx for it."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from http_samples import (
    CHAT,
    FACTS_PATH,
    KB,
    Exchange,
    client_of,
    make_app,
    memory_backend,
    question,
    serving,
)

from kblam_ray import errors as e
from kblam_ray.serving.http.errors import STATUSES, status_of
from kblam_ray.serving.http.schema.errors import ErrorBody


@pytest.fixture
def backend():
    return memory_backend()


@pytest.fixture
def client(backend):
    with client_of(make_app(backend, retry_after_s=7)) as client:
        yield client


def error_of(response):
    assert response.headers["content-type"] == "application/json"
    return ErrorBody.model_validate(response.json()).error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (e.InputError, 400),
        (e.BadRowError, 400),
        (e.ContextLengthError, 400),
        (e.UnsupportedParameterError, 400),
        (e.EncoderMismatchError, 400),
        (e.AuthenticationError, 401),
        (e.PermissionDeniedError, 403),
        (e.NotServedError, 404),
        (e.TableNotFoundError, 404),
        (e.ConflictError, 409),
        (e.TooLargeError, 413),
        (e.OverloadedError, 429),
        (e.UnavailableError, 503),
        (e.StorageError, 503),
        (e.EncoderError, 503),
        (e.GenerationError, 503),
        (e.MissingDependencyError, 503),
        (e.KblamError, 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_error_has_its_status(client, backend, error, status, stream):
    backend.failures.before = error("it did not work", where="top_p", help="try another")
    response = client.ask(stream=stream)
    assert response.status_code == status
    found = error_of(response)
    assert "it did not work" in found.message
    assert "try another" in found.message
    assert response.headers.get("retry-after") == ("7" if status in (429, 503) else None)
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    kinds = {429: "rate_limit_error", 503: "server_error"}
    assert found.type == kinds.get(status, "invalid_request_error")
    if error is not e.NotServedError:  # there, the model is to blame
        assert (found.code, found.param) == (error.code, "top_p")


def test_every_class_of_error_has_a_status():
    def all_of(kind):
        return {kind}.union(*map(all_of, kind.__subclasses__()))

    for kind in all_of(e.KblamError):
        error = kind.__new__(kind)
        assert status_of(error) in {*STATUSES.values()}
        assert 400 <= status_of(error) < 500 or not issubclass(kind, e.InputError) or kind in STATUSES


def test_a_defect_is_a_500_that_says_nothing_but_that(client, backend, caplog):
    backend.failures.before = ZeroDivisionError("a secret of ours")
    for response in (client.ask(), client("GET", "/v1/models"), client("GET", "/metrics")):
        assert response.status_code == 500
        assert error_of(response).code == "internal"
        assert "secret" not in response.text
        assert response.headers["x-request-id"]
    assert "ZeroDivisionError" in caplog.text


def test_nothing_is_there(client):
    for path in ("/nothing", "/v1", "/v1/knowledge_bases/", f"{FACTS_PATH}/", f"{FACTS_PATH}/abc/d"):
        for method in ("GET", "POST", "DELETE"):
            response = client(method, path)
            assert (response.status_code, error_of(response).code) == (404, "not_found"), (method, path)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("HEAD", CHAT, "POST"),
        ("PATCH", FACTS_PATH, "GET, HEAD, POST"),
        ("POST", f"/v1/knowledge_bases/{KB}", "DELETE, GET, HEAD, PUT"),
        ("DELETE", f"{FACTS_PATH}/delete", "POST"),
        ("GET", f"{FACTS_PATH}/5", "DELETE"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
    ],
)
def test_a_method_that_is_not_taken_names_those_that_are(client, method, path, allowed):
    response = client(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert method == "HEAD" or error_of(response).code == "method_not_allowed"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", FACTS_PATH, "/", "/openapi.json", "/nothing"])
def test_head_is_get_without_the_body(client, path):
    get, head = client("GET", path), client("HEAD", path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not JSON",
        b'{"n": NaN}',
        b'{"n": Infinity}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5_000 + b"}",
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        '{"model": "x"}'.encode("utf-16"),
        b"[" * 50_000,
        b'{"messages": ' * 3_000 + b"1" + b"}" * 3_000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udc00"}]}',
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b'{"\\u0000": 1}',
    ],
    ids=range(18),
)
@pytest.mark.parametrize("path", [CHAT, FACTS_PATH, f"{FACTS_PATH}/delete"])
def test_odd_bodies_are_the_clients_fault(client, backend, body, path):
    response = client("POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert len(error_of(response).message) < 2_500
    assert not backend.questions


def test_a_body_must_be_declared_as_json(client):
    body = json.dumps(question())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = client("POST", CHAT, content=body, headers={"content-type": kind})
        assert response.status_code == 400, kind
        assert "Content-Type" in error_of(response).message
    kind = "Application/JSON; charset=utf-8"
    assert client("POST", CHAT, content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=1001", "limit"),
        ("?limit=-5", "limit"),
        ("?after=abc", "after"),
        ("?after=1&after=2", "after"),
        ("?limit=5&limit=5", "limit"),
        ("?page=2", "page"),
        ("?Q=x", None),
        ("?%ff=1", None),
    ],
)
def test_query_parameters_are_known_and_given_once(client, query, param):
    response = client("GET", FACTS_PATH + query)
    assert (response.status_code, error_of(response).param) == (400, param)


@pytest.mark.parametrize("query", ["?limit=many", "?limit=", "?limit=1.5"])
def test_a_query_parameter_of_another_type(client, query):
    response = client("GET", FACTS_PATH + query)
    assert (response.status_code, error_of(response).param) == (422, "limit")


def test_endpoints_without_parameters_take_none(client):
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("DELETE", f"/v1/knowledge_bases/{KB}")):
        assert client(method, f"{path}?x=1", question() if method == "POST" else None).status_code == 400


def test_a_large_body_is_refused_before_it_is_read(backend):
    app = make_app(backend, max_body_bytes=1_000)

    async def declared():
        exchange = Exchange(app, "POST", CHAT, content_length="50000000", expect="100-continue")
        await exchange.task
        return exchange

    exchange = asyncio.run(declared())
    assert exchange.status == 413
    assert exchange.num_received == 0
    assert json.loads(exchange.text)["error"]["code"] == "too_large"


def test_a_large_body_of_unknown_length_is_refused_while_it_comes(backend):
    app = make_app(backend, max_body_bytes=1_000)

    async def streamed():
        exchange = Exchange(app, "POST", CHAT, transfer_encoding="chunked")
        exchange.feed(b" " * 600)
        exchange.feed(b" " * 600)
        await exchange.until(lambda: len(exchange.sent) == 2)  # answered, while the body still comes
        early = exchange.status, exchange.num_received, exchange.is_whole
        for _ in range(100):
            exchange.feed(b" " * 600)
        exchange.feed(b"", more=False)
        await exchange.task
        return early, exchange

    early, exchange = asyncio.run(streamed())
    assert early == (413, 2, False)
    assert exchange.num_received == 103  # read on and thrown away, so that the client gets to the answer
    assert exchange.is_whole


def test_fifty_megabytes_over_a_real_connection(backend):
    """By a client that sends everything before it looks for an answer, with and without a declared length."""
    with serving(make_app(backend)) as address:
        host, port = address.removeprefix("http://").split(":")
        for chunked in (False, True):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 50000000"
                head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
                connection.sendall(head.encode())
                block = b" " * 1_000_000
                for _ in range(50):
                    connection.sendall(b"f4240\r\n%b\r\n" % block if chunked else block)
                connection.sendall(b"0\r\n\r\n" if chunked else b"")
                answer = connection.recv(100_000)
            assert answer.startswith(b"HTTP/1.1 413")
            assert b"too_large" in answer


def test_a_body_of_just_the_limit_is_read():
    body = json.dumps(question()).encode()
    with client_of(make_app(max_body_bytes=len(body))) as client:
        headers = {"content-type": "application/json"}
        assert client("POST", CHAT, content=body, headers=headers).status_code == 200
        assert client("POST", CHAT, content=body + b" ", headers=headers).status_code == 413


def test_a_request_takes_no_longer_than_it_may(backend):
    backend.gate.clear()
    with client_of(make_app(backend, request_timeout_s=0.5)) as client:
        response = client.ask()
    assert response.status_code == 503
    assert error_of(response).code == "unavailable"
    assert (backend.num_running, backend.num_cancelled) == (0, 1)


def test_a_client_that_hangs_up_is_not_answered_for(backend):
    backend.gate.clear()
    app = make_app(backend)

    async def leave():
        exchange = Exchange(app, "POST", CHAT, question())
        async with asyncio.timeout(20):
            while not backend.num_running:
                await asyncio.sleep(0)
            exchange.hang_up()
            await exchange.task

    asyncio.run(leave())
    assert (backend.num_running, backend.num_cancelled) == (0, 1)
