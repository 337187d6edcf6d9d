"""What an answer states: where values stand in it as wholes, what runs into them, and what else it says.

Any language and wording: nothing here knows how an answer is phrased, but for a list of words that only frame one.
Scripts without blanks between words (Han, Kana, Thai, ...) are taken letter by letter.
"""

# ruff: noqa: SIM905 (lists of words)
from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from kblam_ray.model.mentions import KOREAN_ENDINGS, UNSPACED

_FRAME = frozenset(
    "a an and answer are as at be been both but by called does each for from had has have he her his i in is it its"
    " known named of on or respectively s she so that the their there these they this those to was were which while"
    " with yes you это является هو هي היא הוא है हैं の は が を に と も で だ 的 是 为 為 在 有 和 也 叫".split()
)
"""Words and letters that frame a statement and state nothing."""

_JOINERS = frozenset("-–—/_.,'’:@&+·")
"""Marks that make one word of two when no blank stands beside them, or one number of two."""

_UNITS = frozenset("%‰°€$£¥₩₹#+")
"""Marks that belong to the number or code that they touch."""

_MINUS = frozenset("-−–")

_SENTENCE_ENDS = frozenset(".!?:;。!?:;")

_LONGEST_ENDING = max(map(len, KOREAN_ENDINGS))

Span = tuple[int, int]


def words(text: str) -> list[str]:
    """The words of a text, case folded, without marks; single letters in scripts without blanks.

    A letter with an accent is one, whether Unicode has it as one or two.
    """
    text = unicodedata.normalize("NFC", text)
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
    """The text with one blank for every run of blanks and line breaks, and its letters as Unicode composes them."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class ValueIndex:
    """Many values, found in a text without going through them.

    Args:
        values: values of facts, each perhaps several times.
    """

    def __init__(self, values: Iterable[str]) -> None:
        self._by_words: dict[tuple[str, ...], list[str]] = {}
        for value in sorted({one_line(value) for value in values}):
            parts = tuple(words(value))
            # A value of nothing but frame words stands in every sentence.
            if any(part not in _FRAME for part in parts):
                self._by_words.setdefault(parts, []).append(value)
        self._lengths = sorted({len(parts) for parts in self._by_words})

    def possible_in(self, parts: Sequence[str]) -> set[str]:
        """The values whose words stand side by side in a text; their marks and capitals may differ.

        Args:
            parts: `words` of the text; behind a value's last one may be an ending, as Korean has them.
        """
        found: set[str] = set()
        for length in self._lengths:
            if length > len(parts):
                break
            for start in range(len(parts) - length + 1):
                *before, last = parts[start : start + length]
                for end in (last, *_without_ending(last)):
                    found.update(self._by_words.get((*before, end), ()))
        return found


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

    def is_exactly(
        self, values: Sequence[str], others: Sequence[str] | ValueIndex = (), num_values: Sequence[int] = ()
    ) -> bool:
        """Whether the answer states the values and no more: the rules of `metrics.exact_match`."""
        wanted = [one_line(value) for value in values]
        longer_names = [name for name in self._names if name not in wanted]
        taken: list[Span] = []
        at = first = 0
        for count in num_values or [1] * len(wanted):
            # The longer ones first: another one may stand inside them.
            for value in sorted(wanted[first : first + count], key=len, reverse=True):
                within = [span for name in longer_names if len(name) > len(value) for span in self._occurrences(name)]
                found = next(
                    (
                        span
                        for span in self._occurrences(value, at)
                        if not _overlaps(span, taken) and not _within(span, within) and self._is_bare(span)
                    ),
                    None,
                )
                if found is None:
                    return False
                taken.append(found)
            first += count
            at = max((end for _, end in taken), default=0)
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
        for value in index.possible_in(self._words):
            if value in wanted or value in self._names or _stands_in(value, self._given_text):
                continue
            if any(not _overlaps(span, taken) and not _within(span, named) for span in self._occurrences(value)):
                return True
        return False


def _without_ending(word: str) -> Iterator[str]:
    """The word without what Korean writes onto the end of one, in each way that there is."""
    return (word[:at] for at in range(max(1, len(word) - _LONGEST_ENDING), len(word)) if word[at:] in KOREAN_ENDINGS)


def _stands_in(value: str, text: str) -> bool:
    return value in text and bool(Statement(text)._occurrences(value))


def _overlaps(span: Span, taken: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in taken)


def _within(span: Span, others: Sequence[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in others)


def _is_letter(letter: str) -> bool:
    # Vowel signs are marks to Unicode; they belong to their word.
    return letter.isalnum() or letter == "_" or unicodedata.category(letter) in ("Mn", "Mc")
