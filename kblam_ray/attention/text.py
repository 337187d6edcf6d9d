"""The base model's own attention, computed by the library, together with its log-sum-exp.

Shape legend: B batch, T query tokens, S text tokens attended to, N query heads, K key/value heads, H head dim.

The text output always comes from the library's function, so that it is the base model's to the bit. The
log-sum-exp, which the library does not return, comes from the same fused operator where that has one (on the CPU,
without autograd), and from the plain formula otherwise: fused operators give it without a gradient, which would make
training wrong in silence.
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

SCORES_PER_BLOCK = 2**25
"""Text scores held at a time: longer texts are worked on in blocks of queries, and recomputed for the gradient."""

HIDDEN = -1e30
"""The logit of a hidden token: finite, so that a query that sees no token has no NaN in its gradient."""

_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION, as `_fused_sdp_choice` returns it


def sdpa_with_log_sum_exp(
    function: Callable[..., tuple[torch.Tensor, Any]], *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the library's `sdpa` attention function and catch the log-sum-exp of the one attention inside it.

    The library prepares the call (paged cache, grouped heads, masks); only the innermost operator is looked at.

    Returns:
        The function's output [B, T, N, H] and log-sum-exp [B, N, T] in float32 (float64 for float64 queries).
    """
    caught = _CatchLogSumExp()
    with caught:
        out_BTNH, _ = function(*args, **kwargs)
    if caught.lse is None:
        raise RuntimeError("the sdpa attention function made no call of scaled_dot_product_attention")
    # Single-token queries arrive packed as [B, K, N/K]: the same order of heads.
    return out_BTNH, caught.lse.reshape(out_BTNH.shape[0], out_BTNH.shape[2], out_BTNH.shape[1])


class _CatchLogSumExp(TorchFunctionMode):
    lse: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        out, self.lse = _attention_with_log_sum_exp(func, *args, **kwargs)
        return out


def _attention_with_log_sum_exp(
    attention: Callable[..., torch.Tensor],
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
    out = attention(query, key, value, enable_gqa=enable_gqa, **options)
    return out, text_log_sum_exp(query, key, attn_mask, is_causal=is_causal, scale=scale)


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
    kv_heads = key_BKSH.shape[1]
    query_BKGTH = query_BNTH.unflatten(1, (kv_heads, -1))
    scores_BKGTS = torch.matmul(query_BKGTH, key_BKSH[:, :, None].transpose(-1, -2))
    scores_BNTS = scores_BKGTS.flatten(1, 2).to(exact_dtype(query_BNTH.dtype)) * scale
    if mask is not None:
        scores_BNTS = torch.where(mask, scores_BNTS, HIDDEN) if mask.dtype == torch.bool else scores_BNTS + mask
    if first is not None:
        tokens, length = scores_BNTS.shape[-2:]
        rows = torch.arange(first, first + tokens, device=scores_BNTS.device)[:, None]
        scores_BNTS = torch.where(torch.arange(length, device=rows.device) <= rows, scores_BNTS, HIDDEN)
    return torch.logsumexp(scores_BNTS.clamp_min(HIDDEN), -1)


def _hides_all(mask: torch.Tensor) -> torch.Tensor:
    """The queries that see nothing: [..., T] of a mask [..., T, S]."""
    return mask.any(-1).logical_not() if mask.dtype == torch.bool else (mask == float("-inf")).all(-1)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as the operator wants it: 0 where visible, -inf where not."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), float("-inf"))
