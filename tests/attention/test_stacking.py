"""Rows with knowledge bases of their own, stacked: the same numbers and gradients as one row after the other."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny import DIM, FORMS, KINDS, plain_logits, random_facts, random_ids, tiny_adapter, tiny_llama

from kblam_ray.attention import KnowledgeMemory, attach, stacking
from kblam_ray.attention.batch import ForwardPass, segments_of_rows
from kblam_ray.attention.groups import groups_of
from kblam_ray.attention.projections import Projections
from kblam_ray.attention.stacking import Stack, alike
from kblam_ray.attention.trace import mean_shares, trace

DOUBLE = torch.float64
HIDDEN = float("-inf")


@contextmanager
def one_after_the_other():
    """Every group stands alone: the loop that stacks are measured against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardPass, "_stacked", lambda forward, dtype: list(forward.groups))
        yield


@contextmanager
def counted_stacks():
    """The groups of each stack that is made."""
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        attend = Stack.attend
        patch.setattr(Stack, "attend", lambda stack, *args: made.append(len(stack.groups)) or attend(stack, *args))
        yield made


@dataclass
class Rows:
    """Rows of a batch: some with facts of their own, two that share them, priors, selections, chunks, and none."""

    memories: list
    leaves: list[torch.Tensor]


def rows_of(adapter, form: str, sizes: list[int], *, with_gradient: bool = True, **given) -> Rows:
    memories, leaves = [], []
    for seed, size in enumerate(sizes):
        facts = random_facts(size, seed=seed, dtype=DOUBLE)
        facts = replace(facts, **{name: getattr(facts, name).requires_grad_(with_gradient) for name in PARTS})
        leaves += [getattr(facts, name) for name in PARTS]
        memories.append(facts.memory(adapter, form, sizes=[2] if seed % 2 else None, **given))
    return Rows(memories, leaves)


PARTS = ("keys_MP", "values_MP")


def mixed(rows: Rows) -> list[KnowledgeMemory | None]:
    first, second, third, fourth = rows.memories
    prior_M = torch.linspace(-1, 1, third.num_facts)
    prior_M[1] = HIDDEN
    hidden_M = torch.full((second.num_facts,), HIDDEN)
    return [
        first,
        None,
        second.select(second.fact_ids[[0, 2]]),
        third.with_prior(prior_M),
        fourth,
        first,
        third,
        second.with_prior(hidden_M),
    ]


def gradients(model, adapter, memories, leaves, ids_BT, **inputs):
    """Logits, and gradients to adapter, embeddings of facts and embeddings of tokens."""
    embeds = model.get_input_embeddings()(ids_BT).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeds, knowledge=memories, use_cache=False, **inputs).logits
    places = torch.arange(logits.numel(), dtype=DOUBLE).view(logits.shape)
    loss = (torch.log_softmax(logits, -1) * (1 + 0.5 * places.sin())).mean()
    every = [*adapter.parameters(), *leaves, embeds]
    return logits.detach(), torch.autograd.grad(loss, every, materialize_grads=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_tokens", "dim_is_large"), [(3, False), (9, True)])
@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [3, 4, 6, 3], [3, 20, 4, 40]], ids=str)
def test_a_stack_is_the_loop(kind, form, num_tokens, dim_is_large, sizes):
    """With few tokens kind "paper" stays latent; with many, keys and values are made for the step."""
    model = tiny_llama(dtype=DOUBLE).requires_grad_(False)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    rows = rows_of(adapter, form, sizes)
    memories, ids = mixed(rows), random_ids(8, num_tokens)
    attachment = attach(model, adapter)
    with counted_stacks() as stacks:
        logits, found = gradients(model, adapter, memories, rows.leaves, ids)
    with one_after_the_other(), counted_stacks() as none:
        expected_logits, expected = gradients(model, adapter, memories, rows.leaves, ids)
    without = model(ids).logits
    attachment.detach()
    assert max(stacks) > 1
    assert not none
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-12)
    for row in (1, 7):  # no memory, and one with every fact hidden
        assert torch.equal(logits[row], without[row])
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [2, 9])
def test_against_the_definition_without_gradients(kind, num_tokens):
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    facts = [random_facts(size, seed=size, dtype=DOUBLE) for size in (4, 5, 5)]
    ids = random_ids(3, num_tokens)
    attachment = attach(model, adapter)
    with torch.no_grad(), counted_stacks() as stacks:
        logits = model(ids, knowledge=[part.memory(adapter) for part in facts]).logits
        last = model(ids, knowledge=[part.memory(adapter) for part in facts], logits_to_keep=1).logits
        expected = plain_logits(model, adapter, ids, facts)
    attachment.detach()
    assert set(stacks) == {3}
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_large_knowledge_bases_are_not_copied_unless_recorded(kind, monkeypatch):
    monkeypatch.setattr(stacking, "NUMBERS_COPIED", 2 * 2 * 5 * DIM)
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    attachment = attach(model, adapter)
    for size, is_stacked in ((5, True), (6, False)):
        memories = [random_facts(size, seed=seed, dtype=DOUBLE).memory(adapter) for seed in range(2)]
        with torch.no_grad(), counted_stacks() as stacks:
            without = model(random_ids(2, 3), knowledge=memories).logits
        with counted_stacks() as recorded:
            logits = model(random_ids(2, 3), knowledge=memories).logits
        assert (bool(stacks), bool(recorded)) == (is_stacked, True)
        torch.testing.assert_close(logits.detach(), without, rtol=0, atol=1e-12)
    attachment.detach()


