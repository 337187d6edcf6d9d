"""Watches a training step's attention to facts: with gradients, and at the tokens that matter only.

What is kept are numbers per token, not per token and fact: the log-sum-exp of all of a token's scores is known from its
attention, so the share of a fact takes one product of a query and a key.

Shape legend: B batch, T tokens, M facts, W pairs of a token and a fact, A rows of queries per token (query heads, or 1
where they share a score), R groups of a stack, D numbers in a key.
"""

from __future__ import annotations

import math

import torch

from kblam_ray.attention.batch import Attended, AttendedGroup
from kblam_ray.attention.projections import exact_dtype
from kblam_ray.attention.stacking import StackAttended


class FactWatcher:
    """Records at some KB layers how large the share of given facts is, and how strongly tokens score any fact.

    Gradient checkpointing calls `record` once more while going backwards; it computes the same then and keeps the
    first.

    Args:
        layers: KB layers to watch.
        token_W: int64 [W], tokens among all B * T of the batch.
        place_W: int64 [W], rows of their memory's facts. Memories must be of one chunk with nothing hidden.
        scored_T: int64, tokens of which the log-sum-exp of scores is wanted.

    Attributes:
        log_shares: per layer, the log of each pair's share of the softmax over the facts, mean over heads of the share:
            [W], float32 (float64 where the model is).
        log_sums: per layer, the log-sum-exp of the scores of all facts, without `log C - log M`, gates or text, mean
            over heads: [len(scored_T)].
    """

    def __init__(
        self, layers: tuple[int, ...], token_W: torch.Tensor, place_W: torch.Tensor, scored_T: torch.Tensor
    ) -> None:
        self._layers, self._token_W, self._place_W, self._scored_T = layers, token_W, place_W, scored_T
        self.log_shares: dict[int, torch.Tensor] = {}
        self.log_sums: dict[int, torch.Tensor] = {}

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        """See `attention.batch.Recorder`."""
        if layer not in self._layers:
            return
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        for source in attended.sources:
            in_source = _Local(source, attended.num_tokens, self._token_W.device)
            pairs, token_w = in_source.find(self._token_W)
            scored, token_t = in_source.find(self._scored_T)
            shares_w = _log_mean(_log_shares(source, token_w, self._place_W[pairs]))
            sums_t = _log_sums(source, token_t).mean(-1)
            if len(attended.sources) == 1:
                found = shares_w, sums_t
                break
            log_share_W, log_sum_T = found or (
                shares_w.new_zeros(len(self._token_W)),
                sums_t.new_zeros(len(self._scored_T)),
            )
            found = log_share_W.index_copy(0, pairs, shares_w), log_sum_T.index_copy(0, scored, sums_t)
        assert found is not None
        self.log_shares.setdefault(layer, found[0])
        self.log_sums.setdefault(layer, found[1])


class _Local:
    """Where the batch's tokens stand among those of one source."""

    def __init__(self, source: AttendedGroup | StackAttended, num_tokens: int, device: torch.device) -> None:
        tokens = source.stack.tokens if isinstance(source, StackAttended) else source.group.tokens
        self._local_T = None
        if tokens is not None:
            self._local_T = torch.full((num_tokens,), -1, device=device)
            self._local_T[tokens] = torch.arange(len(tokens), device=device)

    def find(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the tokens are here, and as which of the source's."""
        if self._local_T is None:
            return torch.arange(len(tokens), device=tokens.device), tokens
        local = self._local_T[tokens]
        here = (local >= 0).nonzero().squeeze(1)
        return here, local[here]


def _log_shares(source: AttendedGroup | StackAttended, token_W: torch.Tensor, place_W: torch.Tensor) -> torch.Tensor:
    """Log of the share that facts have for tokens of a source: [W, A]."""
    if isinstance(source, StackAttended):
        query_WAD, bias_WA, key, scale_W, lse_WA = _of_stack(source, token_W, place_W)
    else:
        query_WAD, bias_WA, key, scale_W, lse_WA = _of_group(source, token_W, place_W)
    exact = exact_dtype(query_WAD.dtype)
    key_WAD = key if key.dim() == 3 else key[:, None]
    # Rounded as the attention rounded its scores: in 16 bits a share would else come out above 1.
    score_WA = (query_WAD.to(exact) * key_WAD.to(exact)).sum(-1).to(query_WAD.dtype).to(exact)
    if bias_WA is not None:
        score_WA = score_WA + bias_WA.to(exact)
    if scale_W is not None:
        score_WA = score_WA * scale_W[:, None].to(exact)
    return score_WA - lse_WA


def _of_stack(source: StackAttended, token_W: torch.Tensor, place_W: torch.Tensor) -> tuple:
    facts = source.facts
    groups, num_rows, num_tokens = facts.shape_RAT
    row_W, at_W = token_W.div(num_tokens, rounding_mode="floor"), token_W % num_tokens
    query_WAD = source.stacked_query.reshape(groups, num_rows, num_tokens, -1)[row_W, :, at_W]
    bias_WA = None
    if source.stacked_bias is not None:
        bias_WA = source.stacked_bias.reshape(groups, num_rows, num_tokens)[row_W, :, at_W]
    if facts.is_per_head:
        key = facts.keys.unflatten(0, (groups, num_rows))[row_W, :, place_W]
    else:
        key = facts.keys[row_W, place_W]
    scale_W = None if facts.scale_R1M is None else facts.scale_R1M[row_W, 0, place_W]
    return query_WAD, bias_WA, key, scale_W, source.lse_RAT[row_W, :, at_W]


def _of_group(source: AttendedGroup, token_W: torch.Tensor, place_W: torch.Tensor) -> tuple:
    form = source.form
    (view,) = source.group.memory.views
    keys, _ = form.block(view, slice(0, view.num_rows))
    key = keys[place_W] if keys.dim() == 2 else keys[:, place_W].transpose(0, 1)
    scale_M = form.scale(view)
    bias_WA = None if form.bias_AT is None else form.bias_AT[:, token_W].T
    scale_W = None if scale_M is None else scale_M[place_W]
    return form.query_ATD[:, token_W].transpose(0, 1), bias_WA, key, scale_W, source.lse_AT[:, token_W].T


def _log_sums(source: AttendedGroup | StackAttended, token_T: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the scores of tokens of a source: [T, A]."""
    if isinstance(source, AttendedGroup):
        return source.lse_AT[:, token_T].T
    num_tokens = source.facts.shape_RAT[2]
    return source.lse_RAT[token_T.div(num_tokens, rounding_mode="floor"), :, token_T % num_tokens]


def _log_mean(log_share_WA: torch.Tensor) -> torch.Tensor:
    """Log of the mean share over the rows of queries."""
    return torch.logsumexp(log_share_WA, -1) - math.log(log_share_WA.shape[-1])
