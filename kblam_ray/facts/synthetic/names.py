"""Names of synthetic entities: a one-to-one map from entity numbers to names of many kinds, lengths and scripts.

Each name holds exactly one *root*, a word that spells the entity's number: invented syllables ("Trevano"), a phrase of
real words ("Amber Falcon"), digits, a code, or syllables of another script. Around it stand decorations ("Ltd", a first
name) that spell nothing. Roots are permuted numbers in mixed radix, so different entities have different names however
many there are; a small number may be spelt short, a larger one takes more syllables.

Every fourth entity is the sibling of the one before it: the same name with one small change (a last vowel, "II",
"New"), because telling near-duplicates apart is the hard part of retrieval.
"""

# ruff: noqa: E501, SIM905 (inventories of syllables, one per line)
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from kblam_ray.facts.synthetic import lexicon
from kblam_ray.facts.synthetic.draws import Draws, number_of, permute

SIBLING_EVERY = 4
"""Every fourth entity is a near-duplicate of the one before it."""

_NAME, _ROOT = number_of("name"), number_of("root")
_ONSETS = "b d f g h j k l m n p r s t v w z br dr gr kr tr st th sh ch pl fl gl kl".split()
_CODAS = "n l r m".split()


@dataclass(frozen=True)
class RootStyle:
    """How a root spells a number: the units at its first, inner and last place.

    The units parse in one way only (each syllable starts with a consonant and no coda begins a cluster; other scripts
    have units of one length), so the spelling is one-to-one.
    """

    first: tuple[str, ...]
    inner: tuple[str, ...]
    last: tuple[str, ...]
    lengths: tuple[int, ...]
    separator: str = ""

    @cached_property
    def salt(self) -> int:
        return number_of(self.first[0] + self.last[-1] + self.separator)

    def capacity(self, length: int) -> int:
        return len(self.first) * len(self.inner) ** (length - 2) * len(self.last)

    def spell(self, number: int, length: int, key: int) -> str:
        """`number` as a root of `length` units, or of as many as it takes."""
        while self.capacity(length) <= number:
            length += 1
        rest = permute(number, self.capacity(length), key ^ self.salt)
        rest, digit = divmod(rest, len(self.last))
        units = [self.last[digit]]
        for _ in range(length - 2):
            rest, digit = divmod(rest, len(self.inner))
            units.append(self.inner[digit])
        units.append(self.first[rest])
        return self.separator.join(reversed(units))


def _alphabet(units: str, *, lengths: tuple[int, ...]) -> RootStyle:
    parts = tuple(units.split() if " " in units else units)
    return RootStyle(parts, parts, parts, lengths)


_OPEN = tuple(onset + vowel for onset in _ONSETS for vowel in "aeiou")
_CLOSED = tuple(onset + vowel + coda for onset in _ONSETS[:17] for vowel in "aeiou" for coda in _CODAS)
_PARAGOGE = {"a": "e", "o": "i", "u": "y"}
"""Last vowels of a Latin root, and what a sibling has instead: no root ends in one of those."""
_ENDING = tuple(onset + vowel for onset in _ONSETS for vowel in _PARAGOGE)

STYLES: dict[str, RootStyle] = {
    "R": RootStyle(_OPEN + _CLOSED, _OPEN + _CLOSED, _ENDING, (2, 2, 3, 3, 3, 4)),
    "W": RootStyle(lexicon.ADJECTIVES, lexicon.NOUNS, lexicon.NOUNS, (2, 2, 3, 4), " "),
    "N": _alphabet("0123456789", lengths=(3, 4, 5, 6)),
    "A": RootStyle(
        tuple("BCDFGHJKLMNPQRSTVWXZ"), tuple("BCDFGHJKLMNPQRSTVWXZ23456789"), tuple("23456789"), (4, 5, 5, 6, 8)
    ),
    "zh": _alphabet("云青海明山文华安和金玉龙清光林石星月秋春江宁长平远东北天白松竹梅兰风雨雪雷火木", lengths=(2, 2, 3, 4)),
    "ja": _alphabet("カ サ タ ナ ハ マ ヤ ラ ワ キ シ チ ニ ヒ ミ リ ク ス ツ ヌ フ ム ユ ル ケ セ テ ネ ヘ メ レ コ ソ ト ノ ホ モ ヨ ロ", lengths=(3, 4, 5)),
    "ko": _alphabet("가 나 다 라 마 바 사 아 자 하 고 노 도 로 모 보 소 오 조 호 남 동 린 민 반 산 안 정 한 기 니 리 미 비 이 지 진 희", lengths=(2, 3, 4)),
    "ru": _alphabet("ба ва га да за ка ла ма на па ра са та бо во го до зо ко ло мо но по ро со то ви ли ми ни ри си ти", lengths=(2, 3, 4)),
    "el": _alphabet("βα γα δα ζα κα λα μα να πα ρα σα τα βο γο δο κο λο μο νο πο ρο σο το λι μι νι ρι τι", lengths=(2, 3, 4)),
    "ar": _alphabet("بتجحدرزسشصطعفقكلمنهوي", lengths=(4, 5, 6)),
    "hi": _alphabet("का गा चा जा टा दा ना पा बा मा या रा ला वा सा हा कि गि चि जि नि पि मि रि लि वि सि को गो जो नो पो मो रो लो सो", lengths=(2, 3, 4)),
}  # fmt: skip

