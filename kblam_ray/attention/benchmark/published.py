"""The computation of the published KBLaM code, written anew, as the rival of the benchmark.

Shape legend: B batch, T prompt tokens, S text tokens attended to, M facts, N query heads, H head dim, P encoder dim,
X = slots * N * H numbers in a key vector.

Keys and values of all KB layers are projected once (KBLaM, arXiv 2410.10450, eqs. 5-6: `LayerNorm(W_K e + b_K)` and
`W_V v + b_V`) and kept as two matrices [M, X]. A KB layer takes its slot, puts it before the text's keys and values
(those repeated to all N heads), and makes two products: the base model's query with all keys, of which the text's
columns count, and the layer's own query head with the facts' keys, to which `log C - log M` is added (eq. 11). One
softmax over [facts | text] in float32, one product with [values of facts | values of text] (eqs. 7-8).

What is left out favours the rival: layers that are no KB layers keep the library's fused attention, and the facts are
projected in large blocks, where the published scripts do so one by one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.decoder import attention_modules

_NAME = "kblam_published"
FACTS_PER_BLOCK = 8_192


@dataclass(frozen=True)
class PublishedMemory:
    """Keys and values of M facts for all KB layers, both [M, X], and the query heads, in the base model's dtype."""

    adapter: KnowledgeAdapter
    query_heads: dict[int, torch.Tensor]
    keys_MX: torch.Tensor
    values_MX: torch.Tensor

    @classmethod
    def of(
        cls, adapter: KnowledgeAdapter, keys_MP: np.ndarray, values_MP: np.ndarray, dtype: torch.dtype
    ) -> PublishedMemory:
        """Project base embeddings [M, P] with an adapter of kind "paper"; where the adapter is."""
        shape = (len(keys_MP), adapter.key_projection.out_features)
        keys_MX = torch.empty(shape, dtype=dtype, device=adapter.device)
        values_MX = torch.empty_like(keys_MX)
        for start in range(0, len(keys_MP), FACTS_PER_BLOCK):
            rows = slice(start, start + FACTS_PER_BLOCK)
            keys_mP, values_mP = (
                torch.from_numpy(given[rows]).to(adapter.device, adapter.dtype) for given in (keys_MP, values_MP)
            )
            keys_MX[rows] = nn.functional.layer_norm(adapter.key_projection(keys_mP), shape[1:])
            values_MX[rows] = adapter.value_projection(values_mP)
        heads: Any = adapter.query_heads
        query_heads = {int(layer): head.weight.to(dtype) for layer, head in heads.items()}
        return cls(adapter, query_heads, keys_MX, values_MX)

    @property
    def nbytes(self) -> int:
        return self.keys_MX.nbytes + self.values_MX.nbytes

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a KB layer reads: views [N, M, H]."""
        config = self.adapter.config
        parts = (config.slots, config.base_shape.num_heads, config.base_shape.head_dim)
        slot = config.slot_of(layer)
        keys_MNH, values_MNH = (both.unflatten(1, parts)[:, slot] for both in (self.keys_MX, self.values_MX))
        return keys_MNH.transpose(0, 1), values_MNH.transpose(0, 1)


@contextmanager
def published_attention(base_model: PreTrainedModel, memory: PublishedMemory) -> Iterator[None]:
    """The KB layers of `base_model` attend to the facts of `memory` in the published way."""
    modules = attention_modules(base_model)
    chosen = {layer: modules[layer] for layer in memory.adapter.config.layers}
    configs = {layer: module.config for layer, module in chosen.items()}
    hooks = []
    try:
        for layer, module in chosen.items():
            module.config = copy.copy(configs[layer])
            module.config._attn_implementation_internal = _NAME
            hooks.append(module.register_forward_pre_hook(_Hand(memory, layer), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, config in configs.items():
            chosen[layer].config = config


@dataclass(frozen=True)
class _Hand:
    """Hands the facts of a layer, and the hidden states that the layer received, to its attention function."""

    memory: PublishedMemory
    layer: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_BTX = args[0] if args else kwargs["hidden_states"]
        kwargs["published"] = (self.memory, self.layer, hidden_BTX)
        return args, kwargs


def _attention(
    module: nn.Module,
    query_BNTH: torch.Tensor,
    key_BKSH: torch.Tensor,
    value_BKSH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    published: tuple[PublishedMemory, int, torch.Tensor],
    scaling: float,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    memory, layer, hidden_BTX = published
    config = memory.adapter.config
    batch, num_heads, _, head_dim = query_BNTH.shape
    own_query_BTX = nn.functional.linear(hidden_BTX, memory.query_heads[layer])
    own_query_BNTH = own_query_BTX.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
    fact_keys_BNMH, fact_values_BNMH = (part.expand(batch, -1, -1, -1) for part in memory.layer(layer))
    num_facts = fact_keys_BNMH.shape[2]
    groups = num_heads // key_BKSH.shape[1]
    keys_BNAH = torch.cat([fact_keys_BNMH, key_BKSH.repeat_interleave(groups, 1)], 2)
    values_BNAH = torch.cat([fact_values_BNMH, value_BKSH.repeat_interleave(groups, 1)], 2)
    text_logits_BNTS = (query_BNTH @ keys_BNAH.transpose(2, 3) * scaling)[..., num_facts:]
    fact_logits_BNTM = own_query_BNTH @ fact_keys_BNMH.transpose(2, 3) / math.sqrt(head_dim)
    if config.kb_scale is not None:
        fact_logits_BNTM = fact_logits_BNTM + math.log(config.kb_scale / num_facts)
    text_logits_BNTS = _masked(text_logits_BNTS, attention_mask)
    logits_BNTA = torch.cat([fact_logits_BNTM, text_logits_BNTS], -1)
    weights_BNTA = torch.softmax(logits_BNTA, -1, dtype=torch.float32).to(query_BNTH.dtype)
    return (weights_BNTA @ values_BNAH).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)  # type: ignore[arg-type]


def _masked(logits_BNTS: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    tokens, length = logits_BNTS.shape[-2:]
    if mask is None:
        # The library leaves out a mask that is no more than causal.
        mask = torch.ones(tokens, length, dtype=torch.bool, device=logits_BNTS.device).tril(length - tokens)
    mask = mask[..., :length]
    return logits_BNTS.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits_BNTS + mask
