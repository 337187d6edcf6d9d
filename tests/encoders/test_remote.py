"""Remote encoders against a server on loopback: each fault survived or named, each text embedded once."""

from __future__ import annotations

import email.utils
import time

import numpy as np
import pytest
from openai_server import Fault, OpenAIServer, no_quota, rate_limited, server_error, vector_of

from kblam_ray.encoders import encoder_spec, load_encoder, remote
from kblam_ray.encoders.remote_client import retry_after_s
from kblam_ray.errors import (
    EncoderAuthenticationError,
    EncoderError,
    EncoderNotFoundError,
    EncoderQuotaError,
    InputError,
)

SMALL = "openai:text-embedding-3-small"
TEXTS = [f"the capital of country {number}" for number in range(50)]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)


def expected(texts: list[str], dim: int = 1536) -> np.ndarray:
    return np.stack([vector_of(text, dim) for text in texts])


def test_batches_tokens_and_cost(openai_server: OpenAIServer) -> None:
    encoded = load_encoder(SMALL, request_texts=8).encode_batch(TEXTS)
    np.testing.assert_array_equal(encoded.embeddings_BP, expected(TEXTS))
    assert sorted(len(request["input"]) for request in openai_server.requests) == [2, 8, 8, 8, 8, 8, 8]
    assert encoded.tokens == sum(len(text.split()) for text in TEXTS)
    assert encoded.cost_usd == pytest.approx(encoded.tokens * 0.02e-6)
    assert set(openai_server.answered.values()) == {1}


def test_requests_stay_below_the_byte_bound(openai_server: OpenAIServer) -> None:
    texts = [f"{number} " + "ü" * 50_000 for number in range(5)]
    load_encoder(SMALL).encode(texts)
    assert sorted(len(request["input"]) for request in openai_server.requests) == [1, 2, 2]


