"""Made-up facts for pretraining: the synthetic ones, and others about any word that the sentence encoder knows.

A small model finds a fact about `walnut` only if it has met `walnut`: names that are all invented teach it to spell,
not to read. So half of the facts are about words of the encoder's own vocabulary, alone and together, in every case,
with properties that no list names. Fact i is a pure function of the seed, the vocabulary and i.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kblam_ray.facts.fact import Fact
from kblam_ray.facts.split import is_held_out
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.facts.synthetic.kinds import KINDS
from kblam_ray.facts.synthetic.lexicon import LANGUAGES
from kblam_ray.facts.synthetic.names import Names
from kblam_ray.facts.synthetic.properties import PROPERTY_TYPES

_ENTITY, _FACT = map(number_of, ("word entity", "word fact"))
_SIDE_BY_SIDE = 3
"""Facts about one word entity."""

NATIVE_PROPERTIES = (
    "描述", "首都", "人口", "作者", "价格", "颜色", "面积", "创始人", "地址", "语言",
    "성격", "설명", "수도", "인구", "가격", "저자", "위치", "색상", "설립자", "説明", "首都", "作者", "場所", "値段",
)  # fmt: skip


class WordFacts:
    """Facts about words of a vocabulary, by number.

    Args:
        words: lower-case words.
        letters: single characters of scripts without blanks between words.
        seed: of the draws.
    """

    def __init__(self, words: Sequence[str], letters: Sequence[str], seed: int = 0) -> None:
        self._words, self._letters, self._seed = words, letters, seed
        self._names = Names(seed, {kind.name: kind.patterns for kind in KINDS.values()})
        self._typed = [each for each in PROPERTY_TYPES.values() if each.value is not None]

    def fact(self, number: int) -> Fact:
        """Fact `number` of an endless list."""
        entity_number, place = divmod(number, _SIDE_BY_SIDE)
        draws = Draws(self._seed, _ENTITY, entity_number)
        is_native = bool(self._letters) and draws.below(100) < 8
        entity = self._native(draws, 1, 4) if is_native else self._entity(draws)
        kinds = draws.sample(range(100), _SIDE_BY_SIDE)
        draws = Draws(self._seed, _FACT, number)
        if is_native:
            property = draws.pick((*NATIVE_PROPERTIES, "description", "description"))
            return Fact(entity, property, self._native(draws, 2, 14))
        return self._about(entity, kinds[place], draws)

    def _about(self, entity: str, kind: int, draws: Draws) -> Fact:
        if kind < 20:
            return Fact(entity, draws.pick(("definition", "description")), self._gloss(draws))
        typed = draws.pick(self._typed)
        assert typed.value is not None
        value = typed.value(draws, self._names) if draws.below(5) else self._some_text(draws)
        if kind < 70:
            return Fact(entity, draws.pick(tuple(PROPERTY_TYPES)) if kind < 25 else typed.name, value)
        forms = ("{w}", "{w} {v}", "{w} code", "{w} name", "name in {l}", "{w} of {v}", "{w}-{n} code", "{W} {v}")
        form = draws.pick(forms)
        word, other = draws.pick(self._words), draws.pick(self._words)
        filled = form.format(w=word, v=other, l=draws.pick(LANGUAGES), n=draws.below(9) + 1, W=word.capitalize())
        return Fact(entity, filled, value)

    def _entity(self, draws: Draws) -> str:
        kind = draws.below(100)
        if kind < 20:
            first, second = draws.pick(self._words), draws.pick(self._words)
            text = first[: draws.between(2, 5)] + second[-draws.between(2, 5) :]
        else:
            count = 1 if kind < 50 else 2 if kind < 80 else 3
            text = " ".join(draws.pick(self._words) for _ in range(count))
        if kind >= 95:
            text += f" {draws.pick('ABCDXZ')}{draws.below(1000)}"
        case = draws.below(100)
        if case < 45:
            return text
        return text.upper() if case < 52 else text.capitalize() if case < 60 else text.title()

    def _native(self, draws: Draws, fewest: int, most: int) -> str:
        return "".join(draws.pick(self._letters) for _ in range(draws.between(fewest, most)))

    def _gloss(self, draws: Draws) -> str:
        """A phrase as a dictionary has it, of words that have nothing to do with each other."""
        form = draws.pick(
            (
                "a {} {} used for {}",
                "the act of {} a {}",
                "any of several {} {} with {} {}",
                "({}) a {} that is {} and {} in the {}",
                "a {} or {} {} of the {}",
                "of or relating to {} {}; {} {}",
                "someone who {} the {} {}",
                "the {} {} of a {} between the {} and the {}",
            )
        )
        return form.format(*(draws.pick(self._words) for _ in range(5)))

    def _some_text(self, draws: Draws) -> str:
        """A value of no type: a few words, a name, a code."""
        count = draws.between(1, 4)
        text = " ".join(draws.pick(self._words) for _ in range(count))
        kind = draws.below(10)
        if kind < 2:
            return "".join(draws.pick("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") for _ in range(draws.between(2, 5)))
        if kind < 3:
            return str(draws.below(10 ** draws.between(1, 7)))
        return text if kind < 5 else text.title()


def pretraining_facts(vocabulary: Sequence[str], num_facts: int, seed: int) -> Iterator[Fact]:
    """Facts of both kinds by turns, none of them about an entity that is held out for evaluation.

    Args:
        vocabulary: the sentence encoder's tokens; parts of words (`##ing`) are passed over.
    """
    words = [token for token in vocabulary if re.fullmatch("[a-z]{3,}", token)]
    letters = [token for token in vocabulary if re.fullmatch("[぀-ヿ㐀-鿿가-힣]", token)]
    made, wording = SyntheticFacts(seed), WordFacts(words, letters, seed)
    seen: set[tuple[str, str]] = set()
    number = 0
    while len(seen) < num_facts:
        for fact in (made.fact(number), wording.fact(number)):
            pair = fact.entity, fact.property
            if len(seen) < num_facts and pair not in seen and not is_held_out(fact.entity):
                seen.add(pair)
                yield fact
        number += 1
