"""Questions about any table of facts, with the facts they need and the answer: for training and for evaluation.

Question i of a table, a seed and a kind is a pure function of the four, so that shards make disjoint ranges and an
evaluation can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import forms
from kblam_ray.facts.questions.misspelling import misspell
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.facts.synthetic.properties import PROPERTY_TYPES

QuestionKind = Literal["simple", "paraphrase", "misspelt", "two_entity", "open_ended", "follow_up", "unanswerable"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)

Reason = Literal["same_entity", "same_property", "unknown_entity"]
"""Why there is no answer: the entity lacks the property; another entity has it; the entity is nowhere in the table."""

REFUSAL = "I do not know: the knowledge base has no fact about that."

DEFAULT_MIX: Mapping[QuestionKind, float] = {
    "simple": 0.4,
    "paraphrase": 0.1,
    "misspelt": 0.05,
    "two_entity": 0.1,
    "open_ended": 0.1,
    "follow_up": 0.05,
    "unanswerable": 0.2,
}
MAX_OPEN_ENDED_FACTS = 6
_ATTEMPTS = 64


@dataclass(frozen=True)
class Question:
    """A question, its answer and what it takes to answer it.

    Attributes:
        kind: what makes it easy or hard.
        text: the user's (last) message.
        answer: the sentence or sentences a model should say; the refusal where there is no answer.
        facts: numbers of the facts needed, in the order of the answer; none for an unanswerable question.
        values: the values that a right answer states, one per fact.
        asked: the (entity, property) pairs meant, as they stand, or would stand, in the table.
        context: the turns before `text`, the user's and the assistant's in turn; only a follow-up has any.
        reason: why there is no answer; only an unanswerable question has one.
        num_values: how many of the values each pair of `asked` has; none for an unanswerable question.
    """

    kind: QuestionKind
    text: str
    answer: str
    facts: tuple[int, ...]
    values: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    context: tuple[str, ...] = field(default=())
    reason: Reason | None = None
    num_values: tuple[int, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that asks it: the turns before, then the question."""
        turns = (*self.context, self.text)
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]