@pytest.mark.parametrize(
    "fault",
    [
        rate_limited("0.02"),
        rate_limited(),
        server_error(500),
        server_error(503),
        Fault("status", 408),
        Fault("drop"),
        Fault("drop_midway"),
        Fault("cut_json"),
        Fault("shuffle"),
        Fault("missing"),
        Fault("doubled_index"),
        Fault("not_finite"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.headers.get('Retry-After')}",
)
def test_passing_faults_are_survived(openai_server: OpenAIServer, fault: Fault) -> None:
    openai_server.faults.extend([fault, fault])
    encoded = load_encoder(SMALL, request_texts=20, concurrency=2).encode_batch(TEXTS)
    np.testing.assert_array_equal(encoded.embeddings_BP, expected(TEXTS))
    assert openai_server.answered == {text: 1 for text in TEXTS}, "a text was embedded twice or never"


def test_only_what_is_missing_is_asked_again(openai_server: OpenAIServer) -> None:
    openai_server.faults.append(Fault("missing"))
    load_encoder(SMALL).encode(TEXTS)
    assert [request["input"] for request in openai_server.requests] == [TEXTS, TEXTS[1::2]]


def test_a_timeout_is_survived(openai_server: OpenAIServer) -> None:
    openai_server.faults.append(Fault("stall"))
    vectors = load_encoder(SMALL, timeout_s=0.3).encode(TEXTS[:2])
    np.testing.assert_array_equal(vectors, expected(TEXTS[:2]))


def test_retry_after_is_heeded_by_all_threads(openai_server: OpenAIServer) -> None:
    openai_server.faults.append(rate_limited("0.5"))
    started = time.monotonic()
    load_encoder(SMALL, request_texts=1, concurrency=1).encode(TEXTS[:3])
    assert time.monotonic() - started >= 0.5


def test_a_wait_beyond_the_cap_fails(openai_server: OpenAIServer) -> None:
    openai_server.faults.append(rate_limited("3600"))
    with pytest.raises(EncoderError, match=r"wait of 3600 s.*--max-wait-s"):
        load_encoder(SMALL).encode(TEXTS)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": email.utils.formatdate(0, usegmt=True)}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_formats(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_a_date_in_the_future(openai_server: OpenAIServer) -> None:
    seconds = retry_after_s({"retry-after": email.utils.formatdate(time.time() + 100, usegmt=True)})
    assert seconds is not None
    assert 50 < seconds <= 101


def test_attempts_are_bounded(openai_server: OpenAIServer) -> None:
    openai_server.always = server_error(502)
    with pytest.raises(EncoderError, match=r"after 3 attempts: HTTP 502"):
        load_encoder(SMALL, max_retries=2).encode(TEXTS[:1])
    assert len(openai_server.requests) == 3


def test_a_bad_key_is_named_at_once(openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(EncoderAuthenticationError, match="OPENAI_API_KEY"):
        load_encoder(SMALL).encode(TEXTS)
    assert len(openai_server.requests) == 1


def test_no_key_is_named_before_anything_is_sent(openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EncoderAuthenticationError, match="OPENAI_API_KEY"):
        load_encoder(SMALL).encode(TEXTS)
    assert openai_server.requests == []


def test_an_exhausted_quota_is_not_retried(openai_server: OpenAIServer) -> None:
    openai_server.always = no_quota()
    with pytest.raises(EncoderQuotaError, match="quota"):
        load_encoder(SMALL, request_texts=1, concurrency=2).encode(TEXTS)
    assert len(openai_server.requests) <= 4, "requests went on after the first refusal"


def test_the_first_failure_is_the_one_reported(openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # One request waits for its retry while the other learns that there is no quota.
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 60.0)
    openai_server.faults.extend([server_error(), no_quota()])
    with pytest.raises(EncoderQuotaError):
        load_encoder(SMALL, request_texts=25, concurrency=2).encode(TEXTS)


def test_an_unknown_model(openai_server: OpenAIServer) -> None:
    with pytest.raises(EncoderNotFoundError, match="does not exist"):
        load_encoder("openai:text-embedding-9@64").encode(TEXTS)


def test_a_refused_request_is_not_retried(openai_server: OpenAIServer) -> None:
    openai_server.always = Fault("status", 400, {}, None, "something else")
    with pytest.raises(EncoderError, match="something else"):
        load_encoder(SMALL).encode(TEXTS)
    assert len(openai_server.requests) == 1


def test_a_server_with_another_dimension(openai_server: OpenAIServer) -> None:
    openai_server.faults.append(Fault("wrong_dim"))
    with pytest.raises(EncoderError, match="1535 numbers"):
        load_encoder(SMALL).encode(TEXTS)


def test_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    with pytest.raises(EncoderError, match="still fails after 2 attempts"):
        load_encoder(SMALL, base_url="http://127.0.0.1:9/v1", max_retries=1).encode(TEXTS)


@pytest.mark.parametrize("tells_count", [True, False])
def test_a_text_beyond_the_limit_is_cut_and_reported(openai_server: OpenAIServer, tells_count: bool) -> None:
    openai_server.max_text_tokens, openai_server.tells_count = 40, tells_count
    texts = [*TEXTS[:9], "word " * 100, *TEXTS[9:20], "many " * 41]
    encoded = load_encoder(SMALL).encode_batch(texts)
    assert encoded.truncated == [9, 21]
    kept = [row for row in range(len(texts)) if row not in (9, 21)]
    np.testing.assert_array_equal(encoded.embeddings_BP[kept], expected([texts[row] for row in kept]))
    assert set(openai_server.answered.values()) == {1}
    (cut,) = (text for text in openai_server.answered if text.startswith("word"))
    assert 20 <= len(cut.split()) <= 40, "cut by more than half of what would have fitted"


def test_empty_texts_are_not_sent(openai_server: OpenAIServer) -> None:
    encoder = load_encoder(SMALL)
    vectors = encoder.encode(["", "Paris", " \n"])
    assert [request["input"] for request in openai_server.requests] == [["Paris"]]
    np.testing.assert_array_equal(vectors[1], vector_of("Paris", 1536))
    assert not vectors[[0, 2]].any()
    assert encoder.encode([]).shape == (0, 1536)


def test_a_shortened_dimension_is_asked_for(openai_server: OpenAIServer) -> None:
    encoder = load_encoder("text-embedding-3-large@256")
    np.testing.assert_array_equal(encoder.encode(TEXTS[:2]), expected(TEXTS[:2], 256))
    assert openai_server.requests[0]["dimensions"] == 256
    assert encoder.spec.name == "openai:text-embedding-3-large@256"
    load_encoder("text-embedding-3-large").encode(["x"])
    assert "dimensions" not in openai_server.requests[1]


def test_azure_uses_its_deployment_and_header(openai_server: OpenAIServer) -> None:
    encoder = load_encoder("azure:text-embedding-ada-002")
    encoded = encoder.encode_batch(TEXTS)
    np.testing.assert_array_equal(encoded.embeddings_BP, expected(TEXTS))
    assert openai_server.paths[0].startswith("/openai/deployments/text-embedding-ada-002/embeddings?api-version=")
    assert "api-key" in openai_server.headers[0]
    assert encoded.cost_usd == pytest.approx(encoded.tokens * 0.10e-6)


def test_azure_without_an_endpoint(openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT")
    with pytest.raises(InputError, match="AZURE_OPENAI_ENDPOINT"):
        load_encoder("azure:text-embedding-ada-002")


@pytest.mark.parametrize(
    "name",
    [
        "openai:nobody-knows",
        "openai:",
        "azure:our-deployment",
        "text-embedding-ada-002@64",
        "text-embedding-3-small@9999",
        "openai:x@y",
    ],
)
def test_names_that_say_too_little_or_too_much(name: str) -> None:
    with pytest.raises(InputError, match="Help:"):
        encoder_spec(name)


def test_specs_need_no_key_and_load_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    small = encoder_spec("text-embedding-3-small")
    assert (small.name, small.dim) == (SMALL, 1536)
    assert encoder_spec(small.name) == small
    assert encoder_spec("text-embedding-3-small@512").revision != small.revision
    deployed = encoder_spec("azure:ours=text-embedding-3-small")
    assert deployed.name == "azure:ours=text-embedding-3-small"
    assert deployed.revision == small.revision, "the same model at Azure is the same encoder"
    assert encoder_spec("openai:nomic@768").name == "openai:nomic@768"


def test_a_price_of_ones_own(openai_server: OpenAIServer) -> None:
    encoded = load_encoder(SMALL, usd_per_million_tokens=5.0).encode_batch(TEXTS)
    assert encoded.cost_usd == pytest.approx(encoded.tokens * 5e-6)
