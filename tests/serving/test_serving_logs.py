"""Logs of the server: every line is JSON, carries the id of its request, and never a key."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from kblam_ray.serving.logs import JsonFormatter, JsonHandler, access_log, configure_logging, redacted, request_id_var

KEY = "sk-proj-Ab_9.x~y+z/w=="
ODD_KEY = "correct,horse;battery'staple"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Where the process logs to; logging is as before afterwards."""
    root, own = logging.getLogger(), logging.getLogger("kblam_ray")
    before = root.handlers[:], root.level, own.level
    stream = io.StringIO()
    configure_logging("gateway", stream=stream)
    yield stream
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def read(stream: io.StringIO) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in stream.getvalue().split("\n") if line]


def test_a_line_says_when_who_and_what(lines):
    logging.getLogger("kblam_ray.serving.library").info("loaded %s in %.1f s", "wörld\u2028\udc80\nnext", 1.5)
    [line] = read(lines)
    assert lines.getvalue().isascii()
    assert lines.getvalue().count("\n") == 1
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "role": "gateway",
        "logger": "kblam_ray.serving.library",
        "message": "loaded wörld\u2028\udc80\nnext in 1.5 s",
    }


def test_other_libraries_are_heard_from_warning_up(lines):
    logging.getLogger("httpx").info("noise")
    logging.getLogger("httpx").warning("trouble")
    logging.getLogger("kblam_ray.x").debug("detail")
    assert [line["message"] for line in read(lines)] == ["trouble"]


def test_lines_carry_the_id_of_their_own_request(lines):
    async def request(name: str, entered: asyncio.Event, other: asyncio.Event) -> None:
        request_id_var.set(name)
        entered.set()
        await other.wait()
        logging.getLogger("kblam_ray.serving").info("work of %s", name)

    async def both() -> None:
        a, b = asyncio.Event(), asyncio.Event()
        await asyncio.gather(request("r-a", a, b), request("r-b", b, a))
        logging.getLogger("kblam_ray.serving").info("outside")

    asyncio.run(both())
    found = {line["message"]: line.get("request_id") for line in read(lines)}
    assert found == {"work of r-a": "r-a", "work of r-b": "r-b", "outside": None}
    assert "request_id" not in read(lines)[-1]


def test_an_access_line(lines):
    token = request_id_var.set("r-1")
    access_log(
        method="POST", endpoint="/v1/chat/completions", status=200, seconds=0.123456, model="m:kb", kb_version=None
    )
    request_id_var.reset(token)
    [line] = read(lines)
    assert line["message"] == "POST /v1/chat/completions 200"
    assert (line["status"], line["seconds"], line["model"], line["request_id"]) == (200, 0.1235, "m:kb", "r-1")
    assert "kb_version" not in line


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {KEY}",
        f"authorization: {ODD_KEY.replace(chr(39), '')}",
        f"{{'authorization': 'Bearer {KEY}', 'host': 'x'}}",
        f"(b'authorization', b'Bearer {KEY}')",
        f"Proxy-Authorization=Basic {KEY}",
        f"token was bearer   {ODD_KEY}",
        f"GET /v1/models?api_key={KEY}&x=1",
        f"Bearer%20{KEY}",
        f"OPENAI_API_KEY='{KEY}'",
        f"x-api-key: {ODD_KEY.replace(chr(39), '')}",
        f"KBLAM_ADMIN_KEYS={KEY},{KEY}2",
        f"Incorrect API key provided: {KEY}.",
        f'"{KEY}"',
    ],
)
def test_keys_are_redacted(text):
    found = redacted(text)
    assert "[redacted]" in found
    for secret in (KEY, ODD_KEY, "proj-Ab", "horse", "staple", "battery"):
        assert secret not in found


@pytest.mark.parametrize(
    "text", ["the task-7 failed on disk-1", "the capital of Kenya", "authorization failed", "set KBLAM_API_KEYS first"]
)
def test_other_text_is_left_alone(text):
    assert redacted(text) == text


def test_no_key_comes_through_arguments_fields_or_tracebacks(lines):
    log = logging.getLogger("kblam_ray.serving.http")
    log.warning("refused %r", {"Authorization": f"Bearer {KEY}"})
    log.warning("headers", extra={"headers": [(b"authorization", ODD_KEY.encode()), (b"host", b"x")]})
    log.warning("mapping", extra={"given": {"Authorization": ODD_KEY, "n": float("nan")}, "deep": {"a": [KEY]}})
    log.warning("an object", extra={"error": ValueError(f"Bearer {ODD_KEY}")})
    try:
        raise ValueError(f"Authorization: Bearer {KEY}")
    except ValueError:
        log.exception("it failed")
    log.warning("with a stack", stack_info=True)
    found = read(lines)
    assert len(found) == 6
    assert found[2]["given"]["n"] == "nan"
    assert "ValueError" in found[4]["exception"]
    assert "test_no_key_comes_through" in found[5]["stack"]
    assert KEY not in lines.getvalue()
    assert ODD_KEY not in lines.getvalue()
    assert "battery" not in lines.getvalue()


def test_a_message_that_does_not_fit_its_arguments_is_written_without_keys():
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "too few arguments %s %s", (f"Bearer {KEY}",), None)
    line = json.loads(JsonFormatter("gateway").format(record))
    assert line["message"].startswith("too few arguments")
    assert KEY not in line["message"]


def test_configuring_again_replaces_the_handler(lines):
    again = io.StringIO()
    configure_logging("writer", stream=again)
    logging.getLogger("kblam_ray.serving").info("once")
    assert lines.getvalue() == ""
    assert [line["role"] for line in read(again)] == ["writer"]
    assert sum(isinstance(handler, JsonHandler) for handler in logging.getLogger().handlers) == 1


def test_a_line_that_cannot_be_written_says_so_without_its_arguments(lines, capsys):
    lines.close()
    logging.getLogger("kblam_ray.serving").warning("refused %s", f"Bearer {KEY}")
    said = capsys.readouterr().err
    assert "kblam_ray.serving could not be written: ValueError" in said
    assert KEY not in said
