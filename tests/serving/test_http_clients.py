"""The official `openai` client and LangChain's chat class, unmodified, against a real server with the real model."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from http_samples import ADMIN_KEY, ASKING_KEY, KEYS, memory_backend, serving, serving_made, wait_until
from http_samples import make_app as app_over
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from serving_samples import ANSWER, QUESTION, UNANSWERABLE, demo_model, make_kb

from kblam_ray.errors import (
    ConflictError,
    ContextLengthError,
    NotServedError,
    OverloadedError,
    UnavailableError,
)
from kblam_ray.serving.local import LocalBackend
from kblam_ray.serving.settings import LimitSettings, ServeSettings
from kblam_ray.serving.wanted import KbSpec

KB = "capitals"
MODEL = f"kblam:{KB}"
ASKED = [{"role": "user", "content": QUESTION}]
VERBATIM = {"grounding": "verbatim"}
SHORT = 24
"""Tokens: so small a model goes on and on where a conversation is not like those it was trained on."""


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return make_kb(tmp_path_factory.mktemp("http")).uri


@pytest.fixture(scope="module")
def address(uri):
    model = demo_model()
    settings = ServeSettings(limits=LimitSettings(min_version_wait_s=0.1))

    @asynccontextmanager
    async def make():
        async with LocalBackend(settings, {KB: KbSpec(uri)}, model) as backend:
            yield app_over(backend, keys=KEYS)

    with serving_made(make) as address:
        yield address


@pytest.fixture
def client(address):
    with OpenAI(base_url=f"{address}/v1", api_key=ADMIN_KEY, max_retries=0) as client:
        yield client


def ask(client, messages=ASKED, model=MODEL, max_tokens=SHORT, **fields):
    return client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, **fields)


def test_chat(client):
    answer = ask(client, extra_body=VERBATIM)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.kb_version, answer.refused) == (0, False)
    best = answer.citations[0]
    assert (best["entity"], best["property"], best["value"]) == ("Kenya", "capital", "Nairobi")
    assert best["metadata"] == {"source": "atlas"}
    assert 0 < best["score"] <= 1
    assert answer._request_id


def test_a_refusal(client):
    answer = ask(client, [{"role": "user", "content": UNANSWERABLE}], extra_body=VERBATIM)
    assert answer.refused
    assert answer.citations == []
    assert answer.choices[0].message.content


def test_a_conversation_goes_on_with_the_servers_own_message(client):
    first = ask(client, extra_body=VERBATIM).choices[0].message
    messages = [{"role": "system", "content": "Be brief."}, *ASKED, first]
    messages.append({"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]})
    assert "Paris" in ask(client, messages, extra_body=VERBATIM).choices[0].message.content


@pytest.mark.parametrize("grounding", ["off", "cite", "verbatim"])
def test_a_stream_says_what_the_answer_says(client, grounding):
    body = {"grounding": grounding}
    whole = ask(client, extra_body=body)
    stream = ask(client, extra_body=body, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    last = chunks[-1]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.kb_version, last.refused, last.citations) == (whole.kb_version, whole.refused, whole.citations)


def test_a_stream_with_usage(client):
    *_, before, last = ask(client, stream=True, stream_options={"include_usage": True}, extra_body=VERBATIM)
    assert before.choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens > 0
    assert last.citations


def test_sampling_parameters(client):
    drawn = {"temperature": 1.0, "seed": 5, "top_p": 0.9, "n": 2, "max_tokens": 5, "extra_body": {"grounding": "off"}}
    first, second = ([choice.message.content for choice in ask(client, **drawn).choices] for _ in range(2))
    assert first == second
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=4, extra_body={"grounding": "off"})
    tokens = answer.choices[0].logprobs.content
    assert answer.choices[0].finish_reason == "length"
    assert len(tokens) == answer.usage.completion_tokens == 4
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    stopped = ask(client, stop=" of", extra_body={"grounding": "off"}).choices[0].message.content
    assert " of" not in stopped


def test_models(client):
    assert [model.id for model in client.models.list()] == ["kblam", MODEL]
    assert client.models.retrieve(f"{MODEL}@0").id == f"{MODEL}@0"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_the_asynchronous_client(address):
    async def run():
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key=ASKING_KEY, max_retries=0) as client:
            answers = await asyncio.gather(*(ask(client, extra_body=VERBATIM) for _ in range(5)))
            text = ""
            async for chunk in await ask(client, stream=True, extra_body=VERBATIM):
                text += chunk.choices[0].delta.content or ""
            models = [model.id async for model in client.models.list()]
            return {answer.choices[0].message.content for answer in answers}, text, models

    assert asyncio.run(run()) == ({ANSWER}, ANSWER, ["kblam", MODEL])


def test_langchain(address):
    chat = ChatOpenAI(
        base_url=f"{address}/v1", api_key=ASKING_KEY, model=MODEL, extra_body=VERBATIM, max_tokens=SHORT, max_retries=0
    )
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] > 0
    followed = chat.invoke([HumanMessage(QUESTION), AIMessage(ANSWER), HumanMessage("What is the capital of Peru?")])
    assert "Lima" in followed.content
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == ANSWER
    with_usage = list(chat.stream(QUESTION, stream_usage=True))
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in with_usage) > 0

    async def stream():
        return "".join([chunk.content async for chunk in chat.astream(QUESTION)])

    assert asyncio.run(stream()) == ANSWER


def test_errors_have_the_clients_types(address, client):
    def says(error, **fields):
        with pytest.raises(error) as caught:
            ask(client, **fields)
        return caught.value

    assert says(openai.NotFoundError, model="kblam:rivers").code == "model_not_found"
    assert says(openai.NotFoundError, model=f"{MODEL}@99").code == "model_not_found"
    assert says(openai.BadRequestError, frequency_penalty=1.0).param == "frequency_penalty"
    assert says(openai.BadRequestError, n=9).param == "n"
    assert says(openai.UnprocessableEntityError, temperature="hot").param == "temperature"
    assert says(openai.ConflictError, extra_body={"min_kb_version": 9}).code == "conflict"
    too_long = [{"role": "user", "content": "word " * 3_000}]
    assert says(openai.BadRequestError, messages=too_long).code == "context_length_exceeded"
    assert says(openai.BadRequestError, messages=too_long, stream=True).code == "context_length_exceeded"
    assert says(openai.BadRequestError, logprobs=True, extra_body=VERBATIM).code == "unsupported_parameter"
    assert says(openai.BadRequestError, model="kblam", extra_body=VERBATIM).code == "bad_input"
    with OpenAI(base_url=f"{address}/v1", api_key="sk-unknown", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(stranger)
        assert caught.value.code == "invalid_api_key"
    with (
        OpenAI(base_url=f"{address}/v1", api_key=ASKING_KEY, max_retries=0) as asker,
        pytest.raises(openai.PermissionDeniedError),
    ):
        asker.delete(f"/knowledge_bases/{KB}", cast_to=object)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OverloadedError, openai.RateLimitError),
        (UnavailableError, openai.InternalServerError),
        (ConflictError, openai.ConflictError),
        (NotServedError, openai.NotFoundError),
        (ContextLengthError, openai.BadRequestError),
    ],
)
def test_a_backends_errors_have_the_clients_types(error, kind):
    backend = memory_backend()
    backend.failures.before = error("it did not work", help="ask again")
    with (
        serving(app_over(backend, retry_after_s=3)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                ask(client, model="tiny:capitals", stream=stream)
            expected = "3" if issubclass(error, OverloadedError | UnavailableError) else None
            assert caught.value.response.headers.get("retry-after") == expected


def test_an_error_in_a_stream_is_raised_where_it_is_read():
    backend = memory_backend()
    backend.failures.error, backend.failures.after_pieces = UnavailableError("the replica died", help="ask again"), 2
    with (
        serving(app_over(backend)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = ask(client, model="tiny:capitals", stream=True)
        read = [next(stream).choices[0].delta.content for _ in range(3)]
        assert read == ["", "The", " capital"]
        with pytest.raises(openai.APIError, match="the replica died"):
            next(stream)


def test_the_clients_own_timeout_frees_the_server():
    backend = memory_backend()
    backend.gate.clear()
    with (
        serving(app_over(backend)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=1) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            ask(client, model="tiny:capitals")
        wait_until(lambda: (backend.num_running, backend.num_cancelled) == (0, 1))


def test_the_client_asks_again_when_it_may():
    backend = memory_backend()
    backend.failures.before = OverloadedError("full", help="ask again")

    def relieve(response):
        backend.failures.before = None

    with (
        serving(app_over(backend, retry_after_s=1)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=1) as client,
    ):
        client._client.event_hooks = {"response": [relieve]}
        assert ask(client, model="tiny:capitals").choices[0].message.content.endswith("Nairobi.")


def test_facts_change_while_it_runs(address, client):
    """Written, seen by every later answer, rolled back, and deleted, with a plain HTTP client."""
    path = f"{address}/v1/knowledge_bases/{KB}"
    spain = {"entity": "Spain", "property": "capital", "value": "Madrid", "metadata": {"by": "test"}}
    messages = [{"role": "user", "content": "What is the capital of Spain?"}]
    with httpx.Client(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as http:
        uri = http.get(path).json()["uri"]
        assert ask(client, messages, extra_body=VERBATIM).refused
        written = http.post(f"{path}/facts?wait=true", json={"facts": [spain]}).json()
        assert written == {"kb_version": 1, "added": 1, "changed": 0, "unchanged": 0}
        answer = ask(client, messages, extra_body=VERBATIM | {"min_kb_version": 1})
        assert "Madrid" in answer.choices[0].message.content
        assert (answer.kb_version, answer.citations[0]["metadata"]) == (1, {"by": "test"})
        (found,) = http.get(f"{path}/facts", params={"q": "madrid"}).json()["data"]
        assert found == {"fact_id": answer.citations[0]["fact_id"], **spain}

        pinned = http.put(f"{path}?wait=true", json={"uri": uri, "version": 0}).json()
        assert (pinned["version"], pinned["pinned"]) == (0, True)
        assert ask(client, messages, extra_body=VERBATIM).kb_version == 0
        assert ask(client, messages, model=f"{MODEL}@1", extra_body=VERBATIM).kb_version == 1
        assert http.post(f"{path}/facts", json={"facts": [spain]}).status_code == 409
        assert http.put(f"{path}?wait=true", json={"uri": uri, "version": None}).json()["version"] == 1

        deleted = http.delete(f"{path}/facts/{found['fact_id']}?wait=true").json()
        assert deleted == {"kb_version": 2, "deleted": 1}
        assert ask(client, messages, extra_body=VERBATIM).refused
        assert http.delete(f"{path}/facts/{found['fact_id']}").status_code == 404
        assert http.put(path, json={"uri": f"{uri}-none"}).status_code == 404
        assert http.get(f"{address}/health").json()["status"] == "ok"
        text = http.get(f"{address}/metrics").text
        assert f'kblam_kb_version{{kb="{KB}",process="local"}} 2.0' in text
