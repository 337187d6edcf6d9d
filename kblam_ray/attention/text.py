"""The base model's own attention, computed by the library, together with its log-sum-exp.

Shape legend: B batch, T query tokens, S text tokens attended to, N query heads, K key/value heads, H head dim.

The text output comes from the library's function, so that it is the base model's to the bit. The log-sum-exp, which
the library does not return, comes from the same fused operator where that has one (on the CPU, without autograd), and
from the plain formula otherwise: fused operators give it without a gradient, which would make training wrong in
silence. While training, where the plain formula is needed anyway and every token attends to facts, so that no output is
the base model's own, the output comes from the formula's scores, too (`plain_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from kblam_ray.attention.projections import exact_dtype
from kblam_ray.attention.softmax import softmax_with_log_sum_exp

SCORES_PER_BLOCK = 2**25
"""Text scores held at a time: longer texts are worked on in blocks of queries, and recomputed for the gradient."""

HIDDEN = -1e30
"""The logit of a hidden token: finite, so that a query that sees no token has no NaN in its gradient."""

_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION, as `_fused_sdp_choice` returns it


def sdpa_with_log_sum_exp(
    function: Callable[..., tuple[torch.Tensor, Any]], *args: Any, may_be_plain: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the library's `sdpa` attention function and catch the log-sum-exp of the one attention inside it.

    The library prepares the call (paged cache, grouped heads, masks); only the innermost operator is looked at.

    Args:
        may_be_plain: with autograd, the output may differ from the operator's by rounding.

    Returns:
        The function's output [B, T, N, H] and log-sum-exp [B, N, T] in float32 (float64 for float64 queries).
    """
    caught = _CatchLogSumExp(may_be_plain)
    with caught:
        out_BTNH, _ = function(*args, **kwargs)
    if caught.lse is None:
        raise RuntimeError("the sdpa attention function made no call of scaled_dot_product_attention")
    # Single-token queries arrive packed as [B, K, N/K]: the same order of heads.
    return out_BTNH, caught.lse.reshape(out_BTNH.shape[0], out_BTNH.shape[2], out_BTNH.shape[1])


class _CatchLogSumExp(TorchFunctionMode):
    def __init__(self, may_be_plain: bool) -> None:
        super().__init__()
        self.lse: torch.Tensor | None = None
        self._may_be_plain = may_be_plain

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        out, self.lse = _attention_with_log_sum_exp(func, self._may_be_plain, *args, **kwargs)
        return out


def _attention_with_log_sum_exp(
    attention: Callable[..., torch.Tensor],
    may_be_plain: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if (
        query.device.type == "cpu"
        and not needs_grad
        and not torch.is_autocast_enabled("cpu")  # which casts the arguments of the public operator only
        and dropout_p == 0
        and torch._fused_sdp_choice(query, key, value, enable_gqa=enable_gqa, **options) == _FLASH
    ):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=_additive(attn_mask, query.dtype), scale=scale
        )
        # Of a query that sees no token, the operator says that its log-sum-exp is 0.
        return out, lse if attn_mask is None else lse.masked_fill(_hides_all(attn_mask), HIDDEN)
    if may_be_plain and is_plain(query, key, value, dropout_p):
        return plain_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)[:2]
    out = attention(query, key, value, enable_gqa=enable_gqa, **options)
    return out, text_log_sum_exp(query, key, attn_mask, is_causal=is_causal, scale=scale)


def is_plain(query_BNTH: torch.Tensor, key_BKSH: torch.Tensor, value_BKSH: torch.Tensor, dropout: float) -> bool:
    """Whether the plain formula does for both the output and the log-sum-exp: with autograd, in one block."""
    needs_grad = query_BNTH.requires_grad or key_BKSH.requires_grad or value_BKSH.requires_grad
    num_scores = query_BNTH.shape[:-1].numel() * key_BKSH.shape[2]
    return torch.is_grad_enabled() and needs_grad and not dropout and num_scores <= SCORES_PER_BLOCK


