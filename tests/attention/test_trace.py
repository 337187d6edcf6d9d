"""The shares that a trace reports are those of the full softmax over [facts | text], found without making it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import (
    FORMS,
    KINDS,
    VOCABULARY,
    PlainFacts,
    plainly,
    random_facts,
    random_ids,
    small_blocks,
    tiny_adapter,
    tiny_llama,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kblam_ray.attention import attach, mean_shares, retrieval_scores, trace
from kblam_ray.errors import AdapterMismatchError, InputError

DOUBLE = torch.float64
HIDDEN = float("-inf")
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


def full_shares(model, adapter, ids, rows, **inputs) -> dict[int, list[torch.Tensor]]:
    """Per KB layer and row all shares [N, T, M + S] of one softmax."""
    with torch.no_grad(), plainly(model, adapter, rows) as plain:
        model(ids, use_cache=False, **inputs)
    shares = {layer: plain[layer].shares for layer in adapter.config.layers}
    for parts in shares.values():
        for part_NTS in parts:
            torch.testing.assert_close(part_NTS.sum(-1), torch.ones_like(part_NTS[..., 0]))
    return shares


def prior_of(num_facts: int, hidden=(), seed: int = 5) -> torch.Tensor:
    prior_M = torch.randn(num_facts, generator=torch.Generator().manual_seed(seed))
    prior_M[list(hidden)] = HIDDEN
    return prior_M


CASES = ("plain", "chunks", "hidden", "prior", "all hidden", "sparse", "dense", "one fact", "sparse with prior")


def case_of(name: str, adapter, form: str):
    """A memory and its facts as matrices, in the order of the memory's `fact_ids`."""
    facts = random_facts(1 if name == "one fact" else 14, dtype=DOUBLE)
    ids = [10 * i + 3 for i in range(len(facts))]
    if name in ("prior", "all hidden"):
        hidden = range(14) if name == "all hidden" else (2, 9)
        facts = replace(facts, prior_M=prior_of(14, hidden))
    sizes = [] if name in ("plain", "one fact") else [8, 4]
    memory = facts.memory(adapter, form, sizes=sizes, fact_ids=ids)
    kept = {
        "hidden": range(0, 14, 2),
        "sparse": [1, 13],
        "dense": [0, 1, 2, 5, 6, 7, 9],
        "sparse with prior": [1, 4, 13],
    }
    if name in kept:
        memory = memory.select(np.array([ids[place] for place in kept[name]]))
        facts = replace(facts.take(kept[name]), num_counted=14)
    if name == "sparse with prior":
        facts = replace(facts, prior_M=prior_of(3))
        memory = memory.with_prior(facts.prior_M)
    expected = [ids[place] for place in kept.get(name, range(len(ids)))]
    assert memory.fact_ids.tolist() == expected
    return memory, facts


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [5, 18])  # latent, and with a block's keys made on the fly
def test_every_share_and_the_largest_of_each_token(model, adapter, attachment, name, form, num_tokens):
    memory, facts = case_of(name, adapter, form)
    ids = random_ids(1, num_tokens)
    full = full_shares(model, adapter, ids, [facts])
    for blocks in (small_blocks, nullcontext):
        for layers in (None, [2]):
            with blocks():
                shares_M = mean_shares(attachment, ids, memory, 3, layers=layers)
                scores_M = retrieval_scores(attachment, ids, memory, layers=layers)
            check_means(shares_M, scores_M, [full[layer][0][..., : len(facts)] for layer in layers or LAYERS])
    for top_n in (1, 3, 20):
        with small_blocks():
            found = trace(attachment, ids, memory, 3, top_n)
        assert found.layers == LAYERS
        assert found.fact_ids.shape == found.shares.shape == (1, 2, num_tokens - 3, top_n)
        assert found.kb_shares.shape == (1, 2, num_tokens - 3)
        check_row(found, 0, full, facts, memory.fact_ids, 3, num_tokens)


def check_means(shares_M, scores_M, full: list[torch.Tensor]) -> None:
    """Means over tokens (from the one before position 3 to the one before the last), heads and layers."""
    assert shares_M.dtype == scores_M.dtype == torch.float32
    expected_M = torch.stack([part_NTM[:, 2:-1] for part_NTM in full]).mean((0, 1, 2))
    torch.testing.assert_close(shares_M, expected_M.float(), rtol=1e-5, atol=1e-8)
    last_LNM = torch.stack([part_NTM[:, -1] for part_NTM in full])
    expected_M = (last_LNM / last_LNM.sum(-1, keepdim=True)).nan_to_num(0.0).mean((0, 1))
    torch.testing.assert_close(scores_M, expected_M.float(), rtol=1e-5, atol=1e-8)


