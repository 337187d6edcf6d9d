"""What an answer states: where values stand in it as wholes, what runs into them, and what else it says.

Any language and wording: nothing here knows how an answer is phrased, but for a list of words that only frame one.
Scripts without blanks between words (Han, Kana, Thai, ...) are taken letter by letter.
"""

# ruff: noqa: SIM905 (lists of words)
from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property

from kblam_ray.model.mentions import KOREAN_ENDINGS, UNSPACED

_FRAME = frozenset(
    "a an and answer are as at be been both but by called does each for from had has have he her his i in is it its"
    " known named of on or respectively s she so that the their there these they this those to was were which while"
    " with yes you の は が を に と も で だ 的 是 为 為 在 有 和 也 叫".split()
)
"""Words and letters that frame a statement and state nothing."""

_JOINERS = frozenset("-–—/_.,'’:@&+·")
"""Marks that make one word of two when no blank stands beside them, or one number of two."""

_UNITS = frozenset("%‰°€$£¥₩₹#+")
"""Marks that belong to the number or code that they touch."""

_MINUS = frozenset("-−–")

_SENTENCE_ENDS = frozenset(".!?:;。!?:;")

Span = tuple[int, int]


def words(text: str) -> list[str]:
    """The words of a text, case folded, without marks; single letters in scripts without blanks."""
    return [text[start:end].casefold() for start, end in word_spans(text)]


def word_spans(text: str) -> list[Span]:
    """Where the words of a text begin and end."""
    spans: list[Span] = []
    open_since: int | None = None
    for at, letter in enumerate(text):
        is_letter, is_single = _is_letter(letter), bool(UNSPACED.match(letter))
        if open_since is not None and (not is_letter or is_single):
            spans.append((open_since, at))
            open_since = None
        if is_letter and is_single:
            spans.append((at, at + 1))
        elif is_letter and open_since is None:
            open_since = at
    if open_since is not None:
        spans.append((open_since, len(text)))
    return spans


def one_line(text: str) -> str:
    """The text with one blank for every run of blanks and line breaks."""
    return " ".join(text.split())


class ValueIndex:
    """Many values, found in a text without going through all of them.

    Args:
        values: values of facts, each perhaps several times.
    """

    def __init__(self, values: Iterable[str]) -> None:
        self._by_first: dict[str, list[str]] = {}
        for value in sorted({one_line(value) for value in values}):
            parts = words(value)
            # A value of nothing but frame words stands in every sentence.
            if any(part not in _FRAME for part in parts):
                self._by_first.setdefault(parts[0], []).append(value)

    def starting_with(self, word: str) -> Sequence[str]:
        """The values whose first word, case folded, is this."""
        return self._by_first.get(word, ())


