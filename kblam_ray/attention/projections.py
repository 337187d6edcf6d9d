"""What an adapter's weights become before use: centred projections, one layer's slices, the scale of a fact.

Shape legend: M facts, S slots of the key vector, N query heads, H head dim, P encoder dim.

Kind "paper" (KBLaM, arXiv 2410.10450, eqs. 5-8): the key of fact m is `LayerNorm(W_K e_m + b_K)` over all S*N*H
numbers, without affine part. Written out, it is `r_m (W_K e_m + b_K)` once the mean over the S*N*H rows is taken out
of W_K and b_K, which the LayerNorm cannot see, with

    r_m   = 1 / sqrt(var_m + eps)
    var_m = e_m^T G e_m + c^T e_m + mean(b_K^2),   G = W_K^T W_K / (S N H),   c = 2 W_K^T b_K / (S N H)

so that the key of a fact costs one number, r_m, and the projection moves to the query (`layer_facts.py`). Without the
centring the terms of the variance cancel badly in float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.partitioned import check_gathered

LAYER_NORM_EPS = 1e-5
FACTS_PER_BLOCK = 8_192

Weights = TypeVar("Weights")


@dataclass(frozen=True)
class LayerWeights:
    """The slices of the projections that one KB layer reads, in the dtype of the hidden states.

    Attributes:
        key_NHP, key_bias_NH: centred key projection; empty for kind "shared", which compares base embeddings.
        value_NHP, value_bias_NH: value projection.
    """

    key_NHP: torch.Tensor
    key_bias_NH: torch.Tensor
    value_NHP: torch.Tensor
    value_bias_NH: torch.Tensor


@dataclass(frozen=True)
class QueryWeights:
    """The query side of one KB layer, in the dtype of the hidden states.

    Attributes:
        head, head_bias: query heads [N*H, hidden] without bias, or the shared query [P, hidden] with one.
        gate, gate_bias: [N, hidden] and [N] of kind "shared", else None.
    """

    head: torch.Tensor
    head_bias: torch.Tensor | None
    gate: torch.Tensor | None
    gate_bias: torch.Tensor | None


@dataclass(frozen=True)
class WholeWeights:
    """The projections of all slots of kind "paper" in one dtype, Z = S*N*H: centred keys, and values."""

    key_ZP: torch.Tensor
    key_bias_Z: torch.Tensor
    value_ZP: torch.Tensor
    value_bias_Z: torch.Tensor


class Projections:
    """Everything derived from the weights of one adapter, differentiable in them unless built without autograd.

    Attributes:
        is_kept: built without autograd, for more than one forward pass.

    Raises:
        AdapterError: the tensors are partitioned over processes, and not gathered now.
    """

    def __init__(self, adapter: KnowledgeAdapter) -> None:
        check_gathered(adapter)
        config, shape = adapter.config, adapter.config.base_shape
        self._layers = {layer: config.slot_of(layer) for layer in config.layers}
        self._is_paper = config.kind == "paper"
        self.is_kept = not is_differentiable(adapter)
        self._gram: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._whole: dict[torch.dtype, tuple[torch.Tensor, ...]] = {}
        self._cast: dict[tuple[int, torch.dtype], LayerWeights] = {}
        self._cast_queries: dict[tuple[int, torch.dtype], QueryWeights] = {}
        self._queries = {layer: self._query_tensors(adapter, str(layer)) for layer in config.layers}
        heads = (-1, shape.num_heads, shape.head_dim)
        value = adapter.value_projection
        self._value_SNHP, self._value_bias_SNH = (
            self._own(tensor).unflatten(0, heads) for tensor in (value.weight, value.bias)
        )
        self._key_SNHP = self._value_SNHP.new_empty(config.slots, 0, 0, 0)
        self._key_bias_SNH = self._value_SNHP.new_empty(config.slots, 0, 0)
        if self._is_paper:
            exact = exact_dtype(adapter.dtype)
            weight_RP, bias_R = adapter.key_projection.weight.to(exact), adapter.key_projection.bias.to(exact)
            weight_RP, bias_R = weight_RP - weight_RP.mean(0), bias_R - bias_R.mean()
            self._key_SNHP, self._key_bias_SNH = weight_RP.unflatten(0, heads), bias_R.unflatten(0, heads)
            if self.is_kept:
                self._gram_terms()

    @classmethod
    def of(cls, adapter: KnowledgeAdapter) -> Projections:
        """The projections of the adapter as it is now; kept between calls as long as its weights stay, unless
        autograd is recording them."""
        if is_differentiable(adapter):
            return cls(adapter)
        key = adapter.weights_key()
        known = _KNOWN.get(adapter)
        if known is None or known[0] != key:
            with for_keeping(adapter.device):
                known = (key, cls(adapter))
            _KNOWN[adapter] = known
        return known[1]

    def cast(self, dtype: torch.dtype) -> None:
        """Make what all KB layers read as `dtype`, once for a whole forward pass with autograd.

        For the beginning of a pass: gradient checkpointing repeats layers, which must see the same operations again.
        """
        slots = [*zip(*(part.unbind(0) for part in self._sources(dtype)), strict=True)]
        for layer, slot in self._layers.items():
            self._cast[layer, dtype] = LayerWeights(*slots[slot])
            self._cast_queries[layer, dtype] = self._query_weights(layer, dtype)

    def whole(self, dtype: torch.dtype) -> WholeWeights:
        """The projections of all slots, of kind "paper", as `dtype`."""
        return WholeWeights(*(part.flatten(0, 2) for part in self._sources(dtype)))

    def _sources(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        if dtype not in self._whole:
            parts = (self._key_SNHP, self._key_bias_SNH, self._value_SNHP, self._value_bias_SNH)
            self._whole[dtype] = tuple(part.to(dtype) for part in parts)
        return self._whole[dtype]

    def layer(self, layer: int, dtype: torch.dtype) -> LayerWeights:
        """What KB layer `layer` reads of the facts' projections, as `dtype`."""
        return self._kept(self._cast, layer, dtype, self._slices)

    def query(self, layer: int, dtype: torch.dtype) -> QueryWeights:
        """What makes the queries of KB layer `layer`, as `dtype`."""
        return self._kept(self._cast_queries, layer, dtype, self._query_weights)

    def _kept(
        self,
        known: dict[tuple[int, torch.dtype], Weights],
        layer: int,
        dtype: torch.dtype,
        make: Callable[[int, torch.dtype], Weights],
    ) -> Weights:
        if (layer, dtype) not in known:
            if not self.is_kept:
                # Not even between layers: gradient checkpointing repeats a layer and must see the same operations.
                return make(layer, dtype)
            with torch.inference_mode(False), torch.no_grad():
                known[layer, dtype] = make(layer, dtype)
        return known[layer, dtype]

    def _slices(self, layer: int, dtype: torch.dtype) -> LayerWeights:
        slot = self._layers[layer]
        sources = (self._key_SNHP, self._key_bias_SNH, self._value_SNHP, self._value_bias_SNH)
        return LayerWeights(*(source[slot].to(dtype) for source in sources))

    def _query_weights(self, layer: int, dtype: torch.dtype) -> QueryWeights:
        head, *others = self._queries[layer]
        assert head is not None
        return QueryWeights(head.to(dtype), *(None if tensor is None else tensor.to(dtype) for tensor in others))

    def _query_tensors(self, adapter: KnowledgeAdapter, layer: str) -> list[torch.Tensor | None]:
        modules: list[Any] = [adapter.query_heads[layer]]
        if not self._is_paper:
            modules.append(adapter.gates[layer])
        tensors = [tensor for module in modules for tensor in (module.weight, module.bias)]
        return [None if tensor is None else self._own(tensor) for tensor in tensors] + [None] * (4 - len(tensors))

    def _own(self, parameter: torch.Tensor) -> torch.Tensor:
        # A view of a parameter requires a gradient even when made without autograd.
        return parameter.detach() if self.is_kept else parameter

    def fact_scale(self, keys_MP: torch.Tensor) -> torch.Tensor:
        """r_m of each fact: float32 [M] (float64 where the adapter is)."""
        blocks = [self._scale_block(block_MP) for block_MP in keys_MP.split(FACTS_PER_BLOCK)]
        return torch.cat(blocks) if blocks else self._key_bias_SNH.new_empty(0)

    def _scale_block(self, keys_MP: torch.Tensor) -> torch.Tensor:
        gram_PP, cross_P, bias_square = self._gram_terms()
        keys_MP = keys_MP.to(gram_PP.dtype)
        variance_M = (keys_MP @ gram_PP + cross_P).mul(keys_MP).sum(-1) + bias_square
        return torch.rsqrt(variance_M.clamp_min(0) + LAYER_NORM_EPS)

    def _gram_terms(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """G, c and the mean of b_K^2; made when first asked for, since projected keys need none of them."""
        if self._gram is None:
            weight_ZP, bias_Z = self._key_SNHP.flatten(0, 2), self._key_bias_SNH.flatten()
            gram_PP = weight_ZP.T @ weight_ZP / len(weight_ZP)
            self._gram = (gram_PP, 2 * (bias_Z @ weight_ZP) / len(weight_ZP), bias_Z.square().mean())
        return self._gram


def scale_of_keys(keys_XZ: torch.Tensor) -> torch.Tensor:
    """r_m of centred projected keys [..., Z] themselves, `1 / sqrt(mean(key^2) + eps)`: float32 [...], or float64."""
    norm_X = torch.linalg.vector_norm(keys_XZ, dim=-1, dtype=exact_dtype(keys_XZ.dtype))
    return torch.rsqrt(norm_X.square() / keys_XZ.shape[-1] + LAYER_NORM_EPS)


@contextmanager
def for_keeping(device: torch.device) -> Iterator[None]:
    """For values that outlive the call: no graph hangs on them, training may use them, and they are exact."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


_KNOWN: weakref.WeakKeyDictionary[KnowledgeAdapter, tuple[tuple, Projections]] = weakref.WeakKeyDictionary()


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for softmaxes and norms over tensors of `dtype`: float32, or float64 where they are."""
    return torch.promote_types(dtype, torch.float32)


def requires_grad(adapter: KnowledgeAdapter) -> bool:
    return any(parameter.requires_grad for parameter in adapter.parameters())


def is_differentiable(adapter: KnowledgeAdapter) -> bool:
    """Whether autograd is recording what is made from the adapter's weights."""
    return torch.is_grad_enabled() and requires_grad(adapter)


def fact_scale(adapter: KnowledgeAdapter, keys_MP: torch.Tensor) -> torch.Tensor:
    """r_m of each fact for an adapter of kind "paper": float32 [M], differentiable in weights and embeddings."""
    return Projections.of(adapter).fact_scale(keys_MP)


def materialize(
    adapter: KnowledgeAdapter, layer: int, keys_MP: torch.Tensor, values_MP: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Keys and values of facts as one KB layer reads them (KBLaM, arXiv 2410.10450, eqs. 5-6).

    Returns:
        Kind "paper": keys [N, M, H] after the LayerNorm and values [N, M, H]. Kind "shared": None (it scores base
        embeddings) and values [M, N*H].
    """
    projections = Projections.of(adapter)
    weights = projections.layer(layer, exact_dtype(dtype))
    keys, values = [], []
    # In blocks: the float32 copies of a million embeddings are larger than what is asked for.
    for keys_mP, values_mP in zip(keys_MP.split(FACTS_PER_BLOCK), values_MP.split(FACTS_PER_BLOCK), strict=True):
        keys_mP, values_mP = keys_mP.to(exact_dtype(dtype)), values_mP.to(exact_dtype(dtype))
        value_mNH = values_mP @ weights.value_NHP.flatten(0, 1).T + weights.value_bias_NH.flatten()
        if adapter.config.kind == "shared":
            values.append(value_mNH.to(dtype))
            continue
        key_mX = keys_mP @ weights.key_NHP.flatten(0, 1).T + weights.key_bias_NH.flatten()
        key_mX = key_mX * projections.fact_scale(keys_mP)[:, None]
        shape = weights.key_NHP.shape[:2]
        keys.append(key_mX.unflatten(1, shape).transpose(0, 1).to(dtype))
        values.append(value_mNH.unflatten(1, shape).transpose(0, 1).to(dtype))
    num_heads, head_dim = weights.value_bias_NH.shape
    if adapter.config.kind == "shared":
        return None, torch.cat(values) if values else values_MP.new_empty(0, num_heads * head_dim, dtype=dtype)
    if not keys:
        empty = keys_MP.new_empty(num_heads, 0, head_dim, dtype=dtype)
        return empty, empty
    return torch.cat(keys, 1).contiguous(), torch.cat(values, 1).contiguous()
