"""Chat completions: what is asked of the backend, what comes back, and what is refused by name."""

from __future__ import annotations

import json

import pytest
from http_samples import ADMIN_KEY, KB, KEYS, MODEL, client_of, events_of, make_app, memory_backend

from kblam_ray.serving.http.schema.chat_answer import ChatCompletion, ChatCompletionChunk
from kblam_ray.serving.http.schema.chat_request import ChatRequest
from kblam_ray.serving.messages import KbRef, Sampling


@pytest.fixture
def backend():
    return memory_backend()


@pytest.fixture
def client(backend):
    with client_of(make_app(backend)) as client:
        yield client


def test_an_answer_has_version_citations_and_usage(client):
    answer = ChatCompletion.model_validate(client.ask().json())
    assert answer.choices[0].message.content == "The capital of Kenya is Nairobi."
    assert answer.model == f"{MODEL}:{KB}"
    assert answer.kb_version == 1
    assert not answer.refused
    (citation,) = answer.citations
    assert (citation.entity, citation.value, citation.metadata) == ("Kenya", "Nairobi", {"source": "atlas"})
    assert citation.fact_id.lstrip("-").isdigit()
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")


def test_a_refusal_is_a_text_and_says_so(client):
    answer = client.ask("What is the capital of Atlantis?").json()
    assert answer["refused"]
    assert answer["citations"] == []
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "I do not know that.", "refusal": None}


def test_the_base_model_alone_has_no_version(client, backend):
    answer = client.ask(model=MODEL).json()
    assert answer["kb_version"] is None
    assert backend.questions[0].kb is None
    assert backend.questions[0].grounding == "off"


def test_a_version_in_the_models_name_is_asked_for(client, backend):
    old = client.ask("What is the currency code of Kenya?", model=f"{MODEL}:{KB}@0").json()
    assert (old["kb_version"], old["refused"]) == (0, True)
    assert backend.questions[0].kb == KbRef(KB, 0)


def test_every_parameter_reaches_the_backend(client, backend):
    client.ask(
        temperature=0.5,
        top_p=0.25,
        max_tokens=30,
        max_completion_tokens=20,
        stop=["a", "b"],
        seed=-3,
        n=2,
        logprobs=True,
        top_logprobs=2,
        grounding="off",
        selection="similar:7",
        max_citations=0,
        min_kb_version=1,
    )
    (asked,) = backend.questions
    assert asked.sampling == Sampling(0.5, 0.25, 20, ("a", "b"), -3, 2, 2)
    assert (asked.grounding, asked.selection, asked.max_citations, asked.min_kb_version) == ("off", "similar:7", 0, 1)


def test_null_is_the_default(client, backend):
    nulls = dict.fromkeys(ChatRequest.model_fields.keys() - {"model", "messages"})
    assert client.ask(**nulls).status_code == client.ask().status_code == 200
    first, second = backend.questions
    assert (first.sampling, first.grounding, first.max_citations) == (Sampling(), "cite", 5)
    assert first.request_id != second.request_id


def test_the_servers_own_grounding_is_the_default(backend):
    with client_of(make_app(backend, grounding="verbatim")) as client:
        client.ask()
        client.ask(model=MODEL)
        client.ask(grounding="cite")
    assert [question.grounding for question in backend.questions] == ["verbatim", "off", "cite"]


def test_messages_are_joined_and_developers_are_the_system(client, backend):
    parts = [{"type": "text", "text": "capital of "}, {"type": "text", "text": "Kenya?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        # As the official client hands a message of ours back.
        {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": parts},
    ]
    assert client.ask(messages=messages).status_code == 200
    assert [dict(message) for message in backend.questions[0].messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "capital of Kenya?"},
    ]


@pytest.mark.parametrize(
    "harmless",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "auto"},
        {"store": False, "metadata": {}, "service_tier": "auto", "user": "me", "stop": [], "max_tokens": 5.0},
    ],
)
def test_values_that_change_nothing_are_taken(client, harmless):
    assert client.ask(**harmless).status_code == 200


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unknown_parameter"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 9}, "n", "bad_input"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, None, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"grounding": "maybe"}, "grounding", "invalid_value"),
        ({"selection": "similar:0"}, "selection", "invalid_value"),
        ({"selection": "all\n"}, "selection", "invalid_value"),
        ({"max_citations": -1}, "max_citations", "invalid_value"),
        ({"min_kb_version": -1}, "min_kb_version", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name", "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "unsupported_parameter",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, backend, wrong, param, code):
    response = client.ask(**wrong)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"
    assert not backend.questions


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"stream": 1}, "stream"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        ({"model": None}, "model"),
    ],
)
def test_another_shape_is_unprocessable(client, backend, wrong, param):
    response = client.ask(**wrong)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert not backend.questions