class Statement:
    """One answer, taken apart.

    Args:
        text: the answer.
        given: what was said before it; an answer may repeat its words.
        names: the entities and properties asked for: a value inside one of them is not stated.
    """

    def __init__(self, text: str, given: str = "", names: Sequence[str] = ()) -> None:
        self.text = one_line(text)
        self.spans = word_spans(self.text)
        self._given_text = one_line(given)
        self._given = frozenset(words(given)) | {word for name in names for word in words(name)}
        self._names = [one_line(name) for name in names]

    def content(self) -> list[str]:
        """The words of the answer that tell something, see `telling`."""
        return self.telling(self._words)

    def telling(self, given: Sequence[str]) -> list[str]:
        """Words without those of what was said before, and without those of the frame."""
        return [word for word in given if not self._is_harmless(word)]

    def is_exactly(self, values: Sequence[str], others: Sequence[str] | ValueIndex = ()) -> bool:
        """Whether the answer states the values and no more: the rules of `metrics.exact_match`."""
        wanted = [one_line(value) for value in values]
        longer_names = [name for name in self._names if name not in wanted]
        taken: list[Span] = []
        at = 0
        for value in wanted:
            within = [span for name in longer_names if len(name) > len(value) for span in self._occurrences(name)]
            found = next(
                (span for span in self._occurrences(value, at) if not _within(span, within) and self._is_bare(span)),
                None,
            )
            if found is None:
                return False
            taken.append(found)
            at = found[1]
        stated = {word for value in wanted for word in words(value)}
        return not self._tells_more(taken, stated) and not self._states_another(taken, wanted, others)

    @cached_property
    def _words(self) -> list[str]:
        return [self.text[start:end].casefold() for start, end in self.spans]

    @cached_property
    def _inside(self) -> frozenset[int]:
        """Places between two letters of one word."""
        return frozenset(at for start, end in self.spans for at in range(start + 1, end))

    def _is_harmless(self, word: str) -> bool:
        return word in self._given or word in _FRAME or word in KOREAN_ENDINGS

    def _occurrences(self, value: str, start: int = 0) -> list[Span]:
        """Where a value stands as a whole from `start` on."""
        found = []
        at = self.text.find(value, start) if value else -1
        while at >= 0:
            end = at + len(value)
            if at not in self._inside and (end not in self._inside or self._rest_of_word(end) in KOREAN_ENDINGS):
                found.append((at, end))
            at = self.text.find(value, at + 1)
        return found

    def _rest_of_word(self, at: int) -> str:
        return next(self.text[at:end] for start, end in self.spans if start < at < end)

    def _is_bare(self, span: Span) -> bool:
        """Whether nothing runs into a value."""
        start, end = span
        before = max((other for other in self.spans if other[1] <= start), default=None)
        after = min((other for other in self.spans if other[0] >= end), default=None)
        gap_before = self.text[before[1] if before else 0 : start]
        # Within a word there is an ending, which `_occurrences` has looked at.
        gap_after = "" if end in self._inside else self.text[end : after[0] if after else len(self.text)]
        if gap_before[-1:] in _UNITS or gap_after.strip()[:1] in _UNITS:
            return False
        if self.text[start].isdigit() and gap_before[-1:] in _MINUS:
            return False
        beside = [(gap_before, before), (gap_after, None if end in self._inside else after)]
        return not any(word is not None and self._runs_into(gap, word) for gap, word in beside)

    def _runs_into(self, gap: str, word: Span) -> bool:
        """Whether a word, with what stands between it and a value, makes another value of the two."""
        marks = gap.strip()
        if marks:
            return gap == marks and all(mark in _JOINERS for mark in marks)
        return not self._is_harmless(self.text[word[0] : word[1]].casefold())

    def _tells_more(self, taken: Sequence[Span], stated: set[str]) -> bool:
        """Whether the rest has a name, a number or a code that was not given."""
        for start, end in self.spans:
            word = self.text[start:end]
            folded = word.casefold()
            if _overlaps((start, end), taken) or folded in stated or self._is_harmless(folded):
                continue
            telling = word[1:] if self._begins_sentence(start) else word
            if any(letter.isdigit() for letter in word) or any(letter.isupper() for letter in telling):
                return True
        return False

    def _begins_sentence(self, at: int) -> bool:
        before = self.text[:at].rstrip(" \"'“‘(«*_-")
        return not before or before[-1] in _SENTENCE_ENDS

    def _states_another(self, taken: Sequence[Span], wanted: Sequence[str], others: Sequence[str] | ValueIndex) -> bool:
        index = others if isinstance(others, ValueIndex) else ValueIndex(others)
        named = [span for name in self._names for span in self._occurrences(name)]
        for value in {value for word in self._words for value in index.starting_with(word)}:
            if value in wanted or value in self._names or _stands_in(value, self._given_text):
                continue
            if any(not _overlaps(span, taken) and not _within(span, named) for span in self._occurrences(value)):
                return True
        return False


def _stands_in(value: str, text: str) -> bool:
    return value in text and bool(Statement(text)._occurrences(value))


def _overlaps(span: Span, taken: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in taken)


def _within(span: Span, others: Sequence[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in others)


def _is_letter(letter: str) -> bool:
    # Vowel signs are marks to Unicode; they belong to their word.
    return letter.isalnum() or letter == "_" or unicodedata.category(letter) in ("Mn", "Mc")
