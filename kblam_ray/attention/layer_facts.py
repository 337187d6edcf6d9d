"""One KB layer's view of facts and queries: four forms of the same attention, all exact.

Shape legend: A rows of queries per token, T tokens, M facts, m facts of one block, N query heads, H head dim,
P encoder dim.

latent        (default) keys and values are never made: the projections are linear, so the query is carried into the
              encoder's space, scored against base embeddings, and the mixed base embedding is projected back
              (the same identity that multi-head latent attention uses, arXiv 2405.04434).
expanded      the latent form for many tokens at once: a block's keys and values are made, used and thrown away, which
              takes fewer operations as soon as T > P*H / (P - H).
materialized  keys and values of every KB layer are kept in memory.
shared        the adapter kind whose heads share one score: latent or materialized values.

Each gives `query_ATD`, `bias_AT`, `facts(view)` for `softmax.attend`, and `finish` for what comes out of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.memory import ChunkView
from kblam_ray.attention.projections import LayerWeights, Projections, exact_dtype
from kblam_ray.attention.softmax import Facts

ScaleOf = Callable[[ChunkView], torch.Tensor | None]
"""The r_m of a view's facts for the adapter in use, with autograd where that is on."""


@dataclass(frozen=True)
class LayerQuery:
    """What the query side of one KB layer gives for some tokens.

    Attributes:
        query: kind "paper": query heads [T, N, H]; kind "shared": the query in the encoder's space [T, P].
        gate_TN: kind "shared": what is added to every KB logit of a head, or None.
    """

    query: torch.Tensor
    gate_TN: torch.Tensor | None

    def take(self, tokens: torch.Tensor | slice | None) -> LayerQuery:
        """Those of some tokens; None: of all."""
        if tokens is None:
            return self
        return LayerQuery(self.query[tokens], None if self.gate_TN is None else self.gate_TN[tokens])


def layer_query(adapter: KnowledgeAdapter, layer: int, projections: Projections, hidden_TX: torch.Tensor) -> LayerQuery:
    """Queries of one KB layer from the hidden states that its attention module receives [T, hidden]."""
    weights = projections.query(layer, hidden_TX.dtype)
    query = torch.nn.functional.linear(hidden_TX, weights.head, weights.head_bias)
    if weights.gate is None:
        shape = adapter.config.base_shape
        return LayerQuery(query.unflatten(-1, (shape.num_heads, shape.head_dim)), None)
    return LayerQuery(query, torch.nn.functional.linear(hidden_TX, weights.gate, weights.gate_bias))