@pytest.mark.parametrize("name", ["other", "tiny:", "tiny:rivers", "tiny:capitals@", "tiny:capitals@9", "tiny:a/b"])
@pytest.mark.parametrize("stream", [False, True])
def test_another_model_is_not_found(client, name, stream):
    response = client.ask(model=name, stream=stream)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


def test_several_choices_have_their_own_citations(client):
    answer = ChatCompletion.model_validate(client.ask(n=3).json())
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.citations == answer.citations for choice in answer.choices)
    assert "citations" not in client.ask().json()["choices"][0]


def test_log_probabilities(client):
    (choice,) = client.ask(logprobs=True, top_logprobs=2).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"]) == ("The", [84, 104, 101])
    assert [top["bytes"] for top in first["top_logprobs"]] == [[84, 104, 101], [195, 169]]
    assert client.ask().json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("has_usage", [False, True])
def test_a_stream_says_the_same_as_an_answer(client, num_choices, has_usage):
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    response = client.ask(stream=True, n=num_choices, logprobs=True, **options)
    assert response.headers["content-type"].startswith("text/event-stream")
    whole = client.ask(n=num_choices, logprobs=True).json()
    *events, done = events_of(response.text)
    assert done == (None, "[DONE]")
    chunks = [json.loads(data) for _, data in events]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        assert ("usage" in chunk) == has_usage
        assert (chunk["id"], chunk["created"]) == (chunks[0]["id"], chunks[0]["created"])
    *before, last = chunks
    assert {name: last[name] for name in ("kb_version", "refused", "citations")} == {
        name: whole[name] for name in ("kb_version", "refused", "citations")
    }
    assert not any("citations" in chunk for chunk in before)
    assert last["choices"] == [] if has_usage else last["choices"][0]["finish_reason"] == "stop"
    assert not has_usage or (last["usage"] == whole["usage"] and all(chunk["usage"] is None for chunk in before))
    for choice in whole["choices"]:
        own = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["stop"]
        tokens = [token for each in own if each["logprobs"] for token in each["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]
        assert num_choices == 1 or own[-1]["citations"] == choice["citations"]


def test_models_are_the_base_and_each_knowledge_base(client):
    models = client("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == [MODEL, f"{MODEL}:{KB}"]
    for name in (MODEL, f"{MODEL}:{KB}", f"{MODEL}:{KB}@0", f"{MODEL}:{KB}@1"):
        assert client("GET", f"/v1/models/{name}").json()["id"] == name
    for name in ("other", f"{MODEL}:rivers", f"{MODEL}:{KB}@2", f"{MODEL}:{KB}@-1"):
        response = client("GET", f"/v1/models/{name}")
        assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


def test_a_base_model_may_have_a_slash_in_its_name(backend):
    backend.model_name = "org/tiny"
    with client_of(make_app(backend)) as client:
        assert client("GET", f"/v1/models/org/tiny:{KB}").status_code == 200
        assert client("GET", f"/v1/models/org%2Ftiny:{KB}").status_code == 200
        assert client.ask(model=f"org/tiny:{KB}").json()["kb_version"] == 1


def test_keys_are_asked_for_before_anything_is_read(backend):
    with client_of(make_app(backend, keys=KEYS)) as client:
        assert client("POST", "/v1/chat/completions", content=b"not JSON").status_code == 401
        assert client("POST", "/v1/chat/completions?x=1", {"n": "x"}).status_code == 401
    with client_of(make_app(backend, keys=KEYS), authorization=f"Bearer {ADMIN_KEY}") as client:
        assert client.ask().status_code == 200
