"""The question prior against its formula, fact by fact."""

from __future__ import annotations

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_samples import ENCODER, FACTS, tiny_adapter, tiny_llama

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.encoders import load_encoder
from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec
from kblam_ray.errors import EncoderError, EncoderMismatchError, InputError
from kblam_ray.facts.fact import key_text
from kblam_ray.model import mentions
from kblam_ray.model import prior as prior_module
from kblam_ray.model.mentions import EntityIndex
from kblam_ray.model.prior import QuestionPrior

QUESTION = "What is the capital of Peru?"
ENTITIES = [entity for entity, _, _ in FACTS]


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter(tiny_llama())


def memory_of(adapter, scale=1.0, dtype=torch.float32, **settings) -> KnowledgeMemory:
    """The sample facts; keys of different lengths where `scale` has several numbers."""
    encoder = load_encoder(ENCODER)
    keys = encoder.encode([key_text(entity, property) for entity, property, _ in FACTS])
    values = encoder.encode([value for _, _, value in FACTS])
    rows = [{"entity": entity, "property": property, "value": value} for entity, property, value in FACTS]
    keys = keys * np.asarray(scale, np.float32).reshape(-1, 1)
    return KnowledgeMemory.from_embeddings(
        adapter, keys, values, **{"facts": rows, "fact_ids": np.arange(10, 10 + len(FACTS)), "dtype": dtype, **settings}
    )


def cosines(memory, question) -> np.ndarray:
    """One fact after the other, in float64."""
    asked = load_encoder(ENCODER).encode([question])[0].astype(float)
    found = []
    for view in memory.views:
        rows = view.live_positions()
        for row in range(view.chunk.num_rows) if rows is None else rows:
            key = view.chunk.keys_MP[row].double().numpy()
            found.append(asked @ key / np.linalg.norm(asked) / np.linalg.norm(key) if key.any() else 0.0)
    return np.array(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_scores_are_beta_times_the_cosine(adapter, dtype, chunk_rows, monkeypatch):
    monkeypatch.setitem(prior_module.BLOCK_ROWS, "cpu", 4)
    memory = memory_of(adapter, [1, 2, 0.5, 0, 3, 1], dtype, chunk_rows=chunk_rows)
    scores = QuestionPrior(load_encoder(ENCODER), beta=7.0).scores(memory, QUESTION)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), 7 * cosines(memory, QUESTION), atol=1e-5)
    assert memory.fact_ids[scores.argmax()] == 11  # the capital of Peru


def test_gamma_is_added_where_the_question_names_the_entity(adapter):
    memory = memory_of(adapter)
    encoder = load_encoder(ENCODER)
    scores = QuestionPrior(encoder, beta=2.0, gamma=5.0).scores(memory, QUESTION)
    named = np.array([entity == "Peru" for entity in ENTITIES])
    np.testing.assert_allclose(scores.numpy(), 2 * cosines(memory, QUESTION) + 5 * named, atol=1e-5)
    only_words = QuestionPrior(encoder, gamma=5.0).scores(memory, QUESTION)
    np.testing.assert_allclose(only_words.numpy(), 5 * named)


@pytest.mark.parametrize("chosen", [[10], [15, 11, 12], [10, 11, 12, 13, 15]])
def test_selections_are_scored_in_their_own_order(adapter, chosen):
    prior = QuestionPrior(load_encoder(ENCODER), beta=3.0, gamma=1.0)
    whole = dict(zip(range(10, 16), prior.scores(memory_of(adapter), QUESTION).tolist(), strict=True))
    part = memory_of(adapter, chunk_rows=4).select(chosen)
    scores = prior.scores(part, QUESTION)
    np.testing.assert_allclose(scores, [whole[fact_id] for fact_id in part.fact_ids.tolist()], atol=1e-6)


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (1.0, 3.0), (-1.0, 0.0)])
@pytest.mark.parametrize("num", [1, 3, 6, 100])
def test_similar_keeps_the_largest(adapter, beta, gamma, num):
    memory = memory_of(adapter, chunk_rows=4)
    prior = QuestionPrior(load_encoder(ENCODER), beta=beta, gamma=gamma)
    rank = (beta or 1) * cosines(memory, QUESTION) + gamma * np.array([entity == "Peru" for entity in ENTITIES])
    expected = memory.fact_ids[np.argsort(-rank, kind="stable")[:num]]
    assert prior.similar(memory, QUESTION, num).tolist() == expected.tolist()
    request = prior.apply(memory, QUESTION, num)
    assert sorted(request.fact_ids.tolist()) == sorted(expected.tolist())
    if beta or gamma:
        whole = dict(zip(memory.fact_ids.tolist(), prior.scores(memory, QUESTION).tolist(), strict=True))
        kept = torch.cat([view_prior[view_prior > float("-inf")] for view_prior in request.priors])
        np.testing.assert_allclose(kept, [whole[fact_id] for fact_id in request.fact_ids.tolist()], atol=1e-6)
    else:
        assert request.priors is None


