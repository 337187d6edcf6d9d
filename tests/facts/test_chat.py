"""The chat helper over real sockets: what is retried, what is asked again, and what each failure is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import BaseModel, ConfigDict

from kblam_ray.errors import (
    ChatAnswerError,
    ChatAuthenticationError,
    ChatError,
    ChatQuotaError,
    InputError,
    KblamError,
)
from kblam_ray.facts.chat import ChatFields, ChatModel, Tokens
from tests.openai_chat_server import ChatServer, Reply, chat_server


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: str
    share: int


GOOD = Reply('{"colour": "teal", "share": 3}')


def settings(server: ChatServer, **changes: object) -> ChatFields:
    return ChatFields(chat_model="m", chat_url=server.url, chat_retries=2, chat_timeout_s=20, **changes)  # type: ignore[arg-type]


def in_turn(*replies: Reply) -> Callable[[dict[str, object]], Reply]:
    """The replies one after another, the last one for ever."""
    left = list(replies)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def test_an_answer_is_validated_and_counted() -> None:
    with chat_server(in_turn(GOOD)) as server:
        answer = ChatModel(settings(server)).ask("Be brief.", "Which colour?", Colour, seed=7)
    assert answer.value == Colour(colour="teal", share=3)
    assert answer.tokens == Tokens(100, 20, 0)
    (request,) = server.requests
    assert request["_path"] == "/v1/chat/completions"
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["seed"] == 7
    schema = request["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["additionalProperties"] is False
    assert set(schema["schema"]["required"]) == {"colour", "share"}


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=500, headers={"retry-after-ms": "1"}),
        Reply(status=503, headers={"retry-after-ms": "1"}),
        Reply("x", drop=True),
    ],
    ids=["429", "500", "503", "dropped"],
)
def test_passing_faults_are_survived(fault: Reply) -> None:
    with chat_server(in_turn(fault, GOOD)) as server:
        assert ChatModel(settings(server)).ask("i", "q", Colour).value.colour == "teal"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Reply("teal, of course"), "Invalid JSON"),
        (Reply('{"colour": "teal"}'), "share: Field required"),
        (Reply('{"colour": "teal", "share": 3, "extra": 1}'), "extra: Extra inputs"),
        (Reply('{"colour": "te', finish_reason="length"), "cut off"),
        (Reply(refusal="no"), "refused: no"),
        (Reply(""), "empty"),
        (Reply(raw=b"<html>oops"), "not JSON"),
        (Reply(raw=b'{"hello": 1}'), "not a chat completion"),
        (Reply(status=400, code="content_filter"), "content filter"),
    ],
)
def test_an_answer_of_the_wrong_form_is_asked_for_again_then_reported(bad: Reply, reason: str) -> None:
    with chat_server(in_turn(bad, GOOD)) as server:
        answer = ChatModel(settings(server)).ask("i", "q", Colour)
        assert answer.tokens.repeats == 1
    with (
        chat_server(in_turn(bad)) as server,
        pytest.raises(ChatAnswerError, match=rf"in 3 attempts.*{reason}"),
    ):
        ChatModel(settings(server)).ask("i", "q", Colour)
    assert len(server.requests) == 3


def test_the_model_is_told_what_was_wrong() -> None:
    with chat_server(in_turn(Reply('{"colour": 4, "share": 3}'), GOOD)) as server:
        ChatModel(settings(server)).ask("i", "q", Colour)
    told = server.requests[1]["messages"]
    assert told[2]["content"] == '{"colour": 4, "share": 3}'
    assert "colour: Input should be a valid string" in told[3]["content"]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=401), ChatAuthenticationError),
        (Reply(status=403), ChatAuthenticationError),
        (Reply(status=404), InputError),
        (Reply(status=429, code="insufficient_quota", headers={"retry-after-ms": "1"}), ChatQuotaError),
        (Reply(status=429, headers={"retry-after-ms": "1"}), ChatError),
        (Reply(status=500, headers={"retry-after-ms": "1"}), ChatError),
    ],
)
def test_lasting_faults_have_names(reply: Reply, error: type[KblamError]) -> None:
    with chat_server(in_turn(reply)) as server, pytest.raises(error, match="Help:"):
        ChatModel(settings(server)).ask("i", "q", Colour)


def test_an_endpoint_that_is_down_is_a_clear_error() -> None:
    with chat_server(in_turn(GOOD)) as server:
        model = ChatModel(settings(server))
    with pytest.raises(ChatError, match=r"no answer after 2 retries.*Connection"):
        model.ask("i", "q", Colour)


def test_azure_is_reached_by_its_own_path_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-key")
    with chat_server(in_turn(GOOD)) as server:
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url.removesuffix("/v1"))
        fields = ChatFields(chat_model="my-deployment", azure_api_version="2025-01-01")
        ChatModel(fields).ask("i", "q", Colour)
    assert server.requests[0]["_path"] == "/openai/deployments/my-deployment/chat/completions?api-version=2025-01-01"
    assert server.keys == ["azure-key"]


def test_what_is_missing_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="--chat-model"):
        ChatModel(ChatFields())
    with pytest.raises(ChatAuthenticationError, match="OPENAI_API_KEY"):
        ChatModel(ChatFields(chat_model="m"))
    with pytest.raises(InputError, match="AZURE_OPENAI_ENDPOINT"):
        ChatModel(ChatFields(chat_model="m", azure_api_version="1"))
    with pytest.raises(ChatAuthenticationError, match="AZURE_OPENAI_API_KEY"):
        ChatModel(ChatFields(chat_model="m", azure_api_version="1", chat_url="http://127.0.0.1:1"))
