"""A tiny random model with synthetic facts, for tests of the evaluation."""

from __future__ import annotations

from model_samples import llama_tokenizer, tiny_adapter, tiny_llama

from kblam_ray.encoders import load_encoder
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.model import KnowledgeModel
from kblam_ray.table.embedded import EmbeddedFacts

ENCODER = load_encoder("hashing:64")


def tiny_model(kind: str = "shared", *, seed: int = 0, **settings) -> KnowledgeModel:
    base = tiny_llama(seed)
    return KnowledgeModel(base, tiny_adapter(base, kind, **settings), llama_tokenizer(), ENCODER)


def synthetic(num_facts: int = 96, seed: int = 5) -> EmbeddedFacts:
    return EmbeddedFacts.embed(list(SyntheticFacts(seed).facts(0, num_facts)), ENCODER)
