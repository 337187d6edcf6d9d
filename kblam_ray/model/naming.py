"""How well a question's words name a fact: whole and misspelt mentions, and names in the question that are nobody's.

What is looked at is letters, case and digits, in no language's grammar: words of any script are compared as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from kblam_ray.model.mentions import is_border, may_end, normalized

MAX_LETTERS = 80
"""Letters of a phrase that are compared: longer ones (a sentence as an entity) differ early or not at all."""

MIN_LETTERS = 4
"""Shorter phrases are named exactly or not at all: with a letter more or less they are other words."""

NEAR = 0.75
"""Least similarity of a misspelt mention: one wrong letter in four."""

Span = tuple[int, int]


class Wording:
    """A question, ready to be asked what it names.

    Attributes:
        text: the question with one blank for every run of blanks; spans count in its letters.
    """

    def __init__(self, question: str) -> None:
        self.text = " ".join(question.split())
        folded = [letter.casefold() for letter in self.text]
        self._folded = "".join(folded)
        # Where each letter of the folded text comes from: folding may make two letters of one.
        self._origin = [at for at, letters in enumerate(folded) for _ in letters] + [len(self.text)]
        places = range(len(self._folded) + 1)
        self._is_start = np.array([is_border(self._folded, at) for at in places])
        self._is_end = np.array([may_end(self._folded, at) for at in places])

    def mentions(self, phrase: str) -> list[Span]:
        """Where the phrase stands as whole words, whatever their case."""
        wanted = normalized(phrase)
        if not wanted:
            return []
        found, at = [], self._folded.find(wanted)
        while at >= 0:
            end = at + len(wanted)
            if self._is_start[at] and self._is_end[end]:
                found.append(self._span(at, end))
            at = self._folded.find(wanted, at + 1)
        return found

    def names(self, phrase: str) -> bool:
        """Whether the phrase stands in the question as whole words."""
        return bool(self.mentions(phrase))

    def similarity(self, phrase: str) -> tuple[float, Span]:
        """How near any whole words of the question come to the phrase, and where they are.

        Returns:
            1 minus the least number of letters to insert, delete or replace per letter of the phrase, from 0 to 1.
            Phrases too short to be misspelt get 1 or 0.
        """
        wanted = normalized(phrase)[:MAX_LETTERS]
        exact = self.mentions(phrase)
        if exact:
            return 1.0, exact[0]
        if len(wanted) < MIN_LETTERS or not self._folded:
            return 0.0, (0, 0)
        letters = np.array([ord(letter) for letter in self._folded])
        num = len(letters)
        steps = np.arange(num + 1)
        far = len(wanted) + num
        # Sellers' recurrence (1980), with swaps: the distance to the best run of letters that ends here, begun at any
        # word.
        row, starts = _with_letters_left_out(np.where(self._is_start, 0, far), steps)
        before, row_before, starts_before = 0, row, starts
        for letter in map(ord, wanted):
            taken, dropped = row[:-1] + (letters != letter), row[1:] + 1
            is_taken = taken <= dropped
            best = np.concatenate([[row[0] + 1], np.where(is_taken, taken, dropped)])
            begun = np.concatenate([[starts[0]], np.where(is_taken, starts[:-1], starts[1:])])
            # Two letters in each other's place count as one mistake, as people make them.
            swapped = np.full(num + 1, far)
            swapped[2:] = np.where((letters[:-1] == letter) & (letters[1:] == before), row_before[:-2] + 1, far)
            is_swapped = swapped < best
            best = np.where(is_swapped, swapped, best)
            begun[2:] = np.where(is_swapped[2:], starts_before[:-2], begun[2:])
            row_before, starts_before, before = row, starts, letter
            row, starts = _with_letters_left_out(best, begun)
        row = np.where(self._is_end, row, far)
        end = int(row.argmin())
        return max(0.0, 1 - float(row[end]) / len(wanted)), self._span(int(starts[end]), end)

    def strange_words(self, spans: Iterable[Span]) -> list[Span]:
        """Words that look like parts of names, and are outside of all the spans.

        Words with a digit, and words with a capital that is not one only because a sentence begins. Scripts without
        capitals have none of the latter.
        """
        covered = list(spans)
        return [
            word
            for word in _name_like(self.text)
            if not any(start < word[1] and word[0] < end for start, end in covered)
        ]

    def touches(self, span: Span, others: Sequence[Span]) -> int:
        """How many of the other spans stand directly beside a span, with one blank or hyphen between."""
        return sum(
            any(self.text[first[1] : second[0]] in (" ", "-") and first[1] < second[0] for first, second in pairs)
            for pairs in (((span, other), (other, span)) for other in others)
        )

    def _span(self, start: int, end: int) -> Span:
        return self._origin[start], self._origin[end - 1] + 1 if end else 0


def _with_letters_left_out(row: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances and starts with letters of the question that the phrase lacks: one more for each since the least."""
    steps = np.arange(len(row))
    level = row - steps
    least = np.minimum.accumulate(level)
    source = np.maximum.accumulate(np.where(level == least, steps, 0))
    return least + steps, starts[source]


def overlap(one: Span, other: Span) -> bool:
    """Whether two spans have a letter in common."""
    return one[0] < other[1] and other[0] < one[1]


def longest(spans: Iterable[tuple[Span, str]]) -> list[tuple[Span, str]]:
    """Mentions, without those that are a part of a longer one: "York" in "New York" is not the city of York."""
    given = list(spans)
    return [
        (span, phrase)
        for span, phrase in given
        if not any(other[0] <= span[0] and span[1] <= other[1] and other != span for other, _ in given)
    ]


@lru_cache(maxsize=64)
def _name_like(text: str) -> tuple[Span, ...]:
    found = []
    for match in re.finditer(r"[^\W_]+", text):
        word = match.group()
        capitals = sum(letter.isupper() or letter.istitle() for letter in word)
        has_digit = any(letter.isdigit() for letter in word)
        # "I" is a pronoun wherever it stands; as a number of its own it is rare beside II and III.
        is_initial = capitals == 1 and bool(re.search(r"(^|[.?!:;。？！：…]\s*)\W*$", text[: match.start()]))
        if has_digit or (capitals and not is_initial and word != "I"):
            found.append(match.span())
    return tuple(found)
