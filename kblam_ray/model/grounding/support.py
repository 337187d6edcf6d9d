"""What the words of an answer rest on: a fact's exact value, the question, the facts' names, or grammar alone.

A verbatim answer says nothing of its own. Words that stand in none of these are taken for a statement, whether they
look like a name or not: a wrong colour is as wrong as a wrong city.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from kblam_ray.model.mentions import is_border
from kblam_ray.model.naming import Span

GRAMMAR = frozenset(
    re.findall(
        r"\S+",
        """
    a an the this that these those it its he she his her they their them there here who whose whom which what
    is are was were be been being has have had do does did and or as at by for from in into of on onto to with
    also both each so called named known respectively s
    der die das den dem des ein eine einer eines einem einen ist sind war waren und von vom zu zum zur im am hat haben
    le la les l un une est sont était et de du des d à au aux en il elle ils elles a ont
    el los las es son fue era y del al lo su sus tiene tienen
    il i gli uno è sono di da dal della dello dei delle nel nella e ha hanno
    o os as um uma são foi do dos das na nas nos ao tem têm
    het een van is zijn en de
    на в и с это является был была были
        """,
    )
)
"""Words that state nothing. Negations are not among them: they would turn a value into its opposite."""

PARTICLES = frozenset("的是为為在和與与叫了也のはがをにでともですだ은는이가의을를과와다입니")
"""The same for scripts in which such words are letters of a longer run."""

PUNCTUATION = frozenset(".,;:!?\"'()[]*。、，；：！？「」『』《》“”‘’«»…·")

_SPACED_DASH = re.compile(r"(?<=\s)[-–—](?=\s)")

_BY_LETTER = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff]"
)
"""Scripts whose words do not stand apart, and Hangul, whose words carry their particles."""

_WORD = re.compile(r"[^\W_]+")


def occurrences(text: str, phrase: str) -> Iterator[Span]:
    """Where a phrase stands in a text exactly, case and blanks included, and is not a part of a longer word."""
    at = text.find(phrase) if phrase else -1
    while at >= 0:
        end = at + len(phrase)
        if is_border(text, at) and is_border(text, end):
            yield at, end
        at = text.find(phrase, at + 1)


def words(text: str) -> Iterator[str]:
    """The words of a text, case folded; single letters where words do not stand apart."""
    for match in _WORD.finditer(text):
        run = ""
        for letter in match.group():
            if _BY_LETTER.match(letter):
                if run:
                    yield run.casefold()
                run = ""
                yield letter
            else:
                run += letter
        if run:
            yield run.casefold()


class Support:
    """The words and signs that an answer may use: those of some texts, grammar, and plain punctuation."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        self._words = {word for text in texts for word in words(text)} | GRAMMAR | PARTICLES
        self._signs = {sign for text in texts for sign in text} | PUNCTUATION

    def holds(self, text: str) -> bool:
        """Whether every word and sign of a text stands somewhere; a sign such as a minus may change a value."""
        return self._words.issuperset(words(text)) and all(
            sign in self._signs or sign.isspace() or sign.isalnum() for sign in _SPACED_DASH.sub(" ", text)
        )
