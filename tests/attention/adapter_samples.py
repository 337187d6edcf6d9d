"""Small adapters and base models with random weights, for the tests of adapters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape, EncoderRef

torch.set_num_threads(1)

SHAPE = BaseShape(model_type="llama", hidden_size=24, num_layers=5, num_heads=4, head_dim=6)
ENCODER = EncoderRef(name="tiny", revision="abc", dim=10)


def config(**settings: Any) -> AdapterConfig:
    kind = settings.setdefault("kind", "paper")
    given = {"kb_layer_frequency": 2, "slots": 4 if kind == "paper" else 3, "dim": 10, "base_shape": SHAPE}
    if "kb_layers" in settings:
        given["kb_layer_frequency"] = None
    return AdapterConfig.checked({**given, **settings}, where="test")


def adapter(**settings: Any) -> KnowledgeAdapter:
    torch.manual_seed(0)
    return KnowledgeAdapter(config(**settings)).eval()


def base_model(model_type: str = "llama", **settings: Any) -> PreTrainedModel:
    """A decoder of 4 layers, width 32, 4 heads of 8, vocabulary 64."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings})).eval()