DECORATIONS: dict[str, tuple[str, ...]] = {
    "first": lexicon.FIRST_NAMES,
    "last": lexicon.LAST_NAMES,
    "initial": tuple("ABCDEFGHIJKLMNOPRSTVWYZ"),
    "trade": lexicon.TRADES,
    "form": lexicon.LEGAL_FORMS,
    "greek": lexicon.GREEK,
    "stars": lexicon.CONSTELLATIONS,
    "subject": lexicon.SUBJECTS,
    "good": lexicon.GOODS,
    "letters": tuple(a + b for a in "BCDFGHKLMNPRSTVXZ" for b in "BCDFGHKLMNPRSTVXZ"),
    "digit": tuple("23456789"),
    "year": tuple(str(year) for year in range(1870, 2031)),
    "city_zh": ("市", "县", "镇"),
    "form_zh": ("公司", "集团", "银行"),
    "city_ja": ("市", "町", "村"),
    "form_ko": ("전자", "건설", "식품"),
}

_TOKEN = re.compile(r"\{(\w+)(?::(\w+))?\}")
_CASES: dict[str | None, Callable[[str], str]] = {
    None: lambda root: root[:1].upper() + root[1:],
    "title": str.title,
    "lower": str.lower,
    "upper": str.upper,
    "apostrophe": lambda root: f"{root[:2]}'{root[2:]}".title().replace("'", "’"),
}
_SIBLING_MARKS = ("{} II", "{} III", "{} B", "{} 2", "New {}", "Little {}", "{} Jr.", "{} (old)", "Neo-{}")


class Names:
    """The names of one seed's entities. Every method is a pure function of the seed and its arguments."""

    def __init__(self, seed: int, patterns: dict[str, tuple[str, ...]]) -> None:
        """`patterns` maps a kind of entity to its name patterns, each with exactly one root."""
        self._seed = seed
        self._patterns = patterns

    def base_of(self, entity: int) -> int:
        """The entity whose near-duplicate `entity` is, or `entity` itself."""
        return entity - 1 if entity % SIBLING_EVERY == SIBLING_EVERY - 1 else entity

    def name(self, kind: str, entity: int) -> str:
        """The name of an entity that has this kind, with the sibling's change where it is one."""
        base = self.base_of(entity)
        draws = Draws(self._seed, _NAME, base)
        if base == entity:
            return self._fill(draws, kind, base)
        change = Draws(self._seed, _NAME, entity)
        if change.below(2):
            plain, shifted = self._fill(draws, kind, base), self._fill(Draws(self._seed, _NAME, base), kind, base, True)
            if shifted != plain:
                return shifted
        return change.pick(_SIBLING_MARKS).format(self._fill(Draws(self._seed, _NAME, base), kind, base))

    def mention(self, kind: str, draws: Draws) -> str:
        """A name of this kind to use as a value: it may or may not be an entity's."""
        return self._fill(draws, kind, draws.below(40_000))

    def _fill(self, draws: Draws, kind: str, number: int, shifted: bool = False) -> str:
        pattern = draws.pick(self._patterns[kind])

        def fill(match: re.Match[str]) -> str:
            token, case = match.groups()
            style = STYLES.get(token)
            if style is None:
                return draws.pick(DECORATIONS[token])
            root = style.spell(number, draws.pick(style.lengths), self._seed ^ _ROOT)
            if shifted and token == "R":
                root = root[:-1] + _PARAGOGE[root[-1]]
            return _CASES["title" if token == "W" and case is None else case](root)

        return _TOKEN.sub(fill, pattern)