def plain_attention(
    query_BNTH: torch.Tensor,
    key_BKSH: torch.Tensor,
    value_BKSH: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain formula's output, log-sum-exp and weights, all differentiable.

    On a CPU with short texts this is several times cheaper, forwards and backwards, than the fused operator alone.

    Args: see `text_log_sum_exp`.

    Returns:
        Output [B, N, T, H], log-sum-exp [B, N, T] in float32 (float64 for float64 queries), weights [B, N, T, S].
    """
    heads = (key_BKSH.shape[1], -1)
    scale = 1 / math.sqrt(query_BNTH.shape[-1]) if scale is None else scale
    logits_BNTS = _logits(query_BNTH, key_BKSH, mask, scale, 0 if is_causal else None)
    exact_BNTS, lse_BNT = softmax_with_log_sum_exp(logits_BNTS)
    weights_BNTS = exact_BNTS.to(value_BKSH.dtype)
    # The heads that share keys are rows of one product.
    out_BKXH = torch.matmul(weights_BNTS.unflatten(1, heads).flatten(2, 3), value_BKSH)
    return out_BKXH.view(*query_BNTH.shape[:-1], -1), lse_BNT, weights_BNTS


def text_log_sum_exp(
    query_BNTH: torch.Tensor,
    key_BKSH: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """The plain formula: `logsumexp(query . key * scale + mask)` over the text, differentiable.

    Args:
        query_BNTH: queries of all N heads.
        key_BKSH: keys of the K key/value heads; N is a multiple of K.
        mask: added, or boolean with True for visible: broadcastable to [B, N, T, S].
        is_causal: query t sees keys 0 to t.
        scale: default 1/sqrt(H).

    Returns:
        [B, N, T] in float32 (float64 for float64 queries); about -1e30 where a query sees nothing.
    """
    batch, heads, tokens, head_dim = query_BNTH.shape
    length = key_BKSH.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    tokens_per_block = max(1, SCORES_PER_BLOCK // max(1, batch * heads * length))
    parts = []
    for start in range(0, tokens, tokens_per_block):
        stop = min(start + tokens_per_block, tokens)
        block_mask = mask[..., start:stop, :] if mask is not None and mask.shape[-2] > 1 else mask
        arguments = (query_BNTH[:, :, start:stop], key_BKSH, block_mask, scale, start if is_causal else None)
        if tokens_per_block < tokens and torch.is_grad_enabled():
            parts.append(checkpoint(_log_sum_exp_block, *arguments, use_reentrant=False))
        else:
            parts.append(_log_sum_exp_block(*arguments))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _log_sum_exp_block(
    query_BNTH: torch.Tensor, key_BKSH: torch.Tensor, mask: torch.Tensor | None, scale: float, first: int | None
) -> torch.Tensor:
    return torch.logsumexp(_logits(query_BNTH, key_BKSH, mask, scale, first), -1)


def _logits(
    query_BNTH: torch.Tensor, key_BKSH: torch.Tensor, mask: torch.Tensor | None, scale: float, first: int | None
) -> torch.Tensor:
    """Logits [B, N, T, S], `HIDDEN` where a token is; `first`: the number of the first query, of a causal text."""
    query_BKXH = query_BNTH.unflatten(1, (key_BKSH.shape[1], -1)).flatten(2, 3)
    scores_BKXS = torch.matmul(query_BKXH, key_BKSH.transpose(-1, -2))
    scores_BNTS = scores_BKXS.view(*query_BNTH.shape[:-1], -1).to(exact_dtype(query_BNTH.dtype)) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores_BNTS = torch.where(mask, scores_BNTS, HIDDEN)
    elif mask is not None:
        scores_BNTS = scores_BNTS + mask.to(scores_BNTS.dtype).clamp_min(HIDDEN)
    if first is not None:
        tokens, length = scores_BNTS.shape[-2:]
        rows = torch.arange(first, first + tokens, device=scores_BNTS.device)[:, None]
        scores_BNTS = torch.where(torch.arange(length, device=rows.device) <= rows, scores_BNTS, HIDDEN)
    return scores_BNTS


def _hides_all(mask: torch.Tensor) -> torch.Tensor:
    """The queries that see nothing: [..., T] of a mask [..., T, S]."""
    return mask.any(-1).logical_not() if mask.dtype == torch.bool else (mask == float("-inf")).all(-1)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as the operator wants it: 0 where visible, -inf where not."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), float("-inf"))
