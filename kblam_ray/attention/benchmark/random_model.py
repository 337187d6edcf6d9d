"""Base models and adapters of the usual shapes with random weights: what they cost does not depend on the weights.

Shape legend: S slots of the key vector, N query heads, H head dim, P encoder dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape

ShapeName = Literal["llama-1b", "llama-8b", "tiny"]

_SHAPES: dict[str, dict[str, int]] = {
    "llama-1b": {
        "hidden_size": 2_048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8_192,
        "vocab_size": 32_000,
    },
    "llama-8b": {
        "hidden_size": 4_096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
    },
}


def llama_config(shape: ShapeName) -> LlamaConfig:
    """The configuration of a Llama of that shape."""
    return LlamaConfig(**_SHAPES[shape], max_position_embeddings=8_192)  # type: ignore[arg-type]


def num_parameters(config: LlamaConfig) -> int:
    """Numbers in the weights, counted without making them."""
    return sum(parameter.numel() for parameter in _without_memory(config, torch.float32).parameters())


def random_llama(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, frozen, for evaluation.

    Each weight matrix is uniform with variance 1 / (its inputs), so that activations neither vanish nor overflow.
    """
    model = _without_memory(config, dtype).to_empty(device=device)
    # Tables that are computed and not stored are lost without memory: made anew, in float32 as the library has them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    random = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            bound = (3 / parameter.shape[1]) ** 0.5
            parameter.uniform_(-bound, bound, generator=random)
    return model.eval()


def adapter_config(
    config: LlamaConfig, kind: str, *, dim: int, kb_layer_frequency: int, kb_scale: float
) -> AdapterConfig:
    """Settings of an adapter for that base model, with as many slots as the published code makes."""
    shape = BaseShape.of(config)
    kb_layers = len(range(0, shape.num_layers, kb_layer_frequency))
    published_slots = 1 + shape.num_layers // kb_layer_frequency
    return AdapterConfig(
        kind=kind,  # type: ignore[arg-type]
        base_shape=shape,
        dim=dim,
        kb_layer_frequency=kb_layer_frequency,
        slots=published_slots if kind == "paper" else kb_layers,
        kb_scale=kb_scale,
    )


def random_adapter(config: AdapterConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> KnowledgeAdapter:
    """An adapter with torch's initial weights, frozen, for evaluation."""
    torch.manual_seed(seed)
    return KnowledgeAdapter(config, device=device, dtype=dtype).eval().requires_grad_(False)


def _without_memory(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