def check_row(found, row: int, full, facts: PlainFacts | None, fact_ids, answer_start: int, num_tokens: int) -> None:
    """One row of a trace against the full softmax: shares, whose they are, and all that is beyond its answer."""
    top_n = found.shares.shape[-1]
    num_facts = 0 if facts is None else len(facts)
    for place, layer in enumerate(found.layers):
        shares_TM = full[layer][row][:, answer_start - 1 : num_tokens - 1, :num_facts].mean(0)
        torch.testing.assert_close(
            found.kb_shares[row, place, : len(shares_TM)], shares_TM.sum(-1).float(), rtol=1e-5, atol=1e-8
        )
        for token, shares_M in enumerate(shares_TM):
            order = shares_M.argsort(descending=True, stable=True)[:top_n]
            order = order[shares_M[order] > 0]
            shares_n = torch.zeros(top_n)
            ids_n = torch.zeros(top_n, dtype=torch.int64)
            shares_n[: len(order)] = shares_M[order].float()
            ids_n[: len(order)] = torch.tensor(np.asarray(fact_ids)[order.numpy()]) if len(order) else 0
            torch.testing.assert_close(found.shares[row, place, token], shares_n, rtol=1e-5, atol=1e-8)
            assert found.fact_ids[row, place, token].tolist() == ids_n.tolist()
        assert found.shares[row, place, len(shares_TM) :].eq(0).all()
        assert found.fact_ids[row, place, len(shares_TM) :].eq(0).all()
        assert found.kb_shares[row, place, len(shares_TM) :].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_memories_priors_paddings_and_answers_of_their_own(model, adapter, attachment, form):
    first, second = random_facts(9, dtype=DOUBLE), random_facts(4, seed=1, dtype=DOUBLE)
    favoured = replace(first, prior_M=prior_of(9, [3]))
    rows = [first, None, favoured, second, random_facts(0, dtype=DOUBLE), first]
    shared = first.memory(adapter, form, sizes=[5])
    memories = [shared, None, shared.with_prior(favoured.prior_M), second.memory(adapter, form), None, shared]
    memories[4] = rows[4].memory(adapter, form)
    ids = random_ids(6, 8)
    mask = torch.ones_like(ids)
    mask[3, :3] = mask[5, :2] = 0
    starts = [3, 4, 6, 5, 3, 8]  # the last row's answer is empty
    full = full_shares(model, adapter, ids, [facts if facts else None for facts in rows], attention_mask=mask)
    with small_blocks():
        found = trace(attachment, ids, memories, starts, 4, attention_mask=mask)
    assert found.shares.shape == (6, 2, 5, 4)
    for row, (facts, memory) in enumerate(zip(rows, memories, strict=True)):
        fact_ids = [] if memory is None else memory.fact_ids
        check_row(found, row, full, facts, fact_ids, starts[row], 8)


def test_all_shares_and_the_texts_sum_to_one(model, adapter, attachment):
    memory, _ = case_of("chunks", adapter, "latent")
    ids = random_ids(1, 6)
    found = trace(attachment, ids, memory, 2, 14)
    torch.testing.assert_close(found.shares.sum(-1), found.kb_shares)
    assert found.kb_shares.gt(0.01).all()
    assert found.kb_shares.lt(0.9).any()
    torch.testing.assert_close(mean_shares(attachment, ids, memory, 2).sum(), found.kb_shares.mean())
    torch.testing.assert_close(retrieval_scores(attachment, ids, memory).sum(), torch.tensor(1.0))


def test_retrieval_layers_are_the_adapters_by_default(model):
    adapter = tiny_adapter(model, "paper", dtype=DOUBLE, retrieval_layers=[2])
    attachment = attach(model, adapter)
    memory, ids = random_facts(6, dtype=DOUBLE).memory(adapter), random_ids(1, 5)
    assert trace(attachment, ids, memory, 3).layers == (2,)
    assert torch.equal(mean_shares(attachment, ids, memory, 3), mean_shares(attachment, ids, memory, 3, layers=[2]))
    assert not torch.equal(mean_shares(attachment, ids, memory, 3), mean_shares(attachment, ids, memory, 3, layers=[0]))
    attachment.detach()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_precision_of_serving(implementation, dtype):
    exact, model = tiny_llama(dtype=DOUBLE), tiny_llama(dtype=dtype, implementation=implementation)
    for kind in KINDS:
        adapter, facts, ids = tiny_adapter(model, kind), random_facts(6), random_ids(1, 6)
        attachment = attach(model, adapter)
        memory = facts.memory(adapter, dtype=torch.float16)
        full = full_shares(exact, adapter, ids, [facts])
        expected_M = torch.stack([full[layer][0][:, 2:5, :6] for layer in LAYERS]).mean((0, 1, 2))
        found_M = mean_shares(attachment, ids, memory, 3)
        assert (found_M - expected_M).abs().max() < (2e-3 if dtype == torch.float32 else 5e-2)
        attachment.detach()


