"""An encoder without a model: numbers drawn from each text's hash, and a record of every text it was given."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec

DIM = 8


class FakeEncoder(Encoder):
    """Equal texts get equal embeddings, exact in float16, so that a test can recompute what a row must hold."""

    def __init__(self, revision: str = "r1", dim: int = DIM) -> None:
        self.spec = EncoderSpec(name="fake", revision=revision, dim=dim)
        self.texts: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        self.texts.extend(texts)
        return EncodedBatch(np.stack([embedding(text, self.spec.dim) for text in texts]).astype(np.float32))


def embedding(text: str, dim: int = DIM) -> np.ndarray:
    """float16 [P] that depends on the text alone."""
    return (np.frombuffer(blake2b(text.encode(), digest_size=dim).digest(), np.uint8) / 256).astype(np.float16)
