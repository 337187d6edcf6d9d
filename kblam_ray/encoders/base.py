"""The one interface of every sentence encoder: texts in, base embeddings and what was noticed out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class EncoderSpec(BaseModel):
    """What identifies an encoder; stored with every table and every adapter."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="the name `load_encoder` takes")
    revision: str = Field(description="hash over weights, tokenizer and pooling; the same wherever the copy came from")
    dim: int = Field(gt=0, description="P, the numbers in one embedding")


@dataclass(frozen=True)
class EncodedBatch:
    """Embeddings of a batch of texts, and what the encoder noticed about the texts.

    Attributes:
        embeddings_BP: float32 [B, P], one row per text, in the order given.
        truncated: indices of the texts of which the encoder read only the beginning.
        unknown: indices of the texts with tokens outside the encoder's vocabulary.
        tokens: tokens read, where the encoder counts them; remote encoders bill by it.
        cost_usd: price of the batch; 0 for local encoders.
    """

    embeddings_BP: np.ndarray
    truncated: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    tokens: int = 0
    cost_usd: float = 0.0


class Encoder(ABC):
    """A frozen sentence encoder. Instances may be used from one thread at a time."""

    spec: EncoderSpec

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Embed texts, any number of them, and report truncation, unknown tokens and tokens read."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts: float32 [B, P], in the order given."""
        return self.encode_batch(texts).embeddings_BP
