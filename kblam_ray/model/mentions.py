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
    from kblam_ray.attention.memory.chunk import Chunk, ChunkView
    from kblam_ray.attention.memory.held_bytes import HeldBytes

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Letters of scripts without blanks between words (Thai, Lao, Burmese, Khmer, Kana, Han): a word may end anywhere."""

KOREAN_ENDINGS = frozenset(
    re.findall(
        r"\S+",
        """
    은 는 이 가 을 를 의 에 로 으로 와 과 도 만 란 이란 라는 이라는 에는 에서 에서는 에게 부터 까지
    고 이고 며 이며 다 이다 입니다 야 이야 예요 이에요 인가 인가요 이었습니다 였습니다
        """,
    )
)
"""What Korean writes onto the end of a word: particles, and forms of "to be"."""

_HANGUL = r"[\uac00-\ud7a3]"
_ENDING = re.compile(rf"(?:{'|'.join(sorted(KOREAN_ENDINGS))})(?!\w)")
_BEFORE_ENDING = re.compile(rf"{_HANGUL}{{2}}$|[^\W_](?<!{_HANGUL})$")
"""After a single syllable it is rather a part of the same word."""


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

    def add_to(self, held: HeldBytes) -> None:
        import pyarrow as pa

        held.add_array(self._rows_M)
        held.add_array(self._hashes_M)
        held.add_table(pa.table([self._entities], ["entity"]))

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
        starts = [at for at in range(len(text)) if is_border(text, at)]
        ends = [may_end(text, at) for at in range(len(text) + 1)]
        return {
            text[start : start + length]
            for start in starts
            for length in self._lengths
            if start + length <= len(text) and ends[start + length]
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
        rows = named_rows(view, question)
        positions = view.live_positions()
        named = np.zeros(view.num_live, bool)
        named[rows if positions is None else np.searchsorted(positions, rows)] = True
        parts.append(named)
    return np.concatenate(parts)


def named_rows(view: ChunkView, question: str) -> np.ndarray:
    """Where the facts seen whose entity the question names stand in the chunk, which has texts: int64, ascending."""
    rows = _entities_of(view.chunk).named_in(question)
    return rows[view.find(view.chunk.fact_ids[rows]) >= 0]


def named_properties(memory: KnowledgeMemory, question: str) -> list[str]:
    """The properties of the memory's chunks that the question names, each once; those of facts not selected, too.

    Raises:
        InputError: the memory was made without the facts' texts.
    """
    check_texts(memory)
    found: dict[str, None] = {}
    for view in memory.views:
        index = _properties_of(view.chunk)
        found |= dict.fromkeys(index.text_of(row) for row in index.named_in(question))
    return list(found)


def index_words(memory: KnowledgeMemory) -> None:
    """Index the words of a memory's facts, which has texts, before the first question does."""
    for view in memory.views:
        _entities_of(view.chunk)
        _properties_of(view.chunk)


def add_indexes_to(held: HeldBytes, memory: KnowledgeMemory) -> None:
    """Count what was indexed of a memory's chunks so far."""
    for view in memory.views:
        for index in (_ENTITIES.get(view.chunk), _PROPERTIES.get(view.chunk)):
            if index is not None:
                index.add_to(held)


def _entities_of(chunk: Chunk) -> EntityIndex:
    index = _ENTITIES.get(chunk)
    if index is None:
        assert chunk.facts is not None
        index = _ENTITIES[chunk] = EntityIndex(chunk.facts)
    return index


def _properties_of(chunk: Chunk) -> EntityIndex:
    index = _PROPERTIES.get(chunk)
    if index is None:
        assert chunk.facts is not None
        index = _PROPERTIES[chunk] = EntityIndex.of_distinct(chunk.facts["property"])
    return index


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
    return bool(UNSPACED.match(before) or UNSPACED.match(after))


def may_end(text: str, at: int) -> bool:
    """Whether a name can end before the letter at `at`: a word does, or a Korean ending is written onto the name."""
    return is_border(text, at) or bool(_ENDING.match(text, at) and _BEFORE_ENDING.search(text, max(0, at - 2), at))


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
