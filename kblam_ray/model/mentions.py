"""Which entities and properties a question names: whole words, whatever their case, without going through all facts.

Shape legend: M facts.
"""

from __future__ import annotations

import re
import weakref
from typing import TYPE_CHECKING

import numpy as np

from kblam_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from kblam_ray.attention.memory import KnowledgeMemory
    from kblam_ray.attention.memory.chunk import Chunk

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

    @classmethod
    def of_distinct(cls, texts: pa.ChunkedArray) -> EntityIndex:
        """An index of other texts than entities, each once."""
        import pyarrow as pa

        return cls(pa.table({"entity": texts.unique()}))

    def text_of(self, row: int) -> str:
        return str(self._entities[int(row)].as_py())

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


_ENTITIES: weakref.WeakKeyDictionary[Chunk, EntityIndex] = weakref.WeakKeyDictionary()
_PROPERTIES: weakref.WeakKeyDictionary[Chunk, EntityIndex] = weakref.WeakKeyDictionary()
"""By chunk, which never changes. Two threads may both make one: either is the right one."""


def named_facts(memory: KnowledgeMemory, question: str) -> np.ndarray:
    """Whether the question names each fact's entity, bool [M] in the order of `memory.fact_ids`.

    Raises:
        InputError: the memory was made without the facts' texts.
    """
    check_texts(memory)
    parts = [np.zeros(0, bool)]
    for view in memory.views:
        index = _ENTITIES.get(view.chunk)
        if index is None:
            assert view.chunk.facts is not None
            index = _ENTITIES[view.chunk] = EntityIndex(view.chunk.facts)
        named = np.zeros(view.chunk.num_rows, bool)
        named[index.named_in(question)] = True
        positions = view.live_positions()
        parts.append(named if positions is None else named[positions])
    return np.concatenate(parts)


def named_properties(memory: KnowledgeMemory, question: str) -> list[str]:
    """The properties of the memory's chunks that the question names, each once; those of facts not selected, too.

    Raises:
        InputError: the memory was made without the facts' texts.
    """
    check_texts(memory)
    found: dict[str, None] = {}
    for view in memory.views:
        index = _PROPERTIES.get(view.chunk)
        if index is None:
            assert view.chunk.facts is not None
            index = _PROPERTIES[view.chunk] = EntityIndex.of_distinct(view.chunk.facts["property"])
        found |= dict.fromkeys(index.text_of(row) for row in index.named_in(question))
    return list(found)


def check_texts(memory: KnowledgeMemory) -> None:
    """Raises InputError for a memory with facts and without their texts."""
    if memory.num_facts and not memory.has_texts:
        raise InputError(
            "words of the question are looked for in the facts, but the memory has no texts",
            where="memory",
            help="give facts= when loading the memory",
        )


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
