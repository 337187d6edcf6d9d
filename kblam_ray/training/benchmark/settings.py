"""Settings of `jobs/benchmark.py training-step`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import LlamaConfig

from kblam_ray.attention.benchmark.random_model import llama_config
from kblam_ray.errors import InputError
from kblam_ray.job import JobConfig

_SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1_024,
    "vocab_size": 8_192,
}


class TrainingStepBenchmark(JobConfig):
    """Settings of `jobs/benchmark.py training-step`."""

    shape: Literal["small", "tiny", "llama-1b", "llama-8b"] = Field("small", description="base model, random weights")
    hidden: int | None = Field(None, gt=0, description="width of the hidden states: that of the shape")
    layers: int | None = Field(None, gt=0, description="decoder layers")
    heads: int | None = Field(None, gt=0, description="query heads")
    kv_heads: int | None = Field(None, gt=0, description="key/value heads")
    mlp: int | None = Field(None, gt=0, description="width inside of the MLPs")
    vocabulary: int | None = Field(None, gt=0, description="tokens in the vocabulary")
    kind: list[Literal["paper", "shared"]] = Field(["paper", "shared"], min_length=1, description="adapter kinds")
    kb_per: list[Literal["example", "batch"]] = Field(
        ["example", "batch"], min_length=1, description="one knowledge base for each row, or one for all rows"
    )
    batch_size: int = Field(20, gt=0, description="rows of a batch")
    num_tokens: int = Field(48, gt=1, description="tokens of the longest row, to which a batch is padded")
    shortest: int | None = Field(
        None, gt=1, description="tokens of the shortest row, the others evenly between: no padding at all"
    )
    answer_tokens: int = Field(16, gt=0, description="tokens of each row's answer, at its end")
    num_facts: int = Field(101, gt=0, description="facts in a knowledge base")
    dim: int = Field(384, gt=0, description="P, the numbers in one embedding")
    kb_layer_frequency: int = Field(3, gt=0, description="layer i is a KB layer iff i % this == 0")
    kb_scale: float = Field(100.0, gt=0, description="C")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where everything is")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the base model and of the published step")
    gradient_checkpointing: bool = Field(False, description="repeat the layers while going backwards")
    compile: bool = Field(False, description="torch.compile the base model, for our steps")
    published: bool = Field(True, description="measure the published computation too, beside kind paper")
    rounds: int = Field(7, gt=0, description="measurements of each case, in turns")
    steps: int = Field(2, gt=0, description="steps in one measurement")
    threads: int | None = Field(None, gt=0, description="threads on the CPU: as many as torch takes")
    seed: int = Field(0, description="of weights, embeddings and tokens")

    @model_validator(mode="after")
    def _check_lengths(self) -> TrainingStepBenchmark:
        shortest = self.num_tokens if self.shortest is None else self.shortest
        if not self.answer_tokens < shortest <= self.num_tokens:
            raise InputError(
                f"rows of {shortest} to {self.num_tokens} tokens with answers of {self.answer_tokens}",
                where="--num-tokens, --shortest, --answer-tokens",
                help="the shortest row holds a question and its answer, and the longest is no shorter",
            )
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def base_config(self) -> LlamaConfig:
        """The configuration of the base model.

        Raises:
            InputError: numbers that do not go together.
        """
        given: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocabulary,
        }
        shape = _SMALL if self.shape == "small" else {name: getattr(llama_config(self.shape), name) for name in given}
        numbers = shape | {name: number for name, number in given.items() if number is not None}
        heads, kv_heads = numbers["num_attention_heads"], numbers["num_key_value_heads"]
        if numbers["hidden_size"] % heads or heads % kv_heads:
            raise InputError(
                f"a width of {numbers['hidden_size']} in {heads} query heads and {kv_heads} key/value heads",
                where="--hidden, --heads, --kv-heads",
                help="the width is a multiple of the query heads, and they of the key/value heads",
            )
        # Stated, for a shape whose own head width would stay when its hidden states were made narrower.
        return LlamaConfig(**numbers, head_dim=numbers["hidden_size"] // heads, max_position_embeddings=8_192)
