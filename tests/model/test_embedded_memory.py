"""A memory made of embedded facts holds them, for the adapter whose encoder they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from table.fake_encoder import FakeEncoder

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape, EncoderRef
from kblam_ray.errors import EncoderMismatchError
from kblam_ray.facts.fact import Fact, fact_id
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.table.embedded import EmbeddedFacts

FACTS = [
    Fact("Peru", "capital", "Lima", '{"source":"atlas"}'),
    Fact("Peru", "population", "34 million"),
    Fact("北京", "country", "China"),
]


def adapter_for(facts: EmbeddedFacts, revision: str | None = None) -> KnowledgeAdapter:
    shape = BaseShape(model_type="llama", hidden_size=8, num_layers=2, num_heads=2, head_dim=4)
    encoder = EncoderRef(name="fake", revision=revision or facts.encoder.revision, dim=facts.encoder.dim)
    config = AdapterConfig(kind="shared", base_shape=shape, encoder=encoder, dim=8, kb_layers=[1], slots=1)
    tensors = {name: torch.ones(shape) for name, shape in config.tensor_shapes().items()}
    return KnowledgeAdapter.of_tensors(config, tensors)


def test_a_memory_of_some_rows():
    facts = EmbeddedFacts.embed(FACTS, FakeEncoder())
    memory = memory_of(adapter_for(facts), facts, [2, 0])
    assert memory.num_facts == 2
    assert memory.fact_ids.tolist() == facts.fact_ids_M[[2, 0]].tolist()
    (found,) = memory.lookup([fact_id(FACTS[0])])
    assert (found["value"], found["metadata"]) == ("Lima", '{"source":"atlas"}')
    assert np.array_equal(memory.views[0].chunk.keys_MP.numpy(), facts.keys_MP[[2, 0]])
    assert memory_of(adapter_for(facts), facts, dtype=torch.float32, with_texts=False).num_facts == 3
    with pytest.raises(EncoderMismatchError, match="adapter's encoder"):
        memory_of(adapter_for(facts, revision="other"), facts)
