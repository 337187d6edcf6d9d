"""Which facts' entities a question names: whole words, whatever their case, found without going through all facts.

Shape legend: M facts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Letters of scripts without blanks between words (Thai, Lao, Burmese, Khmer, Kana, Han): a word may end anywhere."""


def normalized(text: str) -> str:
    """Text as it is compared: Unicode case folding, and one blank for every run of blanks."""
    return " ".join(text.casefold().split())


class EntityIndex:
    """The entities of some facts by hash: 16 bytes per fact, and a look-up per place in the question.

    Args:
        facts: a table with the column `entity`; row m of it is fact m.
    """

    def __init__(self, facts: pa.Table) -> None:
        self._entities = facts["entity"].combine_chunks().fill_null("")
        encoded = self._entities.dictionary_encode()
        texts = [normalized(text) for text in encoded.dictionary.to_pylist()]
        hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        hashes_M = hashes[encoded.indices.to_numpy(zero_copy_only=False)]
        self._rows_M = np.argsort(hashes_M, kind="stable")
        self._hashes_M = hashes_M[self._rows_M]
        self._lengths = np.unique(lengths[lengths > 0]).tolist()

    def named_in(self, question: str) -> np.ndarray:
        """Rows of the facts whose entity occurs in the question as a whole word, int64, ascending."""
        text = normalized(question)
        found = [np.empty(0, np.int64)]
        for span in self._spans(text):
            wanted = hash(span)
            first, last = np.searchsorted(self._hashes_M, wanted), np.searchsorted(self._hashes_M, wanted, "right")
            rows = self._rows_M[first:last]
            # Two texts may have one hash.
            found.append(rows[[normalized(self._entities[int(row)].as_py()) == span for row in rows]])
        return np.unique(np.concatenate(found))

    def _spans(self, text: str) -> set[str]:
        borders = [is_border(text, at) for at in range(len(text) + 1)]
        starts = [at for at in range(len(text)) if borders[at]]
        return {
            text[start : start + length]
            for start in starts
            for length in self._lengths
            if start + length <= len(text) and borders[start + length]
        }


def is_border(text: str, at: int) -> bool:
    """Whether a word can begin or end before the letter at `at`."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if not (_is_word(before) and _is_word(after)):
        return True
    return bool(_UNSPACED.match(before) or _UNSPACED.match(after))


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
