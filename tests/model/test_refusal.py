"""The refusal decision: what its features say of questions, and how weights and threshold make a decision of them."""

from __future__ import annotations

import math

import pytest
import torch
from model_samples import ENCODER, llama_tokenizer, make_kb, tiny_adapter, tiny_llama

from kblam_ray.attention import retrieval_evidence, retrieval_scores
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import AdapterError, InputError
from kblam_ray.model import KnowledgeModel
from kblam_ray.model.refusal import (
    ATTENTION_FEATURES,
    FEATURES,
    PRIOR_FEATURES,
    TEXT_FEATURES,
    evidence,
    evidence_batch,
    is_refusal,
    statistic,
)
from kblam_ray.table import KnowledgeBase

QUESTION = "What is the capital of Peru?"


@pytest.fixture
def model():
    base = tiny_llama()
    return KnowledgeModel(base, tiny_adapter(base, "shared", question_prior=60.0), llama_tokenizer())


@pytest.fixture(scope="module")
def kb_uri(tmp_path_factory):
    return make_kb(tmp_path_factory.mktemp("refusal") / "kb").uri


def features_of(model, memory, question):
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return evidence(model, model.chat.render(messages), model.prepare(memory, messages), messages)


def test_every_feature_by_its_definition(model, kb_uri):
    memory = model.load(kb_uri)
    found = features_of(model, memory, QUESTION)
    assert tuple(found) == FEATURES
    prompt = torch.tensor([model.chat.render([{"role": "user", "content": QUESTION}])])
    request = model.prepare(memory, QUESTION)
    logits = retrieval_evidence(model.attachment, prompt, request).logits_M.double().sort(descending=True).values
    rivals = [*logits[1:].tolist(), *[min(float(logits[0]), 0.0)] * (11 - len(logits))]
    cosines = model.prior.cosines(memory, QUESTION)
    scores = retrieval_scores(model.attachment, prompt, request)
    best = int(scores.argmax())
    others = sorted((float(cosine) for place, cosine in enumerate(cosines) if place != best), reverse=True)
    others += [0.0] * (10 - len(others))
    expected = {
        "score": float(logits[0]),
        "score_margin": float(logits[0] - logits[1]),
        "score_lead": float(logits[0]) - sum(rivals) / 10,
        "score_spread": float(torch.logsumexp(logits, 0) - logits[0]),
        "share": float(scores.max()),
        "log_facts": math.log(memory.num_facts),
        "cosine": float(cosines[best]),
        "cosine_margin": float(cosines[best]) - others[0],
        "cosine_lead": float(cosines[best]) - sum(others) / 10,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    assert 0 < found["kb_share"] <= 1
    # A lexical prior does not change what the cosine is.
    model.adapter.configure(prior_lexical=3.0)
    assert features_of(model, memory, QUESTION)["cosine"] == pytest.approx(expected["cosine"], abs=1e-5)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (QUESTION, {"entity_named": 1, "property_named": 1, "pair_named": 1, "other_property": 0, "extended": 0}),
        ("What is the capital of Peruu?", {"entity_named": 0, "entity_similarity": 0.75, "pair_named": 1}),
        ("What is the capital of New Peru?", {"entity_named": 1, "strange_words": 1, "extended": 1}),
        ("What is the capital of Peru II?", {"strange_words": 1, "extended": 1, "pair_named": 1}),
        ("Who is the author of Peru?", {"pair_named": 0}),
        ("What is the capital of Zanzibar Major Xy?", {"pair_named": 0, "strange_words": 3, "extended": 0}),
        ("北京的country?", {"entity_named": 1, "property_named": 1, "pair_named": 1, "strange_words": 0}),
    ],
)
def test_words_tell_what_is_asked_from_what_is_alike(model, kb_uri, question, expected):
    found = features_of(model, model.load(kb_uri), question)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("question", "is_named"), [("AI是什么?", 1), ("What is AI?", 1), ("What is the price of AI?", 0)]
)
def test_who_asks_what_something_is_names_its_description(model, tmp_path, question, is_named):
    kb = KnowledgeBase.create(str(tmp_path / "one"), ENCODER)
    kb.upsert([{"entity": "AI", "property": "description", "value": "人工智能是模拟人类智能的技术"}])
    assert features_of(model, model.load(kb.uri), question)["pair_named"] == is_named


def test_another_property_than_the_best_facts(model, kb_uri):
    memory = model.load(kb_uri)
    (france,) = [at for at, row in enumerate(memory.lookup(memory.fact_ids)) if row["entity"] == "France"]
    found = features_of(model, memory.select(memory.fact_ids[[france]]), "What is the population of France?")
    assert (found["entity_named"], found["property_named"], found["other_property"]) == (1, 0, 1)
    # The table's other properties count although their facts are not selected; none is named here.
    paraphrase = features_of(model, memory.select(memory.fact_ids[[france]]), "Where does France have its seat?")
    assert (paraphrase["property_named"], paraphrase["other_property"]) == (0, 0)


