"""Keys, clients, request ids, logs and metrics: who may come in, and what is remembered of it."""

from __future__ import annotations

import io
import json
import logging

import pytest
from http_samples import (
    ADMIN_KEY,
    ASKING_KEY,
    CHAT,
    FACTS_PATH,
    KB,
    KEYS,
    URI,
    client_of,
    make_app,
    memory_backend,
    question,
)

from kblam_ray.errors import InputError
from kblam_ray.serving.http.access import Keys, is_loopback
from kblam_ray.serving.logs import JsonFormatter

KB_PATH = f"/v1/knowledge_bases/{KB}"
LIMA = {"facts": [{"entity": "Peru", "property": "capital", "value": "Lima"}]}
NAMES = {"facts": [{"entity": "Peru", "property": "capital"}]}

ASKING = [
    ("POST", CHAT, question()),
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/tiny:{KB}", None),
    ("GET", "/v1/knowledge_bases", None),
    ("GET", KB_PATH, None),
    ("GET", FACTS_PATH, None),
]
WRITING = [
    ("POST", FACTS_PATH, LIMA),
    ("POST", f"{FACTS_PATH}/delete", NAMES),
    ("DELETE", f"{FACTS_PATH}/5", None),
    ("PUT", KB_PATH, {"uri": URI}),
    ("DELETE", KB_PATH, None),
]
OPEN = [("GET", path, None) for path in ("/health", "/metrics", "/openapi.json", "/")]


@pytest.fixture(scope="module")
def app():
    return make_app(keys=KEYS)


def statuses(app, requests, **headers):
    found = set()
    for method, path, body in requests:
        app.state.services.backend.__dict__.update(vars(memory_backend()))
        with client_of(app, **headers) as client:
            found.add(client(method, path, body).status_code)
    return found


def test_every_endpoint_is_listed_here(app):
    documented = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert len(documented) == len(ASKING + WRITING) + 2  # health and metrics


def test_an_admin_key_opens_everything(app):
    assert statuses(app, ASKING + OPEN, authorization=f"Bearer {ADMIN_KEY}") == {200}
    assert statuses(app, WRITING, authorization=f"Bearer {ADMIN_KEY}") == {200, 404}  # there is no fact 5


def test_an_asking_key_asks_only(app):
    assert statuses(app, ASKING + OPEN, authorization=f"Bearer {ASKING_KEY}") == {200}
    assert statuses(app, WRITING, authorization=f"Bearer {ASKING_KEY}") == {403}


def test_without_a_key_only_health_metrics_and_the_page(app):
    assert statuses(app, OPEN) == {200}
    assert statuses(app, ASKING + WRITING) == {401}


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer sk-wrong",
        "Bearer",
        "Bearer ",
        "",
        ADMIN_KEY,
        f"Basic {ADMIN_KEY}",
        f"Bearer {ADMIN_KEY} x",
        f"Bearer {ADMIN_KEY.upper()}",
        f"Bearer {ADMIN_KEY[:-1]}",
        f"Bearer {ADMIN_KEY}\t{ADMIN_KEY}",
        f"Bearer\t{ADMIN_KEY}",
        "Bearer " + "x" * 10_000,
        b"Bearer \xff\xfe",
    ],
)
def test_an_odd_authorization_is_no_key(app, authorization):
    assert statuses(app, ASKING + WRITING, authorization=authorization) == {401}


def test_two_keys_are_none(app):
    with client_of(app) as client:
        headers = [("Authorization", f"Bearer {ADMIN_KEY}"), ("Authorization", f"Bearer {ASKING_KEY}")]
        response = client("GET", "/v1/models", headers=headers)
    assert response.status_code == 401


@pytest.mark.parametrize("authorization", [f"bearer {ASKING_KEY}", f"BEARER   {ASKING_KEY} ", "Bearer sk-asking-2"])
def test_the_scheme_is_read_in_any_case(app, authorization):
    assert statuses(app, ASKING, authorization=authorization) == {200}


