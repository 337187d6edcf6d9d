"""Softmax over facts in blocks: the mixed values and the log-sum-exp of every query, and how two such parts merge.

Shape legend: A rows of queries per token (query heads, or 1 where they share a score), T tokens, M facts, m facts of
one block, D numbers in a key, V numbers in a value.

A part of a softmax is a pair (output, log-sum-exp of its logits). Parts over different facts merge exactly, in any
order (Milakov and Gimelshein, arXiv 1805.02867; KBLaM's rectangular attention is one softmax over [facts | text]), so
nothing of the size tokens x facts ever exists whole. A part without any visible fact has output 0 and
log-sum-exp -inf, set explicitly: computed, it would be 0 * NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from kblam_ray.attention.projections import exact_dtype

NO_FACTS = float("-inf")

ROWS_PER_BLOCK = 1_024
"""Query rows worked on at a time."""

SCORES_PER_BLOCK = {"cpu": 2**21, "cuda": 2**26}
"""Scores held at a time: what stays close to the cores on a CPU (measured), and a quarter of a gigabyte elsewhere."""


class Facts(Protocol):
    """Facts as one KB layer scores and mixes them; `layer_facts.py` has the forms."""

    @property
    def num_rows(self) -> int: ...

    def block(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some rows: [m, D] or [A, m, D], and [m, V] or [A, m, V], in the queries' dtype."""

    def scale_M(self) -> torch.Tensor | None:
        """What each fact's score is multiplied by, or None."""

    def log_weights(self, rows: slice, tokens: slice) -> torch.Tensor | None:
        """What is added to the logits after scaling: [m] or [t, m], -inf where a fact is hidden; None for nothing."""


def attend(query_ATD: torch.Tensor, bias_AT: torch.Tensor | None, facts: Facts) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over facts: `softmax((query . key + bias) * scale + log weight)` over the facts, times the values.

    Differentiable when autograd is on, then with all scores of a view in memory; otherwise block by block.

    Returns:
        Mixed values [A, T, V] and log-sum-exp [A, T], both float32 (float64 for float64 queries).
    """
    num_rows_A, num_tokens = query_ATD.shape[:2]
    tokens_per_block, facts_per_block = num_tokens, facts.num_rows
    if not torch.is_grad_enabled():
        tokens_per_block = max(1, min(num_tokens, ROWS_PER_BLOCK // num_rows_A))
        facts_per_block = _facts_per_block(query_ATD, num_rows_A * tokens_per_block)
    merged: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Facts outermost: a form that projects its keys on the fly does so once per block.
    for rows in _slices(facts.num_rows, facts_per_block):
        keys, values = facts.block(rows)
        for place, tokens in enumerate(_slices(num_tokens, tokens_per_block)):
            scores_Atm = _scores(query_ATD, bias_AT, keys, facts, rows, tokens)
            part = _mix(scores_Atm, values, may_be_empty=facts.log_weights(rows, tokens) is not None)
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
        scores_ATm = _scores(query_ATD, bias_AT, keys, facts, rows, slice(0, num_tokens))
        yield rows, torch.exp(scores_ATm - lse_AT[..., None])


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax from two parts: outputs [..., V], log-sum-exps [...]; exact whichever is larger, or empty."""
    # Finite stand-ins for empty parts, which `where` discards: two infinities would make their gradient NaN.
    low = torch.finfo(lse_a.dtype).min
    both = torch.logaddexp(lse_a.clamp_min(low), lse_b.clamp_min(low))
    lse = torch.where(lse_b == NO_FACTS, lse_a, torch.where(lse_a == NO_FACTS, lse_b, both))
    return torch.lerp(out_a, out_b, part_weight(lse_b, lse_a)[..., None]), lse


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


def _scores(
    query_ATD: torch.Tensor, bias_AT: torch.Tensor | None, keys: torch.Tensor, facts: Facts, rows: slice, tokens: slice
) -> torch.Tensor:
    """Logits of a block [A, t, m] in float32, or float64 for float64 queries."""
    may_overwrite = not torch.is_grad_enabled()
    scores_Atm = torch.matmul(query_ATD[:, tokens], keys.transpose(-1, -2)).to(exact_dtype(query_ATD.dtype))
    if bias_AT is not None:
        bias_At1 = bias_AT[:, tokens, None].to(scores_Atm.dtype)
        scores_Atm = scores_Atm.add_(bias_At1) if may_overwrite else scores_Atm + bias_At1
    scale_M = facts.scale_M()
    if scale_M is not None:
        scale_m = scale_M[rows].to(scores_Atm.dtype)
        scores_Atm = scores_Atm.mul_(scale_m) if may_overwrite else scores_Atm * scale_m
    log_weights = facts.log_weights(rows, tokens)
    if log_weights is not None:
        scores_Atm = scores_Atm.add_(log_weights) if may_overwrite else scores_Atm + log_weights
    return scores_Atm


def _mix(scores_Atm: torch.Tensor, values: torch.Tensor, *, may_be_empty: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a softmax that a block of facts makes: output [A, t, V] and log-sum-exp [A, t]."""
    largest_At1 = scores_Atm.detach().amax(-1, keepdim=True)
    if may_be_empty:
        empty_At1 = largest_At1 == NO_FACTS
        scores_Atm = scores_Atm.masked_fill(empty_At1, 0.0)
    weights_Atm = torch.softmax(scores_Atm, -1)
    if torch.is_grad_enabled():
        lse_At = torch.logsumexp(scores_Atm, -1)
    else:
        # The largest weight is exp(largest score - lse), at least 1/m: cheaper than exponentials a second time.
        lse_At = (largest_At1 - weights_Atm.amax(-1, keepdim=True).log()).squeeze(-1)
    if may_be_empty:
        weights_Atm = weights_Atm.masked_fill(empty_At1, 0.0)
        lse_At = lse_At.masked_fill(empty_At1.squeeze(-1), NO_FACTS)
    return torch.matmul(weights_Atm.to(values.dtype), values).to(scores_Atm.dtype), lse_At
