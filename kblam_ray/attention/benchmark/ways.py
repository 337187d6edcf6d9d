"""The ways to attend to facts that are compared: each makes itself ready, and attaches itself to the base model.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LlamaForCausalLM

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.attach import attach
from kblam_ray.attention.benchmark.cases import Case
from kblam_ray.attention.benchmark.published import PublishedMemory, published_attention
from kblam_ray.attention.memory import KnowledgeMemory


class Way(Protocol):
    """Facts that are ready to be attended to."""

    @property
    def nbytes(self) -> int:
        """Bytes that the facts hold."""

    def attached(self, base_model: LlamaForCausalLM) -> AbstractContextManager[dict[str, Any]]:
        """While open, calls of the base model with these keyword arguments attend to the facts."""


class NoFacts:
    """The base model as it is, with nothing attached."""

    nbytes = 0

    @contextmanager
    def attached(self, base_model: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
        yield {}


class Ours:
    """A knowledge memory."""

    def __init__(self, memory: KnowledgeMemory) -> None:
        self.memory = memory

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @contextmanager
    def attached(self, base_model: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
        attachment = attach(base_model, self.memory.adapter)
        try:
            yield {"knowledge": self.memory}
        finally:
            attachment.detach()


class Published:
    """Projected keys and values, and the published attention over them."""

    def __init__(self, memory: PublishedMemory) -> None:
        self.memory = memory

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @contextmanager
    def attached(self, base_model: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
        with published_attention(base_model, self.memory):
            yield {}


def get_ready(
    case: Case,
    adapter: KnowledgeAdapter,
    keys_MP: np.ndarray,
    values_MP: np.ndarray,
    dtype: torch.dtype,
    memory_dtype: torch.dtype,
) -> Way:
    """From base embeddings in host memory to facts that a prompt can attend to at once.

    Args:
        keys_MP, values_MP: float16 [M, P].
        dtype: of the base model.
        memory_dtype: to keep the embeddings in.
    """
    if case.form == "published":
        return Published(PublishedMemory.of(adapter, keys_MP, values_MP, dtype))
    memory = KnowledgeMemory.from_embeddings(adapter, keys_MP, values_MP, form=case.form, dtype=memory_dtype)
    derive(memory, dtype)
    return Ours(memory)


def derive(memory: KnowledgeMemory, dtype: torch.dtype) -> None:
    """Make what the first prompt would make: the facts' scales, or the keys and values of every KB layer."""
    for view in memory.views:
        if memory.form == "latent":
            view.chunk.fact_scale_M(memory.adapter)
        else:
            for layer in memory.adapter.config.layers:
                view.chunk.materialized(memory.adapter, layer, dtype)
