"""A training step of the published KBLaM code, written anew from its arithmetic, as the rival of the benchmark.

Shape legend: B batch, T tokens, S text tokens attended to, M facts, N query heads, K key/value heads, H head dim,
P encoder dim, Z = slots * N * H.

Every row has a knowledge base of its own. Row by row, its base embeddings go through the two projections and the keys
through the LayerNorm (KBLaM, arXiv 2410.10450, eqs. 5-6). Each KB layer takes its slot of them, puts it before the
text's keys and values, those repeated to all N heads, and makes two products and one softmax in float32 over
[facts | text] (eqs. 7-8 and 11), whose weights it returns; the other layers' attention is eager, too. Logits are made
for all tokens, and all of them are in the loss: questions and padding as well as answers. Everything is in one dtype,
the trained weights included.

What is left out favours the rival: there are no separate passes over metrics, and the optimizer is the fused one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.decoder import attention_modules
from kblam_ray.training.mix.batches import TrainingBatch

_NAME = "kblam_published_training"


class PublishedStep:
    """The published step over a frozen base model, training copies of an adapter's tensors in the model's dtype.

    Args:
        base_model: frozen; its attention is the eager one while attached.
        adapter: of kind "paper"; it stays as it is.
    """

    def __init__(self, base_model: PreTrainedModel, adapter: KnowledgeAdapter, learning_rate: float = 1e-4) -> None:
        self._base_model = base_model
        self.adapter = copy.deepcopy(adapter).to(base_model.dtype).train().requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self.adapter.parameters(), learning_rate, fused=True)
        self._facts: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, batch: TrainingBatch) -> torch.Tensor:
        """One step, while attached: the loss, its gradients, the optimizer."""
        loss = self.loss(batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        """Mean cross-entropy of every token after the first, with autograd."""
        self._facts = self._project(batch)
        logits_BTV = self._base_model(input_ids=batch.input_ids_BT, use_cache=False).logits
        shifted = logits_BTV[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(shifted, batch.input_ids_BT[:, 1:].flatten())

    def _project(self, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows' facts, [B, M, Z] each."""
        dtype, modules = self._base_model.dtype, self.adapter
        keys = [modules.key_projection(keys_MP.to(dtype)) for keys_MP in batch.keys_MP]
        values = [modules.value_projection(values_MP.to(dtype)) for values_MP in batch.values_MP]
        return torch.stack([F.layer_norm(keys_MZ, keys_MZ.shape[1:]) for keys_MZ in keys]), torch.stack(values)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the base model attends as published."""
        before = self._base_model.config._attn_implementation
        self._base_model.set_attn_implementation("eager")
        modules = attention_modules(self._base_model)
        hooks, configs = [], {}
        try:
            for layer in self.adapter.config.layers:
                module = modules[layer]
                configs[layer] = module.config
                module.config = copy.copy(module.config)
                module.config._attn_implementation_internal = _NAME
                hooks.append(module.register_forward_pre_hook(self._hand(layer), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, config in configs.items():
                modules[layer].config = config
            self._base_model.set_attn_implementation(before)

    def _hand(self, layer: int) -> Any:
        """Hands the layer's queries, keys and values of facts to its attention function."""
        config = self.adapter.config
        shape = (config.slots, config.base_shape.num_heads, config.base_shape.head_dim)
        heads: Any = self.adapter.query_heads

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden_BTX = args[0] if args else kwargs["hidden_states"]
            assert self._facts is not None
            slot = config.slot_of(layer)
            query_BNTH = heads[str(layer)](hidden_BTX).unflatten(-1, shape[1:]).transpose(1, 2)
            keys_BNMH, values_BNMH = (part.unflatten(-1, shape)[:, :, slot].transpose(1, 2) for part in self._facts)
            kwargs["published"] = (query_BNTH, keys_BNMH, values_BNMH, config.kb_scale)
            return args, kwargs

        return hook


def _attention(
    module: nn.Module,
    query_BNTH: torch.Tensor,
    key_BKSH: torch.Tensor,
    value_BKSH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    published: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | None],
    scaling: float,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    own_query_BNTH, fact_keys_BNMH, fact_values_BNMH, kb_scale = published
    num_facts, groups = fact_keys_BNMH.shape[2], query_BNTH.shape[1] // key_BKSH.shape[1]
    keys_BNAH = torch.cat([fact_keys_BNMH, key_BKSH.repeat_interleave(groups, 1)], 2)
    values_BNAH = torch.cat([fact_values_BNMH, value_BKSH.repeat_interleave(groups, 1)], 2)
    text_logits_BNTS = (query_BNTH @ keys_BNAH.transpose(2, 3) * scaling)[..., num_facts:]
    fact_logits_BNTM = own_query_BNTH @ fact_keys_BNMH.transpose(2, 3) / math.sqrt(query_BNTH.shape[-1])
    if kb_scale is not None:
        fact_logits_BNTM = fact_logits_BNTM + math.log(kb_scale / num_facts)
    assert attention_mask is not None  # the eager implementation always has one
    logits_BNTA = torch.cat([fact_logits_BNTM, text_logits_BNTS + attention_mask], -1)
    weights_BNTA = torch.softmax(logits_BNTA, -1, dtype=torch.float32).to(query_BNTH.dtype)
    return (weights_BNTA @ values_BNAH).transpose(1, 2).contiguous(), weights_BNTA


AttentionInterface.register(_NAME, _attention)  # type: ignore[arg-type]
