"""Scores of many prompts in one forward pass are those of each by itself."""

from __future__ import annotations

import pytest
import torch
from model_samples import FACTS, llama_tokenizer, make_kb, tiny_adapter, tiny_llama

from kblam_ray.attention.prompt_trace import retrieval_evidence
from kblam_ray.attention.trace import retrieval_scores
from kblam_ray.errors import InputError
from kblam_ray.evaluation.retrieval import evidence_of, padded
from kblam_ray.model import KnowledgeModel

QUESTIONS = ["What is the capital of Peru?", "Who?", "Tell me the population of Peru, please: how many live there?"]


@pytest.fixture(params=["paper", "shared"])
def model(request):
    base = tiny_llama()
    return KnowledgeModel(base, tiny_adapter(base, request.param), llama_tokenizer())


def prompts_of(model):
    return [model.chat.render([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("form", ["latent", "materialized"])
def test_a_batch_equals_its_rows(model, tmp_path, has_prior, form):
    if has_prior:
        model.adapter.configure(question_prior=3.0, prior_lexical=0.5)
    kb = make_kb(tmp_path / "kb")
    memory = model.load(kb, form=form)
    kb.delete([("Ur", "founder")])
    kb.upsert([{"entity": "Lima", "property": "country", "value": "Peru"}])
    memory = model.refresh(memory, kb)  # two chunks, a fact hidden in one
    memories = [model.prepare(memory, question) for question in QUESTIONS]
    prompts = prompts_of(model)
    found = evidence_of(model.attachment, prompts, memories)
    for row, (prompt, one) in enumerate(zip(prompts, memories, strict=True)):
        ids = torch.tensor([prompt])
        expected = retrieval_evidence(model.attachment, ids, one)
        assert len(found[row].scores_M) == len(FACTS)
        torch.testing.assert_close(found[row].scores_M, expected.scores_M, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[row].logits_M, expected.logits_M, rtol=1e-4, atol=1e-4)
        assert found[row].kb_share == pytest.approx(expected.kb_share, rel=1e-4)
        scores = retrieval_scores(model.attachment, ids, one)
        torch.testing.assert_close(found[row].scores_M, scores, rtol=1e-4, atol=1e-6)
        assert float(found[row].scores_M.sum()) == pytest.approx(1, abs=1e-5)


def test_rows_hidden_by_a_prior_have_no_score(model, tmp_path):
    memory = model.load(make_kb(tmp_path / "kb"))
    prior = torch.zeros(len(FACTS))
    prior[2] = float("-inf")
    found = evidence_of(model.attachment, prompts_of(model), [memory.with_prior(prior), memory, memory])
    assert found[0].scores_M[2] == 0
    assert found[0].logits_M[2] == float("-inf")
    assert found[1].scores_M[2] > 0


def test_rows_must_have_the_same_facts(model, tmp_path):
    memory = model.load(make_kb(tmp_path / "kb"))
    prompts = prompts_of(model)
    with pytest.raises(InputError, match="3 prompts"):
        evidence_of(model.attachment, prompts, [memory, memory.select(memory.fact_ids[:2]), memory])
    with pytest.raises(InputError, match="1 memories"):
        evidence_of(model.attachment, prompts, [memory])


def test_padding_stands_where_it_is_asked_for():
    ids, mask = padded([[1, 2, 3], [4]], left=True, pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = padded([[1, 2, 3], [4]], left=False)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
