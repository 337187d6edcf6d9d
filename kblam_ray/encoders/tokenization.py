"""Texts to tokens, grouped by length into batches with little padding.

Shape legend: B texts of a batch, T tokens of its longest text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, Field


class TokenizerSettings(BaseModel):
    """What a tokenizer's own file does not say."""

    max_tokens: int | None = Field(description="tokens the encoder reads of a text, special ones included; None: all")
    pad_id: int = Field(description="token that fills up a batch")
    pad_left: bool = Field(description="whether a batch is filled up before the texts")
    unknown_id: int | None = Field(description="token for what is not in the vocabulary")
    prompt: str = Field(description="text put before every text")


@dataclass(frozen=True)
class TokenBatch:
    """Texts of about the same length: `rows` are their indices, `ids_BT` and `mask_BT` int64 [B, T]."""

    rows: np.ndarray
    ids_BT: np.ndarray
    mask_BT: np.ndarray


@dataclass
class TokenizedTexts:
    """The tokens of texts, which of them were cut, and which have tokens outside the vocabulary."""

    ids: list[list[int]]
    truncated: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


class TextTokenizer:
    """A fast tokenizer with the settings of one encoder.

    Args:
        state: the tokenizer as JSON text, in the format of the `tokenizers` library.
        settings: what that text does not say.
    """

    def __init__(self, state: str, settings: TokenizerSettings) -> None:
        from tokenizers import Tokenizer

        self.state, self.settings = state, settings
        self._tokenizer = Tokenizer.from_str(state)
        self._tokenizer.no_padding()
        if settings.max_tokens is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(settings.max_tokens)

    @property
    def vocabulary(self) -> list[str]:
        """All tokens, as the tokenizer writes them, in the order of their ids."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        prompt, unknown_id = self.settings.prompt, self.settings.unknown_id
        # A list is what the library wants; without the prompt it costs no copy of the texts.
        encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts] if prompt else list(texts))
        found = TokenizedTexts([encoding.ids for encoding in encodings])
        for row, encoding in enumerate(encodings):
            if encoding.overflowing:
                found.truncated.append(row)
            if unknown_id is not None and unknown_id in found.ids[row]:
                found.unknown.append(row)
        return found

    def batches(self, ids: list[list[int]], batch_tokens: int) -> Iterator[TokenBatch]:
        """Batches of at most `batch_tokens` tokens, padding included, or of one text; longest texts first.

        Longest first, so that what does not fit into memory fails at once and not after hours.
        """
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = max(int(lengths[order[start]]), 1)
            rows = order[start : start + max(1, batch_tokens // longest)]
            yield self._pad(rows, [ids[row] for row in rows], longest)
            start += len(rows)

    def _pad(self, rows: np.ndarray, ids: list[list[int]], longest: int) -> TokenBatch:
        ids_BT = np.full((len(ids), longest), self.settings.pad_id, dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, tokens in enumerate(ids):
            place = slice(longest - len(tokens), longest) if self.settings.pad_left else slice(len(tokens))
            ids_BT[row, place] = tokens
            mask_BT[row, place] = 1
        return TokenBatch(rows, ids_BT, mask_BT)