class QuestionMaker:
    """Makes questions about `facts`, by number."""

    def __init__(
        self,
        facts: Sequence[Fact],
        seed: int = 0,
        *,
        refusal: str = REFUSAL,
        unknown_entity: Callable[[Draws], str] | None = None,
    ) -> None:
        """Index the table.

        Args:
            facts: any facts; several with one (entity, property) are asked for together.
            seed: of the questions.
            refusal: the answer where no fact applies.
            unknown_entity: makes names of entities of which there is no fact. By default a synthetic entity's; names
                that stand in the table are passed over.

        Raises:
            InputError: no facts.
        """
        if not facts:
            raise InputError("no facts to ask about", help="give at least one fact")
        self._facts = facts
        self._seed = seed
        self._refusal = refusal
        self._unknown = unknown_entity or _stranger(seed)
        self._by_pair: dict[tuple[str, str], list[int]] = {}
        for number, fact in enumerate(facts):
            self._by_pair.setdefault((fact.entity, fact.property), []).append(number)
        self._pairs = list(self._by_pair)
        self._properties_of: dict[str, list[str]] = {}
        self._entities_with: dict[str, list[str]] = {}
        for entity, property in self._pairs:
            self._properties_of.setdefault(entity, []).append(property)
            self._entities_with.setdefault(property, []).append(entity)
        self._entities = list(self._properties_of)
        self._rich_entities = [entity for entity, properties in self._properties_of.items() if len(properties) > 1]
        self._folded = {entity.casefold() for entity in self._entities}
        self._paraphrasable = [pair for pair in self._pairs if pair[1].casefold() in PROPERTY_TYPES]

    def possible_kinds(self) -> tuple[QuestionKind, ...]:
        """The kinds of question that this table allows."""
        impossible: set[QuestionKind] = set()
        if not self._paraphrasable:
            impossible.add("paraphrase")
        if len(self._entities) < 2:
            impossible.add("two_entity")
        if not self._rich_entities:
            impossible.add("follow_up")
        if not any(misspell(entity, Draws(0)) for entity in self._entities):
            impossible.add("misspelt")
        return tuple(kind for kind in QUESTION_KINDS if kind not in impossible)

    def questions(self, start: int, stop: int, mix: Mapping[QuestionKind, float] | None = None) -> Iterator[Question]:
        """Questions start to stop - 1 of an endless mixture.

        Args:
            mix: the share of each kind, in any unit; by default `DEFAULT_MIX` without what the table does not allow.

        Raises:
            InputError: a share of a kind that is unknown or that the table does not allow, or no share at all.
        """
        possible = self.possible_kinds()
        shares = {kind: DEFAULT_MIX[kind] for kind in possible} if mix is None else dict(mix)
        for kind, share in shares.items():
            if kind not in possible or share < 0:
                raise InputError(
                    f"{share} of {kind!r} questions",
                    where="question mix",
                    help=f"this table allows {', '.join(possible)}",
                )
        total = sum(shares.values())
        if total <= 0:
            raise InputError("no kind of question has a share", where="question mix", help="give one at least")
        for number in range(start, stop):
            point = Draws(self._seed, number_of("mix"), number).below(1 << 32) / (1 << 32) * total
            chosen = next(iter(shares))
            for kind, share in shares.items():
                if share > 0:
                    chosen = kind
                    if point < share:
                        break
                point -= share
            yield self.make(chosen, number)

    def make(self, kind: QuestionKind, number: int) -> Question:
        """Question `number` of a kind.

        Raises:
            InputError: the table does not allow the kind.
        """
        draws = Draws(self._seed, number_of(kind), number)
        try:
            make = getattr(self, f"_{kind}")
        except AttributeError:
            raise InputError(f"no kind of question {kind!r}", help=f"known: {', '.join(QUESTION_KINDS)}") from None
        question: Question = make(draws)
        return question

    def _simple(self, draws: Draws) -> Question:
        pair = draws.pick(self._pairs)
        return self._about("simple", [pair], self._plain_text(pair, draws))

    def _paraphrase(self, draws: Draws) -> Question:
        if not self._paraphrasable:
            raise _not_here("paraphrase", "no property of it has known synonyms")
        entity, property = draws.pick(self._paraphrasable)
        return self._about("paraphrase", [(entity, property)], _reworded(entity, property, draws))

    def _misspelt(self, draws: Draws) -> Question:
        for _ in range(_ATTEMPTS):
            entity, property = draws.pick(self._pairs)
            wrong = misspell(entity, draws)
            if wrong and wrong.casefold() not in self._folded:
                text = draws.pick(forms.SIMPLE_FORMS).format(e=wrong, p=property)
                return self._about("misspelt", [(entity, property)], text)
        raise _not_here("misspelt", "its entities' names are too short")

    def _two_entity(self, draws: Draws) -> Question:
        if len(self._entities) < 2:
            raise _not_here("two_entity", "it is about one entity")
        first = draws.pick(self._pairs)
        if draws.below(2) and len(others := self._entities_with[first[1]]) > 1:
            second = (_another(others, first[0], draws), first[1])
            text = draws.pick(forms.SAME_PROPERTY_FORMS)
        else:
            other = _another(self._entities, first[0], draws)
            second = (other, draws.pick(self._properties_of[other]))
            text = draws.pick(forms.TWO_ENTITY_FORMS)
        text = text.format(e1=first[0], p1=first[1], e2=second[0], p2=second[1])
        return self._about("two_entity", [first, second], text)

    def _open_ended(self, draws: Draws) -> Question:
        entity = draws.pick(self._entities)
        pairs = [(entity, property) for property in self._properties_of[entity][:MAX_OPEN_ENDED_FACTS]]
        return self._about("open_ended", pairs, draws.pick(forms.OPEN_ENDED_FORMS).format(e=entity))

    def _follow_up(self, draws: Draws) -> Question:
        if not self._rich_entities:
            raise _not_here("follow_up", "no entity has two properties")
        entity = draws.pick(self._rich_entities)
        before, now = draws.sample(self._properties_of[entity], 2)
        earlier = self._about("simple", [(entity, before)], self._plain_text((entity, before), draws))
        text = draws.pick(forms.FOLLOW_UP_FORMS).format(p=now)
        return self._about("follow_up", [(entity, now)], text, context=(earlier.text, earlier.answer))

    def _unanswerable(self, draws: Draws) -> Question:
        reason: Reason = draws.pick(("same_entity", "same_property", "unknown_entity"))
        entity, property = draws.pick(self._pairs)
        if reason == "same_entity":
            property = self._missing_property(entity, draws)
        elif reason == "same_property":
            entity = self._entity_without(entity, property, draws)
        else:
            entity = self._stranger(draws)
        if property.casefold() in PROPERTY_TYPES and draws.below(4) == 0:
            text = _reworded(entity, property, draws)
        else:
            text = draws.pick(forms.SIMPLE_FORMS).format(e=entity, p=property)
        return Question("unanswerable", text, self._refusal, (), (), ((entity, property),), reason=reason)

    def _missing_property(self, entity: str, draws: Draws) -> str:
        """A property the entity lacks, if possible one of entities that share a property with it."""
        has = self._properties_of[entity]
        for _ in range(_ATTEMPTS):
            alike = draws.pick(self._entities_with[draws.pick(has)])
            candidate = draws.pick(self._properties_of[alike])
            if candidate not in has:
                return candidate
        pool = [name for name in (*self._entities_with, *PROPERTY_TYPES) if name not in has]
        if not pool:
            raise _not_here("unanswerable", "every entity has every property")
        return draws.pick(pool)

    def _entity_without(self, entity: str, property: str, draws: Draws) -> str:
        """An entity that lacks the property: one of the table, or a near-duplicate of `entity` that is not in it."""
        if draws.below(2):
            for _ in range(_ATTEMPTS):
                other = draws.pick(self._entities)
                if (other, property) not in self._by_pair:
                    return other
        for mark in draws.sample(("{} II", "New {}", "{} Junior", "{} 3", "{} North", "{}-B", "Upper {}"), 7):
            if (other := mark.format(entity)).casefold() not in self._folded:
                return other
        return self._stranger(draws)

    def _stranger(self, draws: Draws) -> str:
        while (name := self._unknown(draws)).casefold() in self._folded:
            pass
        return name

    def _plain_text(self, pair: tuple[str, str], draws: Draws) -> str:
        entity, property = pair
        known = PROPERTY_TYPES.get(property.casefold())
        fact = self._facts[self._by_pair[pair][0]]
        return draws.pick(forms.plain_forms(fact, known.asks if known else ())).format(e=entity, p=property)

    def _about(
        self, kind: QuestionKind, pairs: Sequence[tuple[str, str]], text: str, context: tuple[str, ...] = ()
    ) -> Question:
        groups = [self._by_pair[pair] for pair in pairs]
        answer = " ".join(
            forms.answer_sentence(*pair, [self._facts[number].value for number in group])
            for pair, group in zip(pairs, groups, strict=True)
        )
        numbers = tuple(number for group in groups for number in group)
        values = tuple(self._facts[number].value for number in numbers)
        num_values = tuple(map(len, groups))
        return Question(kind, text, answer, numbers, values, tuple(pairs), context, num_values=num_values)


def _reworded(entity: str, property: str, draws: Draws) -> str:
    """A question without the property's word: half of them whole questions, half with a synonym."""
    known = PROPERTY_TYPES[property.casefold()]
    if draws.below(2):
        return draws.pick(known.asks).format(e=entity)
    return draws.pick(forms.SYNONYM_FORMS).format(e=entity, s=draws.pick(known.synonyms))


def _another(entities: Sequence[str], but: str, draws: Draws) -> str:
    """One of at least two different entities that is not `but`."""
    at = draws.below(len(entities))
    return entities[at] if entities[at] != but else entities[(at + 1) % len(entities)]


def _stranger(seed: int) -> Callable[[Draws], str]:
    # Another seed spells other names; those that the table happens to hold are passed over by the caller.
    maker = SyntheticFacts(number_of(f"stranger {seed}") >> 1)
    return lambda draws: maker.entity_name(draws.below(1 << 20))


def _not_here(kind: QuestionKind, why: str) -> InputError:
    return InputError(f"this table allows no {kind!r} question: {why}", help="leave the kind out, or add facts")
