"""Question embeddings of an evaluation: made in one go, and once, whatever they are used for afterwards.

Shape legend: B texts, P encoder dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kblam_ray.encoders.base import EncodedBatch, Encoder


class RememberingEncoder(Encoder):
    """An encoder that keeps what it encoded: a remote one is asked, and paid, once per text.

    Args:
        encoder: what encodes texts that are new.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, np.ndarray] = {}
        self.spec = encoder.spec

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        noticed = self._encoder.encode_batch(new) if new else EncodedBatch(np.zeros((0, self.spec.dim), np.float32))
        self._known.update(zip(new, noticed.embeddings_BP, strict=True))
        place = {text: row for row, text in enumerate(texts)}
        return EncodedBatch(
            np.stack([self._known[text] for text in texts]) if texts else noticed.embeddings_BP,
            truncated=[place[new[row]] for row in noticed.truncated],
            unknown=[place[new[row]] for row in noticed.unknown],
            tokens=noticed.tokens,
            cost_usd=noticed.cost_usd,
        )
