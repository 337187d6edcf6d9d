"""The published implementation's numbers, and its formula on other sizes: same logits, same words.

`tests/fixtures/kblam_llama` holds what microsoft/KBLaM computed on random weights (its README says how). Phi-3, and
other frequencies, sizes and sequences, are compared with the plain formula of `families.PlainModel`, read by hand from
state dictionaries such as the published training code writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import PLAIN, Facts, PlainAdapter, PlainModel, attached, tiny_model
from safetensors.torch import load_file

from kblam_ray.attention import KnowledgeAdapter, KnowledgeMemory

FIXTURES = Path(__file__).parent.parent / "fixtures" / "kblam_llama"
MANIFEST = json.loads((FIXTURES / "manifest.json").read_text())
TOLERANCE = 1e-4
IMPLEMENTATIONS = ("sdpa", "eager")
FORMS = ("latent", "materialized")


@cache
def published(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


@cache
def published_model(implementation: str) -> hf.PreTrainedModel:
    settings = dict(MANIFEST["config"])
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    config = hf.LlamaConfig(**settings, rope_parameters=rope)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    state = {name: tensor for name, tensor in published("model").items() if "q_proj_new" not in name}
    assert model.load_state_dict(state)
    return model.eval()


@cache
def published_adapter(kb_scale: float | None) -> KnowledgeAdapter:
    config = published_model("sdpa").config
    return KnowledgeAdapter.from_kblam(published("encoder_f3"), published("model"), config, kb_scale=kb_scale)


def memory_of(case: dict[str, Any], form: str) -> KnowledgeMemory | list[KnowledgeMemory] | None:
    adapter, num_facts = published_adapter(case["scale"]), case["n"]
    if num_facts is None:
        return None
    if not case["batched"]:
        keys_MP, values_MP = (published("kb_base")[f"base_{part}.{num_facts}"] for part in ("key", "val"))
        return KnowledgeMemory.from_embeddings(adapter, keys_MP, values_MP, form=form)
    keys_BMP, values_BMP = (published("kb_base")[f"base_{part}_b3.{num_facts}"] for part in ("key", "val"))
    return [
        KnowledgeMemory.from_embeddings(adapter, keys_MP, values_MP, form=form)
        for keys_MP, values_MP in zip(keys_BMP, values_BMP, strict=True)
    ]


def sequences(name: str) -> dict[str, torch.Tensor]:
    found = published("sequences")
    return {"input_ids": found[f"{name}.input_ids"], "attention_mask": found[f"{name}.attention_mask"]}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["id"])
def test_logits_of_the_published_implementation(case: dict[str, Any], form: str, implementation: str):
    model, inputs = published_model(implementation), sequences(case["seq"])
    tokens = inputs["attention_mask"].bool()
    # The published code counts positions from the row's start, padding included.
    inputs["position_ids"] = torch.arange(tokens.shape[1])[None]
    with torch.no_grad(), attached(model, published_adapter(case["scale"])):
        logits = model(**inputs, knowledge=memory_of(case, form)).logits
        without = model(**inputs).logits
    expected = published("outputs")[f"{case['id']}.logits"]
    assert (logits - expected)[tokens].abs().max() < TOLERANCE
    assert (without - expected)[tokens].abs().max() > 1
    assert (without - published("outputs")[f"{case['seq']}.nokb.logits"])[tokens].abs().max() < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", MANIFEST["generation"], ids=lambda case: case["id"])
def test_words_of_the_published_implementation(case: dict[str, Any], form: str, implementation: str):
    model = published_model(implementation)
    with attached(model, published_adapter(case["scale"])) as attachment, attachment.using(memory_of(case, form)):
        generated = model.generate(**sequences(case["seq"]), max_new_tokens=case["max_new_tokens"], do_sample=False)
    assert torch.equal(generated, published("outputs")[f"{case['id']}.sequences"])


@dataclass(frozen=True)
class Size:
    """A base model, a frequency and a knowledge base of a size that the fixtures do not have."""

    config_class: type
    layers: int
    frequency: int
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    facts: int
    kb_scale: float | None
    lengths: tuple[int, ...]
    side: str

    def __str__(self) -> str:
        return f"{self.config_class.model_type}-{self.layers}by{self.frequency}-{self.heads}over{self.kv_heads}"

    @property
    def slots(self) -> int:
        return 1 + self.layers // self.frequency

    def config(self) -> Any:
        hidden = self.heads * self.head_dim
        return self.config_class(
            vocab_size=160,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )

    def adapter_state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The two state dictionaries that a published checkpoint consists of, and what else stands in them."""
        generator = torch.Generator().manual_seed(self.layers)
        width = self.heads * self.head_dim

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / 4

        encoder_state = {"embedding.weight": random(3, self.dim)}
        for name in ("projector_k", "projector_v"):
            encoder_state[f"{name}.weight"] = random(self.slots * width, self.dim)
            # Far from zero on the average: the LayerNorm takes it out.
            encoder_state[f"{name}.bias"] = random(self.slots * width) + 3 * (name == "projector_k")
        # Query heads of every layer: only those of KB layers count.
        model_state = {
            f"model.layers.{layer}.self_attn.q_proj_new.weight": random(width, width) for layer in range(self.layers)
        }
        return encoder_state, {**model_state, "model.layers.0.self_attn.score_shift": torch.zeros(1)}

    def plain_adapter(self) -> PlainAdapter:
        """The same checkpoint, read by hand."""
        encoder_state, model_state = self.adapter_state()
        layers = tuple(layer for layer in range(self.layers) if layer % self.frequency == 0)
        tensors = {
            f"{ours}_projection.{part}": encoder_state[f"projector_{theirs}.{part}"].double()
            for ours, theirs in (("key", "k"), ("value", "v"))
            for part in ("weight", "bias")
        }
        for layer in layers:
            weight = model_state[f"model.layers.{layer}.self_attn.q_proj_new.weight"]
            tensors[f"query_heads.{layer}.weight"] = weight.double()
        return PlainAdapter("paper", tensors, layers, self.heads, self.head_dim, self.kb_scale)

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.dim)
        input_ids = torch.randint(1, 160, (len(self.lengths), max(self.lengths)), generator=generator)
        mask = torch.zeros_like(input_ids)
        for row, length in enumerate(self.lengths):
            place = slice(0, length) if self.side == "right" else slice(max(self.lengths) - length, None)
            mask[row, place] = 1
        return {"input_ids": input_ids * mask, "attention_mask": mask}


