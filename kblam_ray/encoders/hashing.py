"""A lexical encoder without a model: hashed character n-grams, for tests, benchmarks and air-gapped trials.

Texts that share words and parts of words are near each other, in any script; meaning is not seen. Case
counts, so that `us` and `US` are two keys, and Unicode's canonically equal spellings are one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec
from kblam_ray.encoders.revision import revision_of
from kblam_ray.errors import InputError, MissingDependencyError

DEFAULT_DIM = 384
MAX_DIM = 65_536
NGRAM_RANGE = (2, 5)
# Bounds the sparse counts of one step: 1,024 texts of usual length take a few megabytes.
STEP_TEXTS = 1_024


class HashingEncoder(Encoder):
    """Counts of the character n-grams of each word, hashed with signs into `dim` numbers, of length 1.

    A text without a character (an empty one) gets the zero vector.

    Args:
        dim: P, the numbers in one embedding.

    Raises:
        InputError: `dim` is out of range.
        MissingDependencyError: scikit-learn is not installed.
    """

    def __init__(self, dim: int = DEFAULT_DIM) -> None:
        if not 1 <= dim <= MAX_DIM:
            raise InputError(
                f"a hashing encoder of {dim} numbers", where=f"hashing:{dim}", help=f"choose from 1 to {MAX_DIM}"
            )
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "the hashing encoder needs scikit-learn",
                where=f"hashing:{dim}",
                help="pip install 'kblam-ray[hashing]'",
            ) from error
        self.spec = hashing_spec(dim)
        self._vectorizer = HashingVectorizer(
            analyzer="char_wb",
            ngram_range=NGRAM_RANGE,
            n_features=dim,
            lowercase=False,
            alternate_sign=True,
            norm="l2",
            dtype=np.float32,
        )

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Embed texts; nothing is ever truncated or unknown, and there are no tokens to count."""
        embeddings_BP = np.empty((len(texts), self.spec.dim), dtype=np.float32)
        for start in range(0, len(texts), STEP_TEXTS):
            step = [unicodedata.normalize("NFC", text) for text in texts[start : start + STEP_TEXTS]]
            self._vectorizer.transform(step).toarray(out=embeddings_BP[start : start + len(step)])
        return EncodedBatch(embeddings_BP)


def hashing_spec(dim: int = DEFAULT_DIM) -> EncoderSpec:
    """The spec of the hashing encoder of `dim` numbers; needs no optional package."""
    name = "hashing" if dim == DEFAULT_DIM else f"hashing:{dim}"
    recipe = ("hashing", "1", "murmur3-32 signed", "char_wb", str(NGRAM_RANGE), "NFC", "case counts", "l2", str(dim))
    return EncoderSpec(name=name, revision=revision_of(*recipe), dim=dim)