def test_refusals_say_how_to_come_in_and_not_what_was_sent(app):
    with client_of(app, authorization="Bearer sk-wrong-secret") as client:
        response = client("GET", "/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "sk-wrong-secret" not in response.text


@pytest.mark.parametrize(
    ("client", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.5.5.5", "localhost", 200),
        ("::1", "[::1]:8000", 200),
        ("::ffff:127.0.0.1", "LOCALHOST.", 200),
        ("10.0.0.5", "127.0.0.1", 403),
        ("::ffff:10.0.0.5", "127.0.0.1", 403),
        ("testclient", "127.0.0.1", 403),
        ("", "127.0.0.1", 403),
        # A name that an attacker's page has resolve to this machine.
        ("127.0.0.1", "evil.example:8000", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "localhost@evil.example", 403),
    ],
)
def test_without_keys_only_this_machine_comes_in(client, host, status):
    app = make_app()
    with client_of(app, client=(client, 1), host=host, authorization="Bearer anything") as caller:
        found = {caller(method, path, body).status_code for method, path, body in ASKING + OPEN[:2]}
    assert found == {status}


def test_with_keys_everybody_may_come(app):
    with client_of(app, client=("10.0.0.5", 1), host="kb.example", authorization=f"Bearer {ASKING_KEY}") as client:
        assert client.ask().status_code == 200


def test_only_admin_keys_keep_askers_out():
    app = make_app(keys=Keys.of(admin=[ADMIN_KEY]))
    assert statuses(app, ASKING) == {401}
    assert statuses(app, ASKING, authorization=f"Bearer {ADMIN_KEY}") == {200}


def test_only_asking_keys_keep_everybody_from_writing():
    app = make_app(keys=Keys.of(asking=[ASKING_KEY]))
    assert statuses(app, WRITING, authorization=f"Bearer {ASKING_KEY}") == {403}


def test_keys_come_from_the_environment_as_hashes():
    keys = Keys.from_environment({"KBLAM_API_KEYS": " a, b,,c\nd ", "KBLAM_ADMIN_KEYS": "e"})
    assert (len(keys.asking), len(keys.admin)) == (4, 1)
    assert keys == Keys.of(asking="abcd", admin="e")
    assert repr(keys) == "Keys(4 to ask, 1 to write)"
    assert all(len(each) == 32 for each in keys.asking + keys.admin)
    assert not Keys.from_environment({"KBLAM_API_KEYS": " , "})
    with pytest.raises(InputError) as error:
        Keys.from_environment({"KBLAM_ADMIN_KEYS": "schlüssel"})
    assert "schl" not in str(error.value)


def test_without_keys_only_loopback_is_listened_on():
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        Keys().check_host(host)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", ""):
        with pytest.raises(InputError, match="KBLAM_API_KEYS"):
            Keys().check_host(host)
        KEYS.check_host(host)
    assert not is_loopback("localhost.example.com")


@pytest.fixture
def log():
    """What the server writes to its log, as lines."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("gateway"))
    logger = logging.getLogger("kblam_ray")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_request_is_one_line_without_question_and_key(app, log):
    app.state.services.backend.__dict__.update(vars(memory_backend()))
    with client_of(app, authorization=f"Bearer {ASKING_KEY}") as client:
        response = client.ask("What is the capital of Kenya, my secret?", user="somebody")
        client.ask(stream=True)
        client("GET", f"{FACTS_PATH}?q=secret")
        client("POST", CHAT + "?secret=secret", {"secret": "secret"})
        client("GET", "/secret")
    lines = log()
    assert [line["endpoint"] for line in lines] == [CHAT, CHAT, "/v1/knowledge_bases/{name}/facts", CHAT, "none"]
    first = lines[0]
    assert first["request_id"] == response.headers["x-request-id"]
    assert (first["method"], first["status"], first["model"]) == ("POST", 200, f"tiny:{KB}")
    assert (first["kb_version"], first["prompt_tokens"], first["completion_tokens"]) == (1, 7, 6)
    assert first["seconds"] >= 0
    assert lines[1]["stream"]
    everything = json.dumps(lines)
    for hidden in (ASKING_KEY, "secret", "somebody", "Nairobi"):
        assert hidden not in everything


def test_a_defect_is_logged_under_its_request_id_without_keys(log):
    backend = memory_backend()
    backend.failures.before = ZeroDivisionError("a defect")
    with client_of(make_app(backend, keys=KEYS), authorization=f"Bearer {ASKING_KEY}") as client:
        response = client.ask()
    lines = log()
    assert {line["request_id"] for line in lines} == {response.headers["x-request-id"]}
    assert any("a defect" in line.get("exception", "") for line in lines)
    assert ASKING_KEY not in json.dumps(lines)


@pytest.mark.parametrize("given", ["abc-123", "A.b_c", "x" * 128])
def test_a_request_id_is_taken_over(app, given):
    with client_of(app, **{"x-request-id": given}) as client:
        assert client("GET", "/health").headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a,b", 'a"b', "ü".encode()])
def test_an_odd_request_id_is_replaced(app, given):
    with client_of(app, **{"x-request-id": given}) as client:
        found = client("GET", "/health").headers["x-request-id"]
    assert len(found) == 32
    assert found != given


def test_requests_are_counted_by_endpoint_and_status():
    app = make_app()
    with client_of(app) as client:
        client.ask()
        client.ask(n=0)
        client("GET", "/v1/models/tiny")
        for number in range(5):
            client("GET", f"/made/up/{number}")
    text = app.state.metrics.text()
    for endpoint, status, count in (
        (CHAT, 200, 1),
        (CHAT, 400, 1),
        ("/v1/models/{model:path}", 200, 1),
        ("none", 404, 5),
    ):
        labels = f'endpoint="{endpoint}",process="gateway-1",status="{status}"'
        assert f"kblam_requests_total{{{labels}}} {count}.0" in text
    assert f'kblam_request_seconds_count{{endpoint="{CHAT}",process="gateway-1"}} 2.0' in text
