"""The search by words: facts ranked by BM25 of the question against their key texts.

What is indexed is `the {property} of {entity}`, the text that the encoder made the key of: so this search and the one
by cosine look at the same, and differ in how they compare it. Values are not indexed: a question names what it asks
for, not the answer, and the words of other facts' values would only mislead. The formula is the one of Lucene (C.
Kamphuis et al., "Which BM25 do you mean?", ECIR 2020) with the library's defaults k1 = 1.5 and b = 0.75.

Shape legend: B questions, M facts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from kblam_ray.errors import MissingDependencyError
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.statements import word_spans
from kblam_ray.facts.fact import Fact, key_text
from kblam_ray.model.mentions import UNSPACED

K1, B = 1.5, 0.75

_HANGUL = re.compile(r"[\uac00-\ud7a3]")


def tokens(text: str) -> list[str]:
    """The words of a text in any language, case folded, compatible forms of letters taken for one.

    In scripts that write no blank between words (Han, Kana, Thai, ...) and in Korean, which writes endings onto words,
    every letter and every two neighbours are tokens, since nothing marks where a word begins.
    """
    text = unicodedata.normalize("NFKC", text)
    found: list[str] = []
    end_before = -1
    for start, end in word_spans(text):
        word = text[start:end].casefold()
        if UNSPACED.match(word):
            if start == end_before and UNSPACED.match(text[start - 1]):
                found.append(text[start - 1 : end].casefold())
            found.append(word)
        elif _HANGUL.search(word):
            found += [*word, *map("".join, pairwise(word))]
        else:
            found.append(word)
        end_before = end
    return found


def library() -> Any:
    """The package bm25s.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import bm25s
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "the search by words needs the package bm25s", where="baseline", help='pip install "kblam-ray[evaluate]"'
        ) from None
    return bm25s


class WordSearch:
    """An index of the key texts of one knowledge base, made once.

    Args:
        facts: the knowledge base, at least one fact.
        num_turns: messages of the user that are the question, from the last back: as many as the question prior reads.

    Raises:
        MissingDependencyError: bm25s is not installed.
    """

    def __init__(self, facts: Sequence[Fact], num_turns: int = 1) -> None:
        self._num_turns = num_turns
        self._numbers: dict[str, int] = {}
        texts = (key_text(fact.entity, fact.property) for fact in facts)
        numbered = [[self._numbers.setdefault(token, len(self._numbers)) for token in tokens(text)] for text in texts]
        self._index = library().BM25(method="lucene", k1=K1, b=B, backend="numpy", csc_backend="numpy")
        self._index.index((numbered, self._numbers), create_empty_token=False, show_progress=False)

    def scores(self, questions: Sequence[Asked]) -> np.ndarray:
        """The BM25 of each question and each fact's key text, float32 [B, M]; 0 where they share no word.

        Facts whose key texts have the same words score the same, to the last bit.
        """
        return np.stack([self._scores(self._text(question)) for question in questions])

    def _text(self, question: Asked) -> str:
        asked = [message["content"] for message in question.messages if message["role"] == "user"]
        return "\n".join(asked[-self._num_turns :])

    def _scores(self, text: str) -> np.ndarray:
        known = [self._numbers[token] for token in tokens(text) if token in self._numbers]
        return np.asarray(self._index.get_scores_from_ids(known), np.float32)
