"""Settings of `jobs/benchmark.py attention`, and what the form `auto` stands for."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.benchmark.random_model import ShapeName, adapter_config, llama_config
from kblam_ray.attention.memory import choose_form
from kblam_ray.job import JobConfig

Dtype = Literal["bfloat16", "float16", "float32"]
Kind = Literal["paper", "shared"]
MemoryForm = Literal["latent", "materialized"]
MOST_FACTS = 2**40


def auto_rule() -> dict[str, str]:
    """Per adapter kind, what `auto` chooses: found by asking `memory.choose_form`, so that it cannot go stale."""
    return {kind: _rule(kind) for kind in ("paper", "shared")}


def _rule(kind: str) -> str:
    config = adapter_config(llama_config("tiny"), kind, dim=1, kb_layer_frequency=1, kb_scale=1)
    adapter = KnowledgeAdapter(config, device="meta")
    first = choose_form(adapter, 1)
    if choose_form(adapter, MOST_FACTS) == first:
        return f"always {first}"
    low, high = 1, MOST_FACTS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if choose_form(adapter, middle) == first else (low, middle)
    return f"{first} up to {low:,} facts, {choose_form(adapter, high)} above"


_RULES = "; ".join(f"kind {kind}: {rule}" for kind, rule in auto_rule().items())


class AttentionBenchmark(JobConfig):
    """Settings of `jobs/benchmark.py attention`."""

    shape: ShapeName = Field("llama-1b", description="base model, with random weights")
    kind: list[Kind] = Field(["paper", "shared"], min_length=1, description="adapter kinds")
    form: list[MemoryForm] = Field(
        ["latent", "materialized"],
        min_length=1,
        description=f"forms of the memory; `auto` would choose, by kblam_ray.attention.memory.choose_form, {_RULES}",
    )
    num_facts: list[Annotated[int, Field(gt=0)]] = Field(
        [100, 1_000, 10_000, 100_000, 1_000_000], min_length=1, description="sizes of the knowledge base"
    )
    prompt_tokens: int = Field(32, gt=0, description="tokens of the prompt, and of the cache that is decoded on")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the base model and the facts are")
    dtype: Dtype = Field("bfloat16", description="of the base model")
    adapter_dtype: Dtype | None = Field(None, description="of the adapters: that of the base model")
    memory_dtype: Dtype | None = Field(
        None,
        description="of the embeddings in memory: beside a bfloat16 base model bfloat16, else float16 as in tables",
    )
    rounds: int = Field(5, gt=0, description="measurements of each case, in turns, each after one without facts")
    decode_steps: int = Field(5, gt=0, description="decode steps in one measurement, whose median counts")
    threads: int | None = Field(None, gt=0, description="threads on the CPU: as many as torch takes")
    dim: int = Field(384, gt=0, description="P, the numbers in one embedding")
    kb_layer_frequency: int = Field(3, gt=0, description="layer i is a KB layer iff i % this == 0")
    kb_scale: float = Field(100.0, gt=0, description="C")
    published: bool = Field(True, description="measure the published computation too, where it fits")
    apply_changes: int = Field(
        1_000, ge=0, description="facts changed in the largest knowledge base, against loading it; 0: not measured"
    )
    refresh: bool = Field(False, description="measure decoding after many changes of one fact each, too")
    refresh_facts: int = Field(100_000, gt=0, description="facts that --refresh changes some of")
    refresh_applies: int = Field(10_000, gt=0, description="changes that --refresh makes")
    max_memory_gb: float | None = Field(
        None,
        gt=0,
        description="what facts may take beside the base model; cases that need more are skipped: 80 % of what is free",
    )
    output: str | None = Field(None, description="folder for attention.json, attention.csv and attention.png")
    plan: bool = Field(False, description="say what would be measured and what memory it takes, and measure nothing")
    seed: int = Field(0, description="of weights, embeddings and tokens")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_adapter_dtype(self) -> torch.dtype:
        return getattr(torch, self.adapter_dtype or self.dtype)

    @property
    def torch_memory_dtype(self) -> torch.dtype:
        given = self.memory_dtype or ("bfloat16" if self.dtype == "bfloat16" else "float16")
        return getattr(torch, given)

    @property
    def sizes(self) -> list[int]:
        """Numbers of facts, ascending, each once."""
        return sorted(set(self.num_facts))