SIZES = [
    Size(hf.LlamaConfig, 3, 1, 4, 4, 8, 20, 30, None, (14,), "left"),
    Size(hf.LlamaConfig, 6, 2, 6, 2, 8, 33, 5, 100.0, (11, 4), "left"),
    Size(hf.LlamaConfig, 9, 4, 4, 1, 16, 48, 257, 10.0, (3, 21, 9), "right"),
    Size(hf.LlamaConfig, 4, 5, 2, 2, 32, 7, 1, None, (6, 6), "left"),
    Size(hf.Phi3Config, 4, 1, 2, 1, 16, 12, 64, 100.0, (10,), "left"),
    Size(hf.Phi3Config, 5, 2, 4, 4, 8, 40, 1, 50.0, (1, 8), "right"),
    Size(hf.Phi3Config, 8, 4, 6, 3, 8, 24, 100, None, (17, 5, 2), "left"),
    Size(hf.Phi3Config, 10, 5, 3, 3, 16, 30, 13, 100.0, (40,), "left"),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_other_sizes_follow_the_published_formula(size: Size):
    encoder_state, model_state = size.adapter_state()
    exact = PlainModel(tiny_model(size.config(), dtype=torch.float64, implementation=PLAIN), size.plain_adapter())
    facts, inputs = Facts.random(size.facts, dim=size.dim), size.inputs()
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = exact.logits(**inputs, facts=facts)
        without = exact.logits(**inputs, facts=None)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    words = exact.generate(**inputs, facts=facts, **greedy, use_cache=False) if size.side == "left" else None
    for implementation in IMPLEMENTATIONS:
        model = tiny_model(size.config(), implementation=implementation)
        adapter = KnowledgeAdapter.from_kblam(
            {f"module.{name}": tensor for name, tensor in encoder_state.items()},
            {**model.state_dict(), **model_state},
            model.config,
            kb_layer_frequency=size.frequency,
            kb_scale=size.kb_scale,
        )
        for form in FORMS:
            memory = facts.memory(adapter, form=form)
            with torch.no_grad(), attached(model, adapter) as attachment:
                logits = model(**inputs, knowledge=memory).logits
                assert (logits - expected)[tokens].abs().max() < TOLERANCE
                assert (without - expected)[tokens].abs().max() > 0.1
                if words is not None:
                    with attachment.using(memory):
                        assert torch.equal(model.generate(**inputs, **greedy), words)
