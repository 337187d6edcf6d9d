"""Softmax over facts in blocks: the mixed values and the log-sum-exp of every query, and how two such parts merge.

Shape legend: A rows of queries per token (query heads, or 1 where they share a score), T tokens, M facts, m facts of
one block, D numbers in a key, V numbers in a value.

A part of a softmax is a pair (output, log-sum-exp of its logits). Parts over different facts merge exactly, in any
order (Milakov and Gimelshein, arXiv 1805.02867; KBLaM's rectangular attention is one softmax over [facts | text]), so
nothing of the size tokens x facts ever exists whole. A part without any visible fact has output 0 and
log-sum-exp -inf, set explicitly: computed, it would be 0 * NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from kblam_ray.attention.projections import exact_dtype

NO_FACTS = float("-inf")

ROWS_PER_BLOCK = 4_096
"""Query rows worked on at a time."""

SCORES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**26}
"""Scores held at a time, in the queries' dtype: large enough for the matrix products (measured on a CPU)."""

LOGITS_PER_BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Logits that are float32 at a time: on a CPU what its cores' caches hold through all steps of a softmax (measured)."""


class Facts(Protocol):
    """Facts as one KB layer scores and mixes them; `layer_facts.py` has the forms."""

    @property
    def num_rows(self) -> int: ...

    def block(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some rows: [m, D] or [A, m, D], and [m, V] or [A, m, V], in the queries' dtype."""

    def scale_M(self) -> torch.Tensor | None:
        """What each fact's score is multiplied by: [M], or [A, 1, M]; or None."""

    def log_weights(self, rows: slice, tokens: slice) -> torch.Tensor | None:
        """What is added to the logits after scaling: [m], [t, m] or [A, t or 1, m], -inf where a fact is hidden; None
        for nothing."""


def attend(query_ATD: torch.Tensor, bias_AT: torch.Tensor | None, facts: Facts) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over facts: `softmax((query . key + bias) * scale + log weight)` over the facts, times the values.

    Differentiable when autograd is on, then with all scores of a view in memory; otherwise block by block.

    Returns:
        Mixed values [A, T, V] and log-sum-exp [A, T], both float32 (float64 for float64 queries).
    """
    num_rows_A, num_tokens = query_ATD.shape[:2]
    tokens_per_block, facts_per_block = num_tokens, facts.num_rows
    if not torch.is_grad_enabled():
        num_blocks = math.ceil(num_tokens * num_rows_A / ROWS_PER_BLOCK)
        tokens_per_block = math.ceil(num_tokens / max(1, num_blocks))
        facts_per_block = _facts_per_block(query_ATD, num_rows_A * tokens_per_block)
    merged: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Facts outermost: a form that projects its keys on the fly does so once per block.
    for rows in _slices(facts.num_rows, facts_per_block):
        keys, values = facts.block(rows)
        for place, tokens in enumerate(_slices(num_tokens, tokens_per_block)):
            # Contiguous: of strided queries torch multiplies each head by itself, several times slower.
            scores_Atm = torch.matmul(query_ATD[:, tokens].contiguous(), keys.transpose(-1, -2))
            terms = _Terms.of(bias_AT, facts, rows, tokens)
            weights_Atm, lse_At = (_softmax if torch.is_grad_enabled() else _softmax_in_place)(scores_Atm, terms)
            part = torch.matmul(weights_Atm.to(values.dtype), values).to(lse_At.dtype), lse_At
            if rows.start:
                merged[place] = merge(*merged[place], *part)
            else:
                merged.append(part)
    if len(merged) == 1:
        return merged[0]
    return torch.cat([out for out, _ in merged], 1), torch.cat([lse for _, lse in merged], 1)


def shares(
    query_ATD: torch.Tensor, bias_AT: torch.Tensor | None, facts: Facts, lse_AT: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each fact's share of a softmax over facts whose log-sum-exp is known, in blocks: (rows, shares [A, T, m])."""
    num_rows_A, num_tokens = query_ATD.shape[:2]
    # Where all facts are hidden their shares are 0: the difference of two infinities would make them NaN.
    lse_AT = lse_AT.masked_fill(lse_AT == NO_FACTS, 0.0)
    # Not larger blocks for fewer tokens: the form may be one that makes a block's keys, chosen for all the tokens.
    facts_per_block = _facts_per_block(query_ATD, max(num_rows_A * num_tokens, ROWS_PER_BLOCK))
    for rows in _slices(facts.num_rows, facts_per_block):
        keys, _ = facts.block(rows)
        scores_ATm = torch.matmul(query_ATD, keys.transpose(-1, -2))
        logits_ATm = _Terms.of(bias_AT, facts, rows, slice(0, num_tokens)).logits(scores_ATm)
        yield rows, torch.exp(logits_ATm - lse_AT[..., None])


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax from two parts: outputs [..., V], log-sum-exps [...]; exact whichever is larger, or empty."""
    # Finite stand-ins for empty parts, which `where` discards: two infinities would make their gradient NaN.
    low = torch.finfo(lse_a.dtype).min
    both = torch.logaddexp(lse_a.clamp_min(low), lse_b.clamp_min(low))
    lse = torch.where(lse_b == NO_FACTS, lse_a, torch.where(lse_a == NO_FACTS, lse_b, both))
    return torch.lerp(out_a, out_b, part_weight(lse_b, lse_a)[..., None]), lse


def softmax_with_log_sum_exp(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of logits [..., m] and their log-sum-exp [...], differentiable; some logit of each row is finite."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _SoftmaxWithLogSumExp.apply(logits)
    return _weights_and_log_sum(logits)


def _weights_and_log_sum(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.softmax(logits, -1)
    # The largest weight is exp(largest logit - lse), at least 1/m: cheaper than exponentials a second time.
    return weights, logits.amax(-1) - weights.amax(-1).log()


class _SoftmaxWithLogSumExp(torch.autograd.Function):
    """Both in one, with one backward: `p * (dp - sum(p dp) + dlse)`, the gradient of the log-sum-exp being p itself.

    Two separate operations would exponentiate twice forwards, and twice more backwards.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, lse = _weights_and_log_sum(logits)
        ctx.save_for_backward(weights)
        ctx.set_materialize_grads(False)
        return weights, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> torch.Tensor | None:
        (weights,) = ctx.saved_tensors
        of_weights, of_lse = gradients
        if of_weights is None:
            return None if of_lse is None else weights * of_lse[..., None]
        found = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        return found if of_lse is None else found.addcmul_(weights, of_lse[..., None])


def part_weight(lse: torch.Tensor, lse_other: torch.Tensor) -> torch.Tensor:
    """The share of the mass that a part has beside another one: sigmoid(lse - lse_other), and 0 for an empty part."""
    empty = lse == NO_FACTS
    # Replaced before the sigmoid, not after: the gradient of a discarded branch would be NaN.
    return torch.where(empty, 0.0, torch.sigmoid(torch.where(empty, 0.0, lse) - lse_other))


def _facts_per_block(query_ATD: torch.Tensor, num_queries: int) -> int:
    return max(1, SCORES_PER_BLOCK.get(query_ATD.device.type, SCORES_PER_BLOCK["cuda"]) // num_queries)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@dataclass(frozen=True)
class _Terms:
    """What makes logits of the scores of a block: `(score + bias) * scale + log weight`."""

    bias_At1: torch.Tensor | None
    scale_m: torch.Tensor | None
    log_weights: torch.Tensor | None

    @classmethod
    def of(cls, bias_AT: torch.Tensor | None, facts: Facts, rows: slice, tokens: slice) -> _Terms:
        scale_M = facts.scale_M()
        return cls(
            None if bias_AT is None else bias_AT[:, tokens, None],
            None if scale_M is None else scale_M[..., rows],
            facts.log_weights(rows, tokens),
        )

    def of_heads(self, heads: slice) -> _Terms:
        bias_at1 = None if self.bias_At1 is None else self.bias_At1[heads]
        scale, weights = (
            part[heads] if part is not None and part.dim() == 3 else part for part in (self.scale_m, self.log_weights)
        )
        return _Terms(bias_at1, scale, weights)

    def logits(self, scores_Atm: torch.Tensor) -> torch.Tensor:
        """In float32, or float64 for float64 scores; the scores themselves may be overwritten without autograd."""
        logits_Atm = scores_Atm.to(exact_dtype(scores_Atm.dtype))
        overwrite = not torch.is_grad_enabled()
        if self.bias_At1 is not None:
            bias_At1 = self.bias_At1.to(logits_Atm.dtype)
            logits_Atm = logits_Atm.add_(bias_At1) if overwrite else logits_Atm + bias_At1
        if self.scale_m is not None:
            scale_m = self.scale_m.to(logits_Atm.dtype)
            logits_Atm = logits_Atm.mul_(scale_m) if overwrite else logits_Atm * scale_m
        if self.log_weights is not None:
            logits_Atm = logits_Atm.add_(self.log_weights) if overwrite else logits_Atm + self.log_weights
        return logits_Atm


def _softmax(scores_Atm: torch.Tensor, terms: _Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [A, t, m] of the facts of a block and the log-sum-exp [A, t] of their logits."""
    logits_Atm = terms.logits(scores_Atm)
    may_be_empty = terms.log_weights is not None
    if may_be_empty:
        empty_At1 = logits_Atm.detach().amax(-1, keepdim=True) == NO_FACTS
        logits_Atm = logits_Atm.masked_fill(empty_At1, 0.0)
    weights_Atm, lse_At = softmax_with_log_sum_exp(logits_Atm)
    if may_be_empty:
        weights_Atm = weights_Atm.masked_fill(empty_At1, 0.0)
        lse_At = lse_At.masked_fill(empty_At1.squeeze(-1), NO_FACTS)
    return weights_Atm, lse_At


def _softmax_in_place(scores_Atm: torch.Tensor, terms: _Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """`_softmax` in the memory of the scores and in their dtype, some heads at a time."""
    lse_At = scores_Atm.new_empty(scores_Atm.shape[:2], dtype=exact_dtype(scores_Atm.dtype))
    budget = LOGITS_PER_BLOCK.get(scores_Atm.device.type, LOGITS_PER_BLOCK["cuda"])
    for heads in _slices(len(scores_Atm), max(1, budget // scores_Atm[0].numel())):
        weights_atm, lse_At[heads] = _softmax(scores_Atm[heads], terms.of_heads(heads))
        scores_Atm[heads] = weights_atm
    return scores_Atm, lse_At