class Form(ABC):
    """A way to score and mix facts in one KB layer.

    Attributes:
        query_ATD: queries, already divided by sqrt(H) where the kind does so.
        bias_AT: what is added to each query's scores before the facts' scale, or None.
    """

    query_ATD: torch.Tensor
    bias_AT: torch.Tensor | None = None

    def facts(self, view: ChunkView, log_weights: LogWeights | None) -> Facts:
        """The facts of a view, for `softmax.attend`."""
        return _ViewFacts(view, log_weights, self.scale(view), self.block)

    def scale(self, view: ChunkView) -> torch.Tensor | None:
        """What each fact's score is multiplied by [num_rows], or None."""
        return None

    @abstractmethod
    def block(self, view: ChunkView, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some rows of a view, see `softmax.Facts`."""

    @abstractmethod
    def finish(self, mixed_ATV: torch.Tensor, lse_AT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [T, N, H] and log-sum-exps [T, N] of the heads."""


def layer_form(
    adapter: KnowledgeAdapter,
    layer: int,
    query: LayerQuery,
    projections: Projections,
    form: str,
    scale_of: ScaleOf,
    *,
    is_expanded: bool | None = None,
) -> Form:
    """The form in which a memory's facts meet these queries.

    Args:
        is_expanded: whether a latent kind "paper" makes keys and values; None: if that takes fewer operations.
    """
    is_materialized = form == "materialized"
    weights = projections.layer(layer, query.query.dtype)
    if adapter.config.kind == "shared":
        return (
            SharedMaterialized(adapter, layer, weights, query)
            if is_materialized
            else SharedLatent(adapter, weights, query)
        )
    if is_materialized:
        return PaperMaterialized(adapter, layer, query)
    if is_expanded is None:
        num_tokens, head_dim = len(query.query), query.query.shape[-1]
        is_expanded = is_cheaper_expanded(num_tokens=num_tokens, head_dim=head_dim, dim=adapter.config.dim)
    if is_expanded:
        return PaperExpanded(weights, query, scale_of)
    return PaperLatent(weights, query, scale_of)


def is_cheaper_expanded(*, num_tokens: int, head_dim: int, dim: int) -> bool:
    """Whether making a block's keys takes fewer operations than scoring in the encoder's space.

    Per fact and head, scoring and mixing take 2 T P multiplications in the encoder's space, and 2 P H + 2 T H with keys
    and values made first.
    """
    return num_tokens * dim > dim * head_dim + num_tokens * head_dim


@dataclass(frozen=True)
class LogWeights:
    """What is added to the logits of one view's facts: priors, and -inf for hidden facts.

    Attributes:
        weights_KM: float32 [K, num_rows], the distinct weights of some tokens.
        place_T: int64 [T], which of them is a token's; None if there is but one.
    """

    weights_KM: torch.Tensor
    place_T: torch.Tensor | None = None

    def block(self, rows: slice, tokens: slice) -> torch.Tensor:
        if self.place_T is None:
            return self.weights_KM[0, rows]
        return self.weights_KM[:, rows][self.place_T[tokens]]

    def take(self, tokens: torch.Tensor) -> LogWeights:
        """Those of some of the tokens."""
        return self if self.place_T is None else LogWeights(self.weights_KM, self.place_T[tokens])


@dataclass(frozen=True)
class _ViewFacts:
    """A view as a form sees it: `softmax.Facts`."""

    view: ChunkView
    weights: LogWeights | None
    scale: torch.Tensor | None
    make_block: Callable[[ChunkView, slice], tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_rows(self) -> int:
        return self.view.num_rows

    def block(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.make_block(self.view, rows)

    def scale_M(self) -> torch.Tensor | None:
        return self.scale

    def log_weights(self, rows: slice, tokens: slice) -> torch.Tensor | None:
        return None if self.weights is None else self.weights.block(rows, tokens)


def _embeddings(view: ChunkView, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys_MP, values_MP = view.chunk.keys_MP, view.chunk.values_MP
    return view.rows(keys_MP, 0, rows.start, rows.stop).to(dtype), view.rows(values_MP, 0, rows.start, rows.stop).to(
        dtype
    )


class PaperLatent(Form):
    """Kind "paper": `<q~, key_m> = r_m (<W_K^T q~, e_m> + <q~, b_K>)`, `out = W_V (sum_m p_m v_m) + b_V`."""

    def __init__(self, weights: LayerWeights, query: LayerQuery, scale_of: ScaleOf) -> None:
        query_NTH = _per_head(query)
        self.query_ATD = torch.bmm(query_NTH, weights.key_NHP)
        self.bias_AT = torch.bmm(query_NTH, weights.key_bias_NH[..., None]).squeeze(-1)
        self._weights, self._scale_of = weights, scale_of

    def scale(self, view: ChunkView) -> torch.Tensor | None:
        return self._scale_of(view)

    def block(self, view: ChunkView, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _embeddings(view, rows, self.query_ATD.dtype)

    def finish(self, mixed_ATV: torch.Tensor, lse_AT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value_NHP = self._weights.value_NHP
        out_NTH = torch.bmm(mixed_ATV.to(value_NHP.dtype), value_NHP.transpose(1, 2))
        return (out_NTH + self._weights.value_bias_NH[:, None]).transpose(0, 1), lse_AT.T


class PaperExpanded(Form):
    """Kind "paper" with the keys and values of a block made on the fly, from base embeddings."""

    def __init__(self, weights: LayerWeights, query: LayerQuery, scale_of: ScaleOf) -> None:
        self.query_ATD = _per_head(query)
        self._weights, self._scale_of = weights, scale_of

    def scale(self, view: ChunkView) -> torch.Tensor | None:
        return self._scale_of(view)

    def block(self, view: ChunkView, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        keys_mP, values_mP = _embeddings(view, rows, self.query_ATD.dtype)
        weights = self._weights
        keys_NmH = _heads(keys_mP, weights.key_NHP, weights.key_bias_NH)
        return keys_NmH, _heads(values_mP, weights.value_NHP, weights.value_bias_NH)

    def finish(self, mixed_ATV: torch.Tensor, lse_AT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mixed_ATV.transpose(0, 1), lse_AT.T


class PaperMaterialized(Form):
    """Kind "paper" with all keys and values in memory, the LayerNorm applied."""

    def __init__(self, adapter: KnowledgeAdapter, layer: int, query: LayerQuery) -> None:
        self.query_ATD = _per_head(query)
        self._adapter, self._layer = adapter, layer

    def block(self, view: ChunkView, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        keys_NMH, values_NMH = view.chunk.materialized(self._adapter, self._layer, self.query_ATD.dtype)
        assert keys_NMH is not None
        return view.rows(keys_NMH, 1, rows.start, rows.stop), view.rows(values_NMH, 1, rows.start, rows.stop)

    def finish(self, mixed_ATV: torch.Tensor, lse_AT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mixed_ATV.transpose(0, 1), lse_AT.T


class SharedLatent(Form):
    """Kind "shared": `<u, (e_m - mean) / scale>` for all heads, a gate per head, and `W_V (sum_m p_m v_m) + b_V`."""

    def __init__(self, adapter: KnowledgeAdapter, weights: LayerWeights, query: LayerQuery) -> None:
        exact = exact_dtype(query.query.dtype)
        # Dividing by the scale and subtracting the mean on the query's side leaves the embeddings as they are stored.
        query_TP = query.query.to(exact) / adapter.key_scale.to(exact)
        self.query_ATD = query_TP.to(query.query.dtype)[None]
        self.bias_AT = -(self.query_ATD.to(exact) @ adapter.key_mean.to(exact))
        self._weights, self._gate_TN = weights, query.gate_TN

    def block(self, view: ChunkView, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _embeddings(view, rows, self.query_ATD.dtype)

    def finish(self, mixed_ATV: torch.Tensor, lse_AT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self._weights
        flat_TX = mixed_ATV[0].to(weights.value_NHP.dtype) @ weights.value_NHP.flatten(0, 1).T
        out_TNH = (flat_TX + weights.value_bias_NH.flatten()).unflatten(-1, weights.value_bias_NH.shape)
        return out_TNH, self._gated(lse_AT)

    def _gated(self, lse_AT: torch.Tensor) -> torch.Tensor:
        assert self._gate_TN is not None
        return lse_AT.T + self._gate_TN.to(lse_AT.dtype)


class SharedMaterialized(SharedLatent):
    """Kind "shared" with the values of every KB layer in memory."""

    def __init__(self, adapter: KnowledgeAdapter, layer: int, weights: LayerWeights, query: LayerQuery) -> None:
        super().__init__(adapter, weights, query)
        self._adapter, self._layer = adapter, layer

    def block(self, view: ChunkView, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        _, values_MX = view.chunk.materialized(self._adapter, self._layer, self.query_ATD.dtype)
        keys_MP = view.rows(view.chunk.keys_MP, 0, rows.start, rows.stop)
        return keys_MP.to(self.query_ATD.dtype), view.rows(values_MX, 0, rows.start, rows.stop)

    def finish(self, mixed_ATV: torch.Tensor, lse_AT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mixed_ATV[0].unflatten(-1, self._weights.value_bias_NH.shape), self._gated(lse_AT)


def _per_head(query: LayerQuery) -> torch.Tensor:
    """Query heads [N, T, H], divided by sqrt(H)."""
    return query.query.transpose(0, 1) / math.sqrt(query.query.shape[-1])


def _heads(embeddings_mP: torch.Tensor, weight_NHP: torch.Tensor, bias_NH: torch.Tensor) -> torch.Tensor:
    projected_mX = torch.nn.functional.linear(embeddings_mP, weight_NHP.flatten(0, 1), bias_NH.flatten())
    # Contiguous per head: products with strided keys take several times as long.
    return projected_mX.unflatten(1, bias_NH.shape).transpose(0, 1).contiguous()
