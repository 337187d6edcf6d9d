"""One run over a conversation gives what separate runs give: evidence at the prompt's end, shares of the answer."""

from __future__ import annotations

import pytest
import torch
from tiny import FORMS, KINDS, plainly, random_facts, random_ids, small_blocks, tiny_adapter, tiny_llama

from kblam_ray.attention import (
    PromptTrace,
    attach,
    evidence_and_shares,
    mean_shares,
    retrieval_evidence,
    retrieval_scores,
)
from kblam_ray.errors import InputError

DOUBLE = torch.float64
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=DOUBLE)


@pytest.fixture(params=KINDS)
def adapter(request, model):
    return tiny_adapter(model, request.param, dtype=DOUBLE)


@pytest.fixture
def attachment(model, adapter):
    attachment = attach(model, adapter)
    yield attachment
    attachment.detach()


def memory_of(adapter, form="latent", num_facts=14, prior=False):
    facts = random_facts(num_facts, dtype=DOUBLE)
    memory = facts.memory(adapter, form, sizes=[8, 4] if num_facts == 14 else [])
    if num_facts == 14:
        memory = memory.select(memory.fact_ids[[0, 1, 4, 9, 10, 13]])
    if prior:
        prior_M = torch.randn(memory.num_facts, generator=torch.Generator().manual_seed(4))
        prior_M[2] = float("-inf")
        memory = memory.with_prior(prior_M)
    return memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("num_tokens", [6, 18])  # latent, and with a block's keys made on the fly
def test_it_is_what_separate_passes_give(adapter, attachment, form, prior, num_tokens):
    memory, prompt, answer = memory_of(adapter, form, prior=prior), random_ids(1, num_tokens), random_ids(1, 4)
    ids = torch.cat([prompt, answer], 1)
    scores_M = retrieval_scores(attachment, prompt, memory)
    shares_M = mean_shares(attachment, ids, memory, num_tokens)
    with small_blocks():
        evidence, at_once_M = evidence_and_shares(attachment, ids, memory, num_tokens)
        traced = PromptTrace(attachment, prompt, memory)
        later_M = traced.answer(answer)
    for found in (evidence, traced.evidence, retrieval_evidence(attachment, prompt, memory)):
        torch.testing.assert_close(found.scores_M, scores_M)
        assert 0 < found.kb_share < 1
        assert torch.isinf(found.logits_M).nonzero().flatten().tolist() == ([2] if prior else [])
    torch.testing.assert_close(at_once_M, shares_M)
    torch.testing.assert_close(later_M, shares_M)
    assert traced.shares is later_M


def test_logits_are_those_of_the_softmax_without_the_prior(model, adapter, attachment):
    prompt = random_ids(1, 6)
    plain, given = (memory_of(adapter, num_facts=9, prior=prior) for prior in (False, True))
    layer = [2]
    evidence = retrieval_evidence(attachment, prompt, plain, layers=layer)
    with torch.no_grad(), plainly(model, adapter, [random_facts(9, dtype=DOUBLE)]) as found:
        model(prompt, use_cache=False)
    shares_NM = found[2].shares[0][:, -1, :9]
    # Differences of logits are those of log shares, head by head.
    expected_M = shares_NM.log().mean(0)
    torch.testing.assert_close(
        evidence.logits_M - evidence.logits_M[0], (expected_M - expected_M[0]).float(), rtol=1e-4, atol=1e-5
    )
    assert evidence.kb_share == pytest.approx(float(shares_NM.sum(-1).mean()), abs=1e-6)
    other = retrieval_evidence(attachment, prompt, given.select(given.fact_ids[[0, 4, 5]]), layers=[0])
    torch.testing.assert_close(
        other.logits_M, retrieval_evidence(attachment, prompt, plain, layers=[0]).logits_M[[0, 4, 5]]
    )


def test_a_base_model_without_a_cache_runs_the_prompt_again(adapter, attachment, monkeypatch):
    memory, prompt, answer = memory_of(adapter), random_ids(1, 6), random_ids(1, 4)
    traced = PromptTrace(attachment, prompt, memory)
    assert traced._cache is not None
    traced._cache = None
    expected = mean_shares(attachment, torch.cat([prompt, answer], 1), memory, 6)
    torch.testing.assert_close(traced.answer(answer), expected)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_answers(adapter, attachment, length):
    memory, prompt, answer = memory_of(adapter), random_ids(1, 6), random_ids(1, 2)[:, :length]
    expected = mean_shares(attachment, torch.cat([prompt, answer], 1), memory, 6)
    torch.testing.assert_close(PromptTrace(attachment, prompt, memory).answer(answer), expected)
    _, shares_M = evidence_and_shares(attachment, torch.cat([prompt, answer], 1), memory, 6)
    torch.testing.assert_close(shares_M, expected)


def test_the_prompt_runs_once(model, adapter, attachment):
    memory, lengths = memory_of(adapter), []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    PromptTrace(attachment, random_ids(1, 6), memory).answer(random_ids(1, 4))
    evidence_and_shares(attachment, random_ids(1, 10), memory, 6)
    hook.remove()
    assert lengths == [6, 3, 10]


def test_no_facts(adapter, attachment):
    nothing, ids = random_facts(0, dtype=DOUBLE).memory(adapter), random_ids(1, 5)
    traced = PromptTrace(attachment, ids, nothing)
    assert traced.evidence.scores_M.shape == traced.evidence.logits_M.shape == traced.answer(ids).shape == (0,)
    assert traced.evidence.kb_share == 0


def test_wrong_input(adapter, attachment):
    memory = memory_of(adapter)
    for ids in (random_ids(2, 5), random_ids(1, 5)[:, :0]):
        with pytest.raises(InputError, match="prompt of shape"):
            retrieval_evidence(attachment, ids, memory)
    for start in (0, 6):
        with pytest.raises(InputError, match="an answer that begins at"):
            evidence_and_shares(attachment, random_ids(1, 5), memory, start)