@pytest.mark.parametrize("num_tokens", [2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_repeats_the_same(kind, num_tokens):
    model = tiny_llama(dtype=DOUBLE).requires_grad_(False).train()
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    rows = rows_of(adapter, "latent", [3, 4, 6, 3])
    attachment = attach(model, adapter)
    ids = random_ids(8, num_tokens)
    _, expected = gradients(model, adapter, mixed(rows), rows.leaves, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, found = gradients(model, adapter, mixed(rows), rows.leaves, ids)
    attachment.detach()
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_more_projected_numbers_than_are_held_stay_latent(kind, monkeypatch):
    model = tiny_llama(dtype=DOUBLE).requires_grad_(False)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    rows = rows_of(adapter, "latent", [3, 4, 6, 3])
    attachment = attach(model, adapter)
    expected = gradients(model, adapter, mixed(rows), rows.leaves, random_ids(8, 9))
    monkeypatch.setattr(stacking, "NUMBERS_PROJECTED", 0)
    found = gradients(model, adapter, mixed(rows), rows.leaves, random_ids(8, 9))
    attachment.detach()
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_traces_of_a_stack_are_those_of_each_row(kind, with_grad, num_tokens):
    """Recorders read groups: a stack's are made when asked for."""
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    rows = rows_of(adapter, "latent", [4, 5, 4, 4], with_gradient=False)
    ids = random_ids(4, num_tokens)
    attachment = attach(model, adapter)
    shares = []

    class Recorder:
        def record(self, layer, attended, weight_TN):
            for part in attended.groups:
                assert torch.equal(part.group.tokens, torch.arange(num_tokens) + part.group.first)
                logits = [
                    torch.matmul(part.form.query_ATD, part.form.block(view, slice(0, view.num_rows))[0].mT)
                    for view, _ in part.group.views()
                ]
                if part.form.bias_AT is not None:
                    logits = [score + part.form.bias_AT[..., None] for score in logits]
                scales = [part.form.scale(view) for view, _ in part.group.views()]
                logits = [
                    score if scale is None else score * scale for score, scale in zip(logits, scales, strict=True)
                ]
                lse_AT = torch.logsumexp(torch.cat(logits, -1), -1)
                torch.testing.assert_close(lse_AT, part.lse_AT, rtol=0, atol=1e-11)
                shares.append(part.lse_AT.requires_grad)

    with torch.set_grad_enabled(with_grad), attachment.using(rows.memories, Recorder()), counted_stacks() as stacks:
        model(ids, use_cache=False)
    assert set(stacks) == {4}
    assert shares == [with_grad] * 4 * len(adapter.config.layers)
    with torch.no_grad():
        together = trace(attachment, ids, rows.memories, 2, top_n=3)
        for row, memory in enumerate(rows.memories):
            alone = trace(attachment, ids[row : row + 1], memory, 2, top_n=3)
            assert torch.equal(together.fact_ids[row], alone.fact_ids[0])
            torch.testing.assert_close(together.shares[row], alone.shares[0])
            total = mean_shares(attachment, ids[row : row + 1], memory, 2).sum()
            torch.testing.assert_close(together.kb_shares[row].mean(), total, rtol=0, atol=1e-5)
    attachment.detach()


def test_what_is_stacked():
    model = tiny_llama(dtype=DOUBLE)
    paper, shared = (tiny_adapter(model, kind, dtype=DOUBLE) for kind in KINDS)
    sizes = [4, 100, 5, 90, 4]
    memories = [random_facts(size, seed=at, dtype=DOUBLE).memory(paper) for at, size in enumerate(sizes)]
    other = random_facts(4, dtype=DOUBLE).memory(shared)
    half = random_facts(4).memory(paper)
    # Two rows of one memory are twice the tokens.
    rows = [*memories, other, half, memories[0]]
    groups = groups_of(segments_of_rows(rows, len(rows), 2), 2 * len(rows), torch.device("cpu"))
    found = [[group.tokens.tolist() for group in stack] for stack in alike(groups)]
    assert sorted(found) == [[[0, 1, 14, 15]], [[2, 3], [6, 7]], [[4, 5], [8, 9]], [[10, 11]], [[12, 13]]]
    assert sorted(len(group.memory.views) for stack in alike(groups) for group in stack) == [1] * 7


def test_a_stack_in_the_order_of_the_batch_gathers_no_tokens():
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, "shared", dtype=DOUBLE)
    sizes = [4, 6, 5]
    memories = [random_facts(size, seed=size, dtype=DOUBLE).memory(adapter) for size in sizes]
    for rows, gathers in ((memories, False), ([None, *memories], True), ([*memories, *reversed(memories)], True)):
        forward = ForwardPass(segments_of_rows(rows, len(rows), 2), torch.device("cpu"), dtype=DOUBLE)
        (stack,) = forward._parts
        assert isinstance(stack, Stack)
        assert (stack.tokens is not None) == gathers


@pytest.mark.parametrize("kind", KINDS)
def test_casts_are_made_once_for_all_layers(kind, monkeypatch):
    """Beside a 16-bit base model the float32 tensors of an adapter are cast before the layers run, and not in them."""
    model = tiny_llama(dtype=torch.bfloat16).requires_grad_(False)
    adapter = tiny_adapter(model, kind)
    attachment = attach(model, adapter)
    memories = [random_facts(5, seed=seed).memory(adapter) for seed in range(2)]

    def refuse(*_):
        raise AssertionError("cast in a layer")

    monkeypatch.setattr(Projections, "_slices", refuse)
    logits = model(random_ids(2, 4), knowledge=memories).logits
    logits.float().sum().backward()
    attachment.detach()
    assert {parameter.grad.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_training_is_near_that_of_32_bit(kind):
    base = tiny_llama(hidden=32).requires_grad_(False)
    half = tiny_llama(hidden=32, dtype=torch.bfloat16).requires_grad_(False)
    logits = []
    for model in (base, half):
        adapter = tiny_adapter(base, kind)
        memories = [random_facts(5, seed=seed).memory(adapter) for seed in range(3)]
        attachment = attach(model, adapter)
        logits.append(model(random_ids(3, 9), knowledge=memories).logits.float().detach())
        attachment.detach()
    error = (logits[0] - logits[1]).abs().mean() / logits[0].std()
    assert error < 0.05


def test_selected_facts_of_one_chunk_are_gathered_into_the_stack():
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, "paper", dtype=DOUBLE)
    facts = random_facts(30, dtype=DOUBLE)
    memory = facts.memory(adapter)
    chosen = [[1, 7, 29], [0, 2], [5, 6, 8]]
    memories = [memory.select(np.array(ids)) for ids in chosen]
    ids = random_ids(3, 3)
    attachment = attach(model, adapter)
    with counted_stacks() as stacks:
        logits = model(ids, knowledge=memories).logits
    attachment.detach()
    assert max(stacks) == 3
    taken = [replace(facts.take(rows), num_counted=30) for rows in chosen]
    with torch.no_grad():
        expected = plain_logits(model, adapter, ids, taken)
    torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=1e-12)