def test_of_equal_facts_the_first_are_kept(adapter):
    keys = np.ones((50, 64), np.float32)
    memory = KnowledgeMemory.from_embeddings(adapter, keys, keys)
    prior = QuestionPrior(load_encoder(ENCODER))
    assert prior.similar(memory, QUESTION, 7).tolist() == list(range(7))


def test_nothing_to_do_is_the_memory_itself(adapter):
    memory = memory_of(adapter)
    assert QuestionPrior(Failing()).apply(memory, QUESTION) is memory
    assert QuestionPrior(Failing()).apply(memory, QUESTION, 6) is memory
    empty = memory.select([])
    assert QuestionPrior(Failing(), beta=1.0).apply(empty, QUESTION, 3) is empty
    assert len(QuestionPrior(load_encoder(ENCODER), beta=1.0).scores(empty, QUESTION)) == 0


MESSAGES = [
    {"role": "user", "content": "Tell me about Peru."},
    {"role": "assistant", "content": "What about it?"},
    {"role": "user", "content": "Its capital."},
]


def test_the_question_is_the_last_user_message_or_the_last_two():
    encoder = load_encoder(ENCODER)
    assert QuestionPrior(encoder).question(MESSAGES) == "Its capital."
    assert QuestionPrior(encoder, context="last_two").question(MESSAGES) == "Tell me about Peru.\nIts capital."
    assert QuestionPrior(encoder, context="last_two").question(MESSAGES[:2]) == "Tell me about Peru."
    with pytest.raises(InputError, match="no message of the user"):
        QuestionPrior(encoder).question(MESSAGES[1:2])
    with pytest.raises(InputError, match="context"):
        QuestionPrior(encoder, context="all")


class Failing(Encoder):
    spec = EncoderSpec(name="failing", revision="0", dim=64)

    def encode_batch(self, texts):
        raise EncoderError("the encoder is down", help="start it")


class Constant(Encoder):
    def __init__(self, value, dim=64):
        self.spec = EncoderSpec(name="constant", revision="0", dim=dim)
        self._value = value

    def encode_batch(self, texts):
        return EncodedBatch(np.full((len(texts), self.spec.dim), self._value, np.float32))


def test_an_encoder_that_cannot_answer_is_an_error(adapter):
    memory = memory_of(adapter)
    with pytest.raises(EncoderError, match="down"):
        QuestionPrior(Failing(), beta=1.0).apply(memory, QUESTION)
    for value in (0.0, np.nan):
        with pytest.raises(EncoderError, match="norm"):
            QuestionPrior(Constant(value), beta=1.0).apply(memory, QUESTION)
    with pytest.raises(EncoderMismatchError):
        QuestionPrior(Constant(1.0, dim=32), beta=1.0).apply(memory, QUESTION)


def test_what_else_is_refused(adapter):
    memory = memory_of(adapter, facts=None)
    with pytest.raises(InputError, match="no texts"):
        QuestionPrior(load_encoder(ENCODER), gamma=1.0).scores(memory, QUESTION)
    with pytest.raises(InputError, match="0 facts"):
        QuestionPrior(load_encoder(ENCODER)).similar(memory, QUESTION, 0)


def named(entities, question):
    import pyarrow as pa

    rows = EntityIndex(pa.table({"entity": pa.array(entities, pa.string())})).named_in(question)
    return [entities[row] for row in rows]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Who is the founder of ur?", ["Ur"]),
        ("What is the capital of the Ural region?", []),
        ("PERU and  france", ["France", "Peru", "Peru"]),
        ("Who wrote C++?", ["C++"]),
        ("peru's capital", ["Peru", "Peru"]),
        ("北京的人口是多少", ["北京"]),
        ("", []),
    ],
)
def test_whole_words_in_any_case(question, expected):
    assert named(ENTITIES, question) == expected


def test_case_folding_and_blanks():
    assert named(["Straße", "New  York", None, "  "], "in NEW YORK, STRASSE") == ["Straße", "New  York"]


@given(
    st.lists(st.text("ab ß-", min_size=1, max_size=4), min_size=1, max_size=8),
    st.text("abAB ßs-.", max_size=14),
)
def test_the_index_finds_what_a_search_of_every_entity_finds(entities, question):
    text = " ".join(question.casefold().split())
    expected = []
    for entity in entities:
        folded = " ".join(entity.casefold().split())
        start, end = (r"(?<!\w)" if folded[:1].isalnum() else ""), (r"(?!\w)" if folded[-1:].isalnum() else "")
        if folded and re.search(start + re.escape(folded) + end, text):
            expected.append(entity)
    assert named(entities, question) == expected


def test_the_index_goes_with_its_chunk(adapter):
    memory = memory_of(adapter)
    prior = QuestionPrior(load_encoder(ENCODER), gamma=1.0)
    prior.scores(memory, QUESTION)
    index = weakref.ref(mentions._ENTITIES[memory.views[0].chunk])
    del memory
    gc.collect()
    assert index() is None
