"""What is planned is what is taken: against real models, adapters, memories and caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_samples import ENCODER, make_kb, save_base, tiny_adapter, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.errors import AdapterMismatchError, InputError
from kblam_ray.model import KnowledgeModel, plan
from kblam_ray.model.planner import base_model_size, kv_cache_size

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=4),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16),
    "neox": GPTNeoXConfig(**SIZES),
    "experts": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_base_models_and_caches_are_as_large_as_planned(family, dtype):
    config = CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    parameters, size_bytes = base_model_size(config, dtype)
    assert parameters == model.num_parameters()
    assert size_bytes == model.get_memory_footprint()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_size(config, dtype) * 5 == taken


def used(model, memory):
    """Has what is made at first use made."""
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long), knowledge=memory)


@pytest.mark.parametrize("kind", ["paper", "shared"])
@pytest.mark.parametrize("form", ["latent", "materialized", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_memories_are_as_large_as_planned(kind, form, dtype, tmp_path):
    base = tiny_llama().to(dtype)
    adapter = tiny_adapter(base, kind)
    model = KnowledgeModel(base, adapter)
    memory = model.load(make_kb(tmp_path / "kb"), form=form)
    used(model, memory)
    planned = plan(base.config, ENCODER, memory.num_facts, form=form, kind=kind, kb_layer_frequency=2, dtype=dtype)
    texts = sum(view.chunk.facts.nbytes for view in memory.views)
    assert planned.form == memory.form
    assert planned.text_bytes == 0
    # Arrow rounds its buffers up to 64 bytes.
    assert planned.knowledge_memory_bytes + texts <= memory.nbytes < planned.knowledge_memory_bytes + texts + 1024
    assert planned.adapter_bytes == sum(tensor.nbytes for tensor in adapter.state_dict().values())
    assert planned.total_bytes == (planned.base_model_bytes + planned.adapter_bytes + planned.knowledge_memory_bytes)


def test_memories_without_texts_to_the_byte():
    base = tiny_llama()
    adapter = tiny_adapter(base)
    model = KnowledgeModel(base, adapter)
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(1000, 64)).astype(np.float16) for _ in range(2))
    for form in ("latent", "materialized"):
        memory = KnowledgeMemory.from_embeddings(adapter, keys, values, form=form)
        used(model, memory)
        planned = plan(base.config, None, 1000, adapter=adapter.config, form=form)
        assert memory.nbytes == planned.knowledge_memory_bytes
        assert getattr(planned, f"{form}_memory_bytes") == memory.nbytes


def test_the_size_of_the_published_eight_billion_model():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    planned = plan(config, 384, 1_000_000, kind="paper", dtype="bfloat16", text_bytes_per_fact=100)
    assert planned.base_parameters == 8_030_261_248
    assert planned.kv_cache_bytes_per_token == 128 * 1024
    assert planned.latent_memory_bytes == 1_000_000 * (1536 + 8 + 4)
    assert planned.materialized_memory_bytes - planned.latent_memory_bytes == 1_000_000 * 11 * 2 * 4096 * 2
    assert planned.table_embedding_bytes == 1_536_000_000
    assert planned.knowledge_memory_bytes == planned.latent_memory_bytes + 100_000_000


def test_from_a_folder_and_a_spec_without_weights(tmp_path):
    folder = save_base(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    by_folder = plan(folder, encoder_spec(ENCODER), 10)
    assert by_folder == plan(tiny_llama().config, 64, 10, kb_layer_frequency=3)


def test_what_is_refused(tmp_path):
    config = tiny_llama().config
    adapter = tiny_adapter(tiny_llama()).config
    for wrong in (
        {"num_facts": -1},
        {"form": "dense"},
        {"dtype": "int8"},
        {"encoder": None},
        {"base_model": str(tmp_path / "nothing")},
        {"encoder": 32, "adapter": adapter},
    ):
        with pytest.raises(InputError):
            plan(**{"base_model": config, "encoder": 64, "num_facts": 1, **wrong})
    with pytest.raises(AdapterMismatchError):
        plan(CONFIGS["llama"], None, 1, adapter=adapter)
