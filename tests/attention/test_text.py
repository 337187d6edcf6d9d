"""The text output is the library's to the bit, its log-sum-exp the plain formula's, for masks of every kind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import small_blocks
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kblam_ray.attention import text
from kblam_ray.attention.text import sdpa_with_log_sum_exp, text_log_sum_exp

BATCH, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 2, 4, 2, 8, 7
HIDDEN_ROW = 2  # a query that sees no token, in the masks that have one

MASKS = ("none", "causal", "bool", "float", "smallest", "bool hidden row", "float hidden row", "smallest hidden row")


class _Module(torch.nn.Module):
    """What the library's attention function reads from an attention module."""

    is_causal = True

    def __init__(self, groups: int = HEADS // KV_HEADS) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def random_text(tokens: int = LENGTH, *, dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(BATCH, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for heads, length in ((HEADS, tokens), (kv_heads, LENGTH), (kv_heads, LENGTH))
    )


def mask_of(kind: str, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """As transformers makes them: [B, 1, T, S], True or 0 where visible."""
    if kind in ("none", "causal"):
        return None
    visible_BTS = torch.rand(BATCH, 1, tokens, LENGTH, generator=torch.Generator().manual_seed(7)) < 0.6
    visible_BTS[..., 0] = True
    if "hidden row" in kind:
        visible_BTS[1, :, HIDDEN_ROW % tokens] = False
    if "bool" in kind:
        return visible_BTS
    low = torch.finfo(dtype).min if "smallest" in kind else float("-inf")
    return torch.zeros(visible_BTS.shape, dtype=dtype).masked_fill(~visible_BTS, low)


def visible_of(mask, kind: str, tokens: int) -> torch.Tensor:
    if kind == "causal":
        return torch.ones(tokens, LENGTH, dtype=torch.bool).tril().expand(BATCH, 1, tokens, LENGTH)
    if mask is None:
        return torch.ones(BATCH, 1, tokens, LENGTH, dtype=torch.bool)
    return mask if mask.dtype == torch.bool else mask == 0


def plain(query, key, visible, scale: float | None = None):
    """Log-sum-exp [B, N, T] of the scores at visible tokens, and which queries see any."""
    key = key.repeat_interleave(HEADS // key.shape[1], 1)
    scores = query.double() @ key.double().transpose(-1, -2) * (1 / math.sqrt(HEAD_DIM) if scale is None else scale)
    seen_BNT = visible.any(-1).expand(BATCH, HEADS, -1)
    return torch.logsumexp(scores.masked_fill(~visible, float("-inf")), -1), seen_BNT


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("with_blocks", [False, True])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_the_formula(kind, with_blocks, scale):
    query, key, _ = random_text()
    mask = mask_of(kind, LENGTH)
    expected, seen_BNT = plain(query, key, visible_of(mask, kind, LENGTH), scale)
    with small_blocks(text_scores=3 * BATCH * HEADS * LENGTH if with_blocks else 2**20):
        lse_BNT = text_log_sum_exp(query, key, mask, is_causal=kind == "causal", scale=scale)
    assert lse_BNT.dtype == torch.float32
    torch.testing.assert_close(lse_BNT[seen_BNT], expected[seen_BNT].float(), rtol=1e-5, atol=1e-5)
    assert lse_BNT[~seen_BNT].le(-1e29).all()
    assert lse_BNT.isfinite().all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("with_grad", [False, True])
def test_the_output_is_the_librarys_to_the_bit(kind, dtype, kv_heads, with_grad):
    query, key, value = random_text(dtype=dtype, kv_heads=kv_heads)
    query.requires_grad_(with_grad)
    mask, module = mask_of(kind, LENGTH, dtype), _Module(HEADS // kv_heads)
    options = {"is_causal": kind == "causal", "scaling": 0.3}
    with torch.set_grad_enabled(with_grad):
        library, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        out_BTNH, lse_BNT = sdpa_with_log_sum_exp(sdpa_attention_forward, module, query, key, value, mask, **options)
    assert torch.equal(out_BTNH, library)
    assert out_BTNH.requires_grad == lse_BNT.requires_grad == with_grad
    assert lse_BNT.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, seen_BNT = plain(query, key, visible_of(mask, kind, LENGTH), 0.3)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    difference = (lse_BNT - expected)[seen_BNT].abs().max()
    assert difference < tolerance
    assert not lse_BNT.isnan().any()
    # Beside no text at all, facts have the whole of the attention.
    assert (lse_BNT[~seen_BNT] <= text.HIDDEN).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "bool hidden row", "float hidden row"])
def test_single_tokens_however_the_library_packs_them(kind, kv_heads):
    query, key, value = random_text(1, kv_heads=kv_heads)
    mask, module = mask_of(kind, 1), _Module(HEADS // kv_heads)
    library, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    out_BTNH, lse_BNT = sdpa_with_log_sum_exp(sdpa_attention_forward, module, query, key, value, mask, scaling=0.3)
    assert torch.equal(out_BTNH, library)
    expected, _ = plain(query, key, visible_of(mask, kind, 1), 0.3)
    torch.testing.assert_close(lse_BNT, expected.float().clamp_min(text.HIDDEN), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "causal", "bool hidden row", "float hidden row", "smallest hidden row"])
@pytest.mark.parametrize("with_blocks", [False, True])
def test_the_log_sum_exp_has_its_gradient(kind, with_blocks):
    query, key, _ = random_text(dtype=torch.float64)
    mask = mask_of(kind, LENGTH, torch.float64)
    visible = visible_of(mask, kind, LENGTH)
    weights_BNT = torch.randn(BATCH, HEADS, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights_BNT = weights_BNT * visible.any(-1)  # a query that sees nothing has no log-sum-exp
    leaves = [query.requires_grad_(True), key.requires_grad_(True)]
    with small_blocks(text_scores=3 * BATCH * HEADS * LENGTH if with_blocks else 2**20):
        lse_BNT = text_log_sum_exp(query, key, mask, is_causal=kind == "causal")
        found = torch.autograd.grad((lse_BNT * weights_BNT).sum(), leaves)
    wide_key = key.repeat_interleave(HEADS // KV_HEADS, 1)
    scores = (query @ wide_key.transpose(-1, -2) / math.sqrt(HEAD_DIM)).masked_fill(~visible, -1e9)
    expected = torch.autograd.grad((torch.logsumexp(scores, -1) * weights_BNT).sum(), leaves)
    for mine, plainly in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plainly, rtol=1e-9, atol=1e-12)


def test_a_query_that_sees_nothing_has_a_finite_gradient():
    query, key, value = random_text()
    mask = mask_of("bool hidden row", LENGTH)
    query.requires_grad_(True)
    out_BTNH, lse_BNT = sdpa_with_log_sum_exp(sdpa_attention_forward, _Module(), query, key, value, mask)
    (out_BTNH.sum() + lse_BNT.sum()).backward()
    assert query.grad.isfinite().all()


def test_the_operators_own_log_sum_exp_is_used_only_without_a_gradient(monkeypatch):
    """It comes without a gradient, and nothing would warn."""
    asked = []
    formula = text.text_log_sum_exp
    monkeypatch.setattr(text, "text_log_sum_exp", lambda *given, **named: asked.append(1) or formula(*given, **named))
    query, key, value = random_text()
    for needs_grad, context, expected in (
        (False, torch.enable_grad(), 0),
        (True, torch.no_grad(), 0),
        (True, torch.enable_grad(), 1),
    ):
        asked.clear()
        query.requires_grad_(needs_grad)
        with context:
            _, lse_BNT = sdpa_with_log_sum_exp(sdpa_attention_forward, _Module(), query, key, value, None)
        assert len(asked) == expected
        assert lse_BNT.requires_grad == bool(expected)
    query.requires_grad_(False)
    value.requires_grad_(True)
    _, lse_BNT = sdpa_with_log_sum_exp(sdpa_attention_forward, _Module(), query, key, value, None)
    torch.testing.assert_close(lse_BNT, plain(query, key, visible_of(None, "causal", LENGTH))[0].float())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_under_autocast_it_is_the_log_sum_exp_of_what_the_library_computes(needs_grad):
    query, key, value = random_text()
    query.requires_grad_(needs_grad)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(needs_grad):
        library, _ = sdpa_attention_forward(_Module(), query, key, value, None)
        out_BTNH, lse_BNT = sdpa_with_log_sum_exp(sdpa_attention_forward, _Module(), query, key, value, None)
    assert torch.equal(out_BTNH, library)
    expected, _ = plain(query, key, visible_of(None, "causal", LENGTH))
    assert (lse_BNT - expected).abs().max() < 3e-2  # bfloat16 keeps 8 bits


def test_dropout_is_the_librarys_and_leaves_the_log_sum_exp_alone():
    query, key, value = random_text()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        library, _ = sdpa_attention_forward(_Module(), query, key, value, None, dropout=0.5)
        torch.manual_seed(3)
        out_BTNH, lse_BNT = sdpa_with_log_sum_exp(
            sdpa_attention_forward, _Module(), query, key, value, None, dropout=0.5
        )
    assert torch.equal(out_BTNH, library)
    torch.testing.assert_close(lse_BNT, plain(query, key, visible_of(None, "causal", LENGTH))[0].float())


def test_only_the_call_inside_is_looked_at():
    query, key, value = random_text(kv_heads=HEADS)
    with pytest.raises(RuntimeError, match="no call of scaled_dot_product_attention"):
        sdpa_with_log_sum_exp(lambda *_: (query.transpose(1, 2), None))
    sdpa_with_log_sum_exp(sdpa_attention_forward, _Module(1), query, key, value, None)
    torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value).shape, query.shape)


def test_no_more_scores_at_a_time_than_the_blocks_say(monkeypatch):
    sizes = []
    block = text._log_sum_exp_block
    monkeypatch.setattr(
        text, "_log_sum_exp_block", lambda query, *rest: sizes.append(query.shape[2]) or block(query, *rest)
    )
    query, key, _ = random_text()
    with small_blocks(text_scores=3 * BATCH * HEADS * LENGTH), torch.no_grad():
        text_log_sum_exp(query, key, is_causal=True)
    assert sizes == [3, 3, 1]
