"""Gradients through the attached model are those of one softmax over [facts | text], by formula and by differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import (
    FORMS,
    KINDS,
    plain_logits,
    random_facts,
    random_ids,
    small_blocks,
    tiny_adapter,
    tiny_llama,
)

from kblam_ray.attention import attach
from kblam_ray.attention.layer_facts import is_cheaper_expanded
from kblam_ray.errors import UnsupportedModelError

DOUBLE = torch.float64
HIDDEN = float("-inf")


def loss_of(logits_BTV: torch.Tensor) -> torch.Tensor:
    """Depends on every logit, and on each in another way."""
    places = torch.arange(logits_BTV.numel(), dtype=logits_BTV.dtype).view(logits_BTV.shape)
    return (torch.log_softmax(logits_BTV, -1) * (1 + 0.5 * places.sin())).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "num_tokens", "dim", "is_complete"),
    [("latent", 2, 3, True), ("latent", 2, 3, False), ("latent", 4, 12, False), ("materialized", 2, 3, False)],
)
def test_the_whole_path_against_finite_differences(kind, form, num_tokens, dim, is_complete):
    """Complete: number by number; else along random directions."""
    model = tiny_llama(dtype=DOUBLE, num_layers=3, hidden=8, heads=2, kv_heads=1).requires_grad_(False)
    adapter = tiny_adapter(model, kind, dim=dim, dtype=DOUBLE, slots=2)
    facts = random_facts(5, dim=dim, dtype=DOUBLE)
    prior_M = torch.tensor([0.3, HIDDEN, -0.5, 0.0, 1.0])
    attachment = attach(model, adapter)
    embeds = model.get_input_embeddings()(random_ids(2, num_tokens)).requires_grad_(True)
    keys_MP, values_MP = (facts.keys_MP.requires_grad_(True), facts.values_MP.requires_grad_(True))

    def loss(*_):
        memory = replace(facts, keys_MP=keys_MP, values_MP=values_MP).memory(adapter, form, sizes=[2])
        # Two rows of one group with priors of their own.
        rows = [memory, memory.with_prior(prior_M)]
        return loss_of(model(inputs_embeds=embeds, knowledge=rows, use_cache=False).logits)

    assert adapter.config.layers == (0, 2)
    # Both the latent form and the one that makes a block's keys are among the cases.
    assert is_cheaper_expanded(num_tokens=2 * num_tokens, head_dim=4, dim=dim) == (dim == 12)
    leaves = (*adapter.parameters(), embeds, keys_MP, values_MP)
    assert torch.autograd.gradcheck(loss, leaves, atol=1e-7, rtol=1e-5, fast_mode=not is_complete)
    attachment.detach()


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_blocks", [False, True])
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("sdpa", DOUBLE), ("sdpa", torch.float32), ("eager", torch.float32)]
)
def test_every_gradient_is_that_of_one_softmax(kind, form, with_blocks, implementation, dtype):
    """Long text in blocks, several chunks, knowledge of its own for each row, priors, padding."""
    model = tiny_llama(dtype=dtype, implementation=implementation)
    adapter = tiny_adapter(model, kind, dtype=dtype)
    attachment = attach(model, adapter)
    first, second = random_facts(9, dtype=dtype), random_facts(5, seed=1, dtype=dtype)
    prior_M = torch.randn(9, generator=torch.Generator().manual_seed(2)).masked_fill(torch.arange(9) == 4, HIDDEN)
    rows = [first, None, replace(first, prior_M=prior_M), second]
    memories = [
        None if facts is None else facts.memory(adapter, form, sizes=sizes)
        for facts, sizes in zip(rows, ([4, 3], [], [4, 3], [1, 1]), strict=True)
    ]
    ids = random_ids(4, 12)
    mask = torch.ones_like(ids)
    mask[3, :5] = mask[1, :3] = 0
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    leaves = [embeds, *adapter.parameters(), *model.model.layers.parameters()]
    with small_blocks(text_scores=4 * 4 * 12 * 5) if with_blocks else torch.enable_grad():
        logits = model(inputs_embeds=embeds, attention_mask=mask, knowledge=memories, use_cache=False).logits
        found = gradients(loss_of(logits[mask.bool()]), leaves)
    expected_logits = plain_logits(model, adapter, None, rows, inputs_embeds=embeds, attention_mask=mask)
    expected = gradients(loss_of(expected_logits[mask.bool()]), leaves)
    attachment.detach()
    tolerance = 1e-10 if dtype == DOUBLE else 1e-5
    for mine, plain in zip(found, expected, strict=True):
        assert (mine - plain).abs().max() <= tolerance * max(1.0, plain.abs().max())
    assert all(gradient.abs().max() > 1e-4 for gradient in found[1 : 1 + len(list(adapter.parameters()))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asked", ["keys", "values", "both"])
def test_gradients_of_embeddings_where_the_adapter_is_frozen(kind, form, asked):
    model = tiny_llama(dtype=DOUBLE).requires_grad_(False)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE).requires_grad_(False)
    attachment = attach(model, adapter)
    facts, ids = random_facts(6, dtype=DOUBLE), random_ids(2, 5)
    with torch.no_grad():
        model(ids, knowledge=facts.memory(adapter, form))  # what is kept from here must not hide the gradient
    both = {"keys": facts.keys_MP, "values": facts.values_MP}
    leaves = [leaf.requires_grad_(True) for name, leaf in both.items() if asked in (name, "both")]
    found = gradients(
        loss_of(model(ids, knowledge=facts.memory(adapter, form, sizes=[4]), use_cache=False).logits), leaves
    )
    expected = gradients(loss_of(plain_logits(model, adapter, ids, facts)), leaves)
    attachment.detach()
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-11)
        assert mine.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_adapter_asks_for_no_gradient(kind, form):
    model = tiny_llama().requires_grad_(False)
    adapter = tiny_adapter(model, kind)
    attachment = attach(model, adapter)
    memory, ids = random_facts(6).memory(adapter, form), random_ids(2, 5)
    with torch.no_grad():
        model(ids, knowledge=memory)
    adapter.requires_grad_(False)
    assert not model(ids, knowledge=memory).logits.requires_grad
    adapter.requires_grad_(True)
    assert model(ids, knowledge=memory).logits.requires_grad
    attachment.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [3, 24])
def test_without_autograd_the_logits_are_the_same(kind, form, num_tokens):
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    attachment = attach(model, adapter)
    facts, ids = random_facts(40, dtype=DOUBLE), random_ids(2, num_tokens)
    memory = facts.memory(adapter, form, sizes=[11, 20]).with_prior(
        torch.randn(40, generator=torch.Generator().manual_seed(0))
    )
    with_grad = model(ids, knowledge=memory).logits
    assert with_grad.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), small_blocks(64):
            torch.testing.assert_close(model(ids, knowledge=memory).logits, with_grad.detach(), rtol=0, atol=1e-9)
    attachment.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_a_step_of_training(kind, form, cast):
    """Base model frozen, the adapter in float32: every tensor of it learns, and the next pass sees what it learned."""
    model = tiny_llama().requires_grad_(False)
    model = model.to(torch.bfloat16) if cast == "weights" else model
    adapter = tiny_adapter(model, kind).train()
    attachment = attach(model, adapter)
    rows = [random_facts(6, seed=seed, dtype=torch.float16).memory(adapter, form) for seed in (0, 1)]
    ids = random_ids(2, 14)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            loss = model(ids, labels=ids, knowledge=rows, use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        for name, parameter in adapter.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all(), name
            # All slots but those that no layer reads.
            assert gradient.abs().max() > 0, name
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        logits = model(ids, knowledge=rows).logits
    fresh = [random_facts(6, seed=seed, dtype=torch.float16).memory(adapter, form) for seed in (0, 1)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        assert torch.equal(logits, model(ids, knowledge=fresh).logits)
    attachment.detach()


def change_by_step(adapter):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def change_data(adapter):
    for parameter in adapter.parameters():
        parameter.data.mul_(1.3)
    adapter.weights_changed()


def change_state(adapter):
    adapter.load_state_dict({name: 1.3 * tensor for name, tensor in adapter.state_dict().items()})


@pytest.mark.parametrize("change", [change_by_step, change_data, change_state])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_follow_the_weights(kind, form, change):
    model = tiny_llama(dtype=DOUBLE)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    attachment = attach(model, adapter)
    facts, ids = random_facts(7, dtype=DOUBLE), random_ids(2, 5)
    memory = facts.memory(adapter, form, sizes=[3])
    with torch.no_grad():
        before = model(ids, knowledge=memory).logits
        change(adapter)
        after = model(ids, knowledge=memory).logits
        torch.testing.assert_close(after, plain_logits(model, adapter, ids, facts), rtol=0, atol=1e-9)
    assert (after - before).abs().max() > 1e-3
    attachment.detach()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is not in 5.17
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_recomputed_layers_give_the_same_gradients(kind, form):
    model = tiny_llama(dtype=DOUBLE).train()
    adapter = tiny_adapter(model, kind, dtype=DOUBLE).train()
    attachment = attach(model, adapter)
    facts, ids = random_facts(7, dtype=DOUBLE), random_ids(2, 5)
    rows = [facts.memory(adapter, form, sizes=[3]), None]
    leaves = [*adapter.parameters(), *model.model.layers.parameters()]

    def found():
        return gradients(loss_of(model(ids, knowledge=rows, use_cache=False).logits), leaves)

    expected = found()
    _checkpoint(model, use_reentrant=False)
    for mine, plain in zip(found(), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)
    # The other kind makes one backward pass per layer, and layers share what is made from the adapter's weights.
    _checkpoint(model, use_reentrant=True)
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        found()
    attachment.detach()


def _checkpoint(model, *, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("kind", KINDS)
def test_several_losses_before_one_step(kind):
    """Gradients of several passes add up: nothing of one pass's graph is used in another."""
    model = tiny_llama(dtype=DOUBLE).requires_grad_(False)
    adapter = tiny_adapter(model, kind, dtype=DOUBLE)
    attachment = attach(model, adapter)
    memory = random_facts(7, dtype=DOUBLE).memory(adapter)
    leaves = list(adapter.parameters())
    parts = [gradients(loss_of(model(random_ids(1, 4, seed), knowledge=memory).logits), leaves) for seed in (0, 1)]
    for seed in (0, 1):
        loss_of(model(random_ids(1, 4, seed), knowledge=memory).logits).backward()
    attachment.detach()
    for leaf, *each in zip(leaves, *parts, strict=True):
        torch.testing.assert_close(leaf.grad, sum(each), rtol=1e-10, atol=1e-12)
