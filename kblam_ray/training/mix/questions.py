"""Which question a training example asks, and which facts its knowledge base must not hold.

Nothing is asked about entities that are held out, whether they are named, misspelt into or made up. An unanswerable
question's knowledge base surely lacks its answer: the fact is in no table, or is withheld.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import Question, QuestionMaker
from kblam_ray.facts.questions.forms import is_description
from kblam_ray.facts.split import is_held_out
from kblam_ray.facts.synthetic import SyntheticFacts
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.facts.synthetic.properties import PROPERTY_TYPES
from kblam_ray.training.mix.settings import MixSettings

logger = logging.getLogger(__name__)

ATTEMPTS = 32
_ATTEMPT = 1 << 40
_WITHHELD = number_of("withheld")


@dataclass(frozen=True)
class Asked:
    """A question, and the rows of the facts that its knowledge base must not hold."""

    question: Question
    forbidden: frozenset[int] = frozenset()


class TrainingQuestions:
    """Questions about the facts trained on, by kind and number.

    Args:
        facts: those trained on.
        held_out: entities that must not be named.
        rows_of_entity: rows of the facts about an entity, letter case aside.
        settings: of the mix.
        refusal: the answer to an unanswerable question.

    Attributes:
        shares: the share of each kind that the facts allow; they sum to 1.

    Raises:
        InputError: no facts, or they allow none of the kinds asked for.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        held_out: set[str],
        rows_of_entity: Callable[[str], list[int]],
        settings: MixSettings,
        refusal: str,
    ) -> None:
        self._facts, self._rows_of_entity, self._settings, self._refusal = facts, rows_of_entity, settings, refusal
        self._held_out = {entity.casefold() for entity in held_out}
        self._strangers = SyntheticFacts(number_of(f"stranger {settings.seed}") >> 1)
        self._maker = QuestionMaker(facts, settings.seed, refusal=refusal, unknown_entity=self._stranger)
        self.shares = self._possible_shares()

    def attempts(self, kind: str, number: int) -> Iterator[Asked]:
        """Questions of a kind for example `number`, the best first; the first one that fits is to be taken."""
        for attempt in range(ATTEMPTS):
            try:
                asked = self._ask(kind, number + attempt * _ATTEMPT)
            except InputError:  # the names drawn could not be misspelt; the kind as such is possible
                continue
            if not self._names_held_out(asked.question):
                yield asked

    def _possible_shares(self) -> dict[str, float]:
        possible = self._maker.possible_kinds()
        mix = {kind: share for kind, share in self._settings.question_mix.items() if share > 0}
        left_out = sorted(set(mix) - set(possible))
        allowed = {kind: mix[kind] for kind in possible if kind in mix}
        if not allowed:
            raise InputError(
                f"these facts allow no questions of the kinds {', '.join(left_out)}",
                where="question_mix",
                help=f"ask for some of {', '.join(possible)}",
            )
        if left_out:
            logger.warning("these facts allow no questions of the kinds %s: they are left out", ", ".join(left_out))
        return {kind: share / sum(allowed.values()) for kind, share in allowed.items()}

    def _stranger(self, draws: Draws) -> str:
        """A name of which there is no fact, and that belongs to no entity held out of any table."""
        settings = self._settings
        while True:
            name = self._strangers.entity_name(draws.below(1 << 20))
            if not is_held_out(name, settings.held_out, settings.held_out_seed):
                return name

    def _ask(self, kind: str, number: int) -> Asked:
        if kind != "unanswerable":
            return Asked(self._maker.make(kind, number))  # type: ignore[arg-type]
        settings = self._settings
        if Draws(settings.seed, _WITHHELD, number).below(1 << 32) < settings.withheld * (1 << 32):
            # Of the same form as answerable questions, so that nothing but the facts tells them apart.
            kinds_of_one = [kind for kind in ("simple", "paraphrase", "misspelt") if kind in self.shares] or ["simple"]
            asked_for = Draws(settings.seed, _WITHHELD, number, 1).pick(kinds_of_one)
            question = self._maker.make(asked_for, number)  # type: ignore[arg-type]
            refused = Question("unanswerable", question.text, self._refusal, (), (), question.asked)
            return Asked(refused, self._answering(question.asked) | frozenset(question.facts))
        question = self._maker.make("unanswerable", number)
        return Asked(question, self._answering(question.asked))

    def _answering(self, asked: Sequence[tuple[str, str]]) -> frozenset[int]:
        """The rows that answer a question, or might: the property by another name, and descriptions of the entity."""
        found = set()
        for entity, property in asked:
            names = {property.casefold(), *_synonyms(property)}
            for row in self._rows_of_entity(entity):
                other = self._facts[row].property
                if other.casefold() in names or property.casefold() in _synonyms(other) or is_description(other):
                    found.add(row)
        return frozenset(found)

    def _names_held_out(self, question: Question) -> bool:
        """Whether a misspelt name has become that of an entity held out."""
        if question.kind not in ("misspelt", "unanswerable") or not self._held_out:
            return False
        text = question.text.casefold()
        lengths = {len(entity) + more for entity, _ in question.asked for more in (-1, 0, 1)}
        return any(
            text[start : start + length] in self._held_out
            for length in lengths
            for start in range(len(text) - length + 1)
        )


def _synonyms(property: str) -> tuple[str, ...]:
    known = PROPERTY_TYPES.get(property.casefold())
    return known.synonyms if known else ()