def test_nothing_is_left_after_a_trace(model, adapter, attachment):
    memory, ids = random_facts(6, dtype=DOUBLE).memory(adapter), random_ids(1, 5)
    with torch.no_grad():
        plain, expected = model(ids).logits, model(ids, knowledge=memory).logits
        trace(attachment, ids, memory, 2)
        assert torch.equal(model(ids).logits, plain)
        other = random_facts(6, seed=3, dtype=DOUBLE).memory(adapter)
        with attachment.using(other):
            # The memory traced is the one given, whatever is in use around it.
            mean_shares(attachment, ids, memory, 2)
            assert torch.equal(model(ids).logits, model(ids, knowledge=other).logits)
        assert torch.equal(model(ids, knowledge=memory).logits, expected)
    assert torch.is_grad_enabled()
    assert not mean_shares(attachment, ids, memory, 2).requires_grad


def test_no_facts(model, adapter, attachment):
    ids = random_ids(2, 5)
    for knowledge in (None, [None, None], random_facts(0, dtype=DOUBLE).memory(adapter)):
        found = trace(attachment, ids, knowledge, 2, 3)
        assert found.shares.eq(0).all()
        assert found.fact_ids.eq(0).all()
        assert found.kb_shares.eq(0).all()
        assert found.shares.shape == (2, 2, 3, 3)
    nothing = random_facts(0, dtype=DOUBLE).memory(adapter)
    assert mean_shares(attachment, ids[:1], nothing, 2).shape == (0,)
    assert retrieval_scores(attachment, ids[:1], nothing).shape == (0,)


def test_an_empty_answer_has_no_shares(model, adapter, attachment):
    memory, ids = random_facts(6, dtype=DOUBLE).memory(adapter), random_ids(1, 5)
    assert trace(attachment, ids, memory, 5, 3).shares.shape == (1, 2, 0, 3)
    assert mean_shares(attachment, ids, memory, 5).eq(0).all()


@pytest.mark.parametrize("start", [0, -1, 6, [1, 0], [1], [1, 2, 3]])
def test_answers_that_begin_nowhere(model, adapter, attachment, start):
    memory = random_facts(6, dtype=DOUBLE).memory(adapter)
    with pytest.raises(InputError, match="answers that begin at"):
        trace(attachment, random_ids(2, 5), memory, start)


def test_other_wrong_input(model, adapter, attachment):
    memory, ids = random_facts(6, dtype=DOUBLE).memory(adapter), random_ids(2, 5)
    with pytest.raises(InputError, match=r"\[1\] are not KB layers"):
        trace(attachment, ids, memory, 2, layers=[0, 1])
    with pytest.raises(InputError, match="a batch of 2 rows"):
        mean_shares(attachment, ids, memory, 2)
    with pytest.raises(InputError, match="a batch of 2 rows"):
        retrieval_scores(attachment, ids, memory)
    for top_n in (0, -1):
        with pytest.raises(InputError, match="top_n"):
            trace(attachment, ids, memory, 2, top_n)
    with pytest.raises(InputError, match="3 knowledge memories for a batch of 2"):
        trace(attachment, ids, [memory] * 3, 2)
    stranger = random_facts(6, dtype=DOUBLE).memory(tiny_adapter(model, adapter.config.kind, dtype=DOUBLE))
    with pytest.raises(AdapterMismatchError, match="not attached"):
        mean_shares(attachment, ids[:1], stranger, 2)


def test_no_more_logits_than_needed_are_made(model, adapter, attachment):
    memory, made = random_facts(5, dtype=DOUBLE).memory(adapter), []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[1]))
    trace(attachment, random_ids(2, 7), memory, 2)
    mean_shares(attachment, random_ids(1, 7), memory, 2)
    hook.remove()
    assert made == [1, 1]


class _Largest(TorchDispatchMode):
    """The most numbers that any operation made; views of what there was are not made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {part.untyped_storage().data_ptr() for part in tree_leaves((args, kwargs)) if torch.is_tensor(part)}
        for part in tree_leaves(result):
            if torch.is_tensor(part) and part.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, part.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
def test_tokens_times_facts_exist_at_no_time(model, adapter, attachment, form):
    num_facts, num_tokens, budget = 800, 24, 1_024
    memory = random_facts(num_facts, dtype=DOUBLE).memory(adapter, form).with_prior(prior_of(num_facts))
    other = memory.with_prior(prior_of(num_facts, seed=6))
    ids = random_ids(2, num_tokens)
    with small_blocks(budget, rows=64), torch.no_grad():
        model(ids, knowledge=memory)  # what is kept for the facts is made here: it is not of the tokens
        with _Largest() as largest:
            trace(attachment, ids, [memory, other], 4, 5)
            mean_shares(attachment, ids[:1], memory, 4)
            retrieval_scores(attachment, ids[:1], memory)
    # A block of scores, the model's own tensors, and one number per fact for each of the two priors.
    assert largest.numbers <= max(budget, 2 * num_tokens * VOCABULARY, 2 * num_facts)
