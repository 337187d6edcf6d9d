"""Attention over facts in blocks and parts is one softmax, whatever the blocks, hidden facts and kind of call."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import small_blocks

from kblam_ray.attention.softmax import NO_FACTS, attend, merge, part_weight, shares


class Rows:
    """Facts as matrices: keys [M, D] or [A, M, D], values alike, a scale [M] and log weights [M] or [T, M]."""

    def __init__(self, keys, values, scale_M=None, log_weights=None):
        self.keys, self.values, self.scale, self.weights = keys, values, scale_M, log_weights
        self.num_rows = keys.shape[-2]
        self.asked: list[int] = []

    def block(self, rows):
        self.asked.append(rows.stop - rows.start)
        return self.keys[..., rows, :], self.values[..., rows, :]

    def scale_M(self):
        return self.scale

    def log_weights(self, rows, tokens):
        if self.weights is None or self.weights.dim() == 1:
            return None if self.weights is None else self.weights[rows]
        return self.weights[tokens, rows]


def plain(query_ATD, bias_AT, facts: Rows):
    """One softmax of float64 over all facts: output, log-sum-exp, shares; 0, -inf and 0 where no fact is seen."""
    logits_ATM = query_ATD.double() @ facts.keys.double().transpose(-1, -2)
    if bias_AT is not None:
        logits_ATM = logits_ATM + bias_AT.double()[..., None]
    if facts.scale is not None:
        logits_ATM = logits_ATM * facts.scale.double()
    if facts.weights is not None:
        logits_ATM = logits_ATM + facts.weights.double()
    shares_ATM = torch.softmax(logits_ATM, -1).nan_to_num(0.0)
    return shares_ATM @ facts.values.double(), torch.logsumexp(logits_ATM, -1), shares_ATM


@st.composite
def attention_calls(draw):
    heads, tokens, num_facts = (draw(st.integers(1, most)) for most in (3, 7, 11))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    spread = draw(st.sampled_from([0.1, 1.0, 30.0]))  # from all alike to one fact that has everything

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    per_head = draw(st.booleans())
    keys, values = (normal(*([heads] if per_head else []), num_facts, width) for width in (4, 5))
    weights = None
    weights_shape = draw(st.sampled_from([None, (num_facts,), (tokens, num_facts)]))
    if weights_shape is not None:
        seen = draw(st.lists(st.booleans(), min_size=math.prod(weights_shape), max_size=math.prod(weights_shape)))
        weights = normal(*weights_shape).masked_fill(~torch.tensor(seen).view(weights_shape), NO_FACTS)
    scale_M = normal(num_facts).abs() if draw(st.booleans()) else None
    bias_AT = normal(heads, tokens) if draw(st.booleans()) else None
    return normal(heads, tokens, 4) * spread, bias_AT, Rows(keys, values, scale_M, weights)


@given(attention_calls(), st.integers(1, 40), st.integers(1, 12), st.booleans())
@settings(max_examples=60)
def test_blocks_of_any_size_give_one_softmax(call, scores, rows, with_grad):
    query_ATD, bias_AT, facts = call
    with small_blocks(scores, rows=rows), torch.set_grad_enabled(with_grad):
        out_ATV, lse_AT = attend(query_ATD, bias_AT, facts)
    plain_out_ATV, plain_lse_AT, _ = plain(query_ATD, bias_AT, facts)
    torch.testing.assert_close(out_ATV, plain_out_ATV, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse_AT, plain_lse_AT, rtol=1e-10, atol=1e-10)


@given(attention_calls(), st.integers(1, 40))
@settings(max_examples=30)
def test_shares_are_those_of_the_softmax_and_never_nan(call, scores):
    query_ATD, bias_AT, facts = call
    _, plain_lse_AT, plain_shares_ATM = plain(query_ATD, bias_AT, facts)
    with small_blocks(scores), torch.no_grad():
        found = list(shares(query_ATD, bias_AT, facts, plain_lse_AT))
    assert [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]]
    torch.testing.assert_close(torch.cat([part for _, part in found], -1), plain_shares_ATM, rtol=1e-9, atol=1e-12)


@given(attention_calls(), st.data())
@settings(max_examples=40)
def test_parts_of_any_split_merge_in_any_order(call, data):
    query_ATD, bias_AT, facts = call
    order = torch.tensor(data.draw(st.permutations(range(facts.num_rows))))
    bounds = sorted(data.draw(st.sets(st.integers(1, max(1, facts.num_rows - 1)))) - {facts.num_rows})
    parts = []
    for places in order.tensor_split(bounds):
        taken = Rows(
            facts.keys[..., places, :],
            facts.values[..., places, :],
            None if facts.scale is None else facts.scale[places],
            None if facts.weights is None else facts.weights[..., places],
        )
        parts.append(attend(query_ATD, bias_AT, taken))
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(*merged, *part)
    plain_out_ATV, plain_lse_AT, _ = plain(query_ATD, bias_AT, facts)
    torch.testing.assert_close(merged[0], plain_out_ATV, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged[1], plain_lse_AT, rtol=1e-10, atol=1e-10)


@given(attention_calls(), st.integers(0, 5))
@settings(max_examples=30)
def test_gradients_are_those_of_one_softmax_and_never_nan(call, split):
    query_ATD, bias_AT, facts = call
    split = min(split, facts.num_rows - 1)
    leaves = [query_ATD, facts.keys, facts.values, *(t for t in (bias_AT, facts.scale) if t is not None)]
    for leaf in leaves:
        leaf.requires_grad_(True)
    weights = facts.weights
    parts = [
        attend(
            query_ATD,
            bias_AT,
            Rows(
                facts.keys[..., rows, :],
                facts.values[..., rows, :],
                None if facts.scale is None else facts.scale[rows],
                None if weights is None else weights[..., rows],
            ),
        )
        for rows in ([slice(0, split), slice(split, None)] if split else [slice(0, None)])
    ]
    out_ATV, lse_AT = parts[0] if len(parts) == 1 else merge(*parts[0], *parts[1])
    empty_AT = lse_AT == NO_FACTS
    found = torch.autograd.grad(_loss(out_ATV, lse_AT.masked_fill(empty_AT, 0.0)), leaves, allow_unused=True)

    # The plain formula has no value where nothing is seen: those queries' logits are replaced before the softmax.
    logits_ATM = query_ATD @ facts.keys.transpose(-1, -2)
    logits_ATM = logits_ATM if bias_AT is None else logits_ATM + bias_AT[..., None]
    logits_ATM = logits_ATM if facts.scale is None else logits_ATM * facts.scale
    logits_ATM = logits_ATM if weights is None else logits_ATM + weights
    logits_ATM = logits_ATM.masked_fill(empty_AT[..., None], 0.0)
    plain_out_ATV = (torch.softmax(logits_ATM, -1) @ facts.values).masked_fill(empty_AT[..., None], 0.0)
    plain_lse_AT = torch.logsumexp(logits_ATM, -1).masked_fill(empty_AT, 0.0)
    expected = torch.autograd.grad(_loss(plain_out_ATV, plain_lse_AT), leaves, allow_unused=True)
    for mine, plainly in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plainly, rtol=1e-8, atol=1e-10)


def _loss(out, lse):
    return (out * torch.arange(1, out.numel() + 1).view(out.shape).sin()).sum() + (lse * lse).sum()


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_the_exact_result(dtype, with_grad):
    generator = torch.Generator().manual_seed(0)
    query_ATD, keys, values = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 16), (40, 16), (40, 6))
    )
    facts = Rows(keys, values)
    with small_blocks(64), torch.set_grad_enabled(with_grad):
        out_ATV, lse_AT = attend(query_ATD, None, facts)
    assert out_ATV.dtype == lse_AT.dtype == torch.float32
    plain_out_ATV, plain_lse_AT, _ = plain(query_ATD, None, facts)
    # bfloat16 has 8 bits: logits up to 12 are rounded by up to 2^-5, shares by a factor of as much.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(out_ATV, plain_out_ATV.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse_AT, plain_lse_AT.float(), rtol=tolerance, atol=tolerance)


def test_the_blocks_are_as_small_as_asked_for_without_autograd():
    query_ATD, facts = torch.randn(2, 6, 4), Rows(torch.randn(50, 4), torch.randn(50, 4))
    with small_blocks(24, rows=6), torch.no_grad():
        attend(query_ATD, None, facts)
    # 6 rows of queries at a time are 3 tokens of 2 heads; 24 scores are 4 facts for them.
    assert facts.asked == [4] * 12 + [2]


@pytest.mark.parametrize("lse_a", [NO_FACTS, -300.0, 0.0, 300.0])
@pytest.mark.parametrize("lse_b", [NO_FACTS, -300.0, 0.0, 300.0])
def test_merging_with_an_empty_or_negligible_part(lse_a, lse_b):
    parts = [
        (torch.full((2, 3), 0.0 if lse == NO_FACTS else value), torch.full((2,), lse))
        for value, lse in ((1.0, lse_a), (2.0, lse_b))
    ]
    leaves = [tensor.requires_grad_(True) for part in parts for tensor in part]
    out, lse = merge(*leaves)
    if lse_a == lse_b == NO_FACTS:
        assert out.eq(0).all()
        assert lse.eq(NO_FACTS).all()
    else:
        weight = part_weight(leaves[3], leaves[1])
        expected = 1 / (1 + math.exp(lse_a - lse_b)) if NO_FACTS not in (lse_a, lse_b) else float(lse_a == NO_FACTS)
        torch.testing.assert_close(weight, torch.full((2,), expected))
        torch.testing.assert_close(out[0, 0].item(), 1 + expected)
        assert lse[0].item() == pytest.approx(max(lse_a, lse_b) + (math.log(2) if lse_a == lse_b else 0))
    (out.sum() + lse.masked_fill(lse == NO_FACTS, 0.0).sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
def test_all_facts_hidden_is_output_zero_and_no_mass(mode):
    facts = Rows(torch.randn(3, 4), torch.full((3, 5), 1e30), log_weights=torch.full((3,), NO_FACTS))
    with mode():
        out_ATV, lse_AT = attend(torch.randn(2, 4, 4), torch.randn(2, 4), facts)
    assert out_ATV.eq(0).all()
    assert lse_AT.eq(NO_FACTS).all()