def test_a_follow_up_names_its_entity_in_the_message_before(model, kb_uri):
    memory = model.load(kb_uri)
    conversation = [
        {"role": "user", "content": "What is the population of Peru?"},
        {"role": "assistant", "content": "34 million"},
        {"role": "user", "content": "And the capital?"},
    ]
    model.adapter.configure(prior_context="last_two")
    found = features_of(model, memory, conversation)
    assert (found["entity_named"], found["pair_named"]) == (1, 1)
    alone = features_of(model, memory, conversation[-1:])
    assert (alone["entity_named"], alone["pair_named"]) == (0, 0)


def test_what_cannot_be_had_is_left_out_and_never_zero(model, kb_uri):
    memory = model.load(kb_uri)
    numbers = KnowledgeMemory.from_embeddings(model.adapter, torch.eye(64)[:3], torch.eye(64)[:3])
    assert set(features_of(model, numbers, QUESTION)) == {*ATTENTION_FEATURES, *PRIOR_FEATURES}
    model.adapter.configure(question_prior=0.0)
    assert set(features_of(model, memory, QUESTION)) == {*ATTENTION_FEATURES, *TEXT_FEATURES}
    model.adapter.configure(refusal_weights={"bias": 0.0, "cosine": 1.0, "pair_named": 1.0}, refusal_threshold=0.5)
    assert set(features_of(model, memory, QUESTION)) == set(FEATURES)
    with pytest.raises(InputError, match="needs pair_named"):
        model.ask(QUESTION, numbers, max_new_tokens=1)
    with pytest.raises(AdapterError, match="no bias"):
        model.adapter.configure(refusal_weights={"share": 1.0})
    assert features_of(model, memory.select([]), QUESTION) == {}


def test_the_statistic(model):
    config = model.adapter.config
    assert statistic(config, {}) == 0
    assert statistic(config, {"share": 0.3, "score": 9.0}) == 0.3
    weighted = config.changed(refusal_weights={"bias": -1.0, "share": 2.0, "score": 0.5})
    assert statistic(weighted, {"share": 0.25, "score": 3.0, "cosine": 7.0}) == pytest.approx(1 / (1 + math.exp(-1)))
    for score, expected in ((1e6, 1.0), (-1e6, 0.0)):
        assert statistic(weighted, {"share": 0.0, "score": score}) == expected
    with pytest.raises(InputError, match="needs nonsense"):
        statistic(config.changed(refusal_weights={"bias": 0.0, "nonsense": 1.0}), {"share": 1.0})


@pytest.mark.parametrize("grounding", ["off", "cite", "verbatim"])
def test_weights_decide_in_every_grounding_at_one_pass_each(model, kb_uri, grounding):
    memory = model.load(kb_uri)
    model.adapter.configure(refusal_weights={"bias": -4.0, "pair_named": 8.0}, refusal_threshold=0.5)
    prompt = len(model.chat.render([{"role": "user", "content": QUESTION}]))
    lengths = []
    hook = model.base_model.model.layers[0].register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1])
    )
    answer = model.ask(QUESTION, memory, grounding=grounding, max_new_tokens=3)
    hook.remove()
    assert not answer.refused
    # Generation and the pass for evidence and citations; verbatim reads another prompt, and one token at a time each.
    assert sum(length >= prompt for length in lengths) == 2
    refused = model.ask("What is the diameter of Xyzzy?", memory, grounding=grounding, max_new_tokens=3)
    assert refused.refused
    assert (refused.text == model.adapter.config.refusal_text) is (grounding == "verbatim")
    assert (refused.citations != ()) is (grounding == "cite")


def test_a_batch_is_the_questions_one_by_one(model, kb_uri):
    memory = model.load(kb_uri)
    questions = [QUESTION, "Who is the author of C++?"]
    prompts = [model.chat.render([{"role": "user", "content": question}]) for question in questions]
    memories = [model.prepare(memory, question) for question in questions]
    both = evidence_batch(model, prompts, memories, questions)
    assert both == [features_of(model, memory, question) for question in questions]
    with pytest.raises(ValueError, match="shorter"):
        evidence_batch(model, prompts, memories, questions[:1])


def test_one_fact_alone_has_rivals_at_the_average(model, tmp_path):
    kb = KnowledgeBase.create(str(tmp_path / "kb"), ENCODER)
    kb.upsert([{"entity": "AI", "description": "人工智能"}])
    found = features_of(model, model.load(kb), "AI是什么?")
    assert found["share"] == pytest.approx(1.0)
    assert found["log_facts"] == found["score_spread"] == 0
    assert found["cosine_margin"] == pytest.approx(max(found["cosine"], 0.0))
    assert found["score_margin"] == pytest.approx(max(found["score"], 0.0))


def test_refusals_are_compared_by_their_words():
    assert is_refusal(" i do  NOT know", "I do not know.")
    assert not is_refusal("I do not know Paris.", "I do not know.")
