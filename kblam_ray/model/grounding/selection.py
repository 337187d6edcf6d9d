"""Which facts are read for a question, and which of them it asks for.

Shape legend: M facts.

Attention ranks the facts. Words decide where they can: a fact whose entity and property both stand in the question is
asked for, and in a question about two entities the second one's fact is read however much the first draws attention.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.facts.questions.forms import is_description
from kblam_ray.model.grounding.support import words as spelt
from kblam_ray.model.mentions import named_facts, named_properties, normalized
from kblam_ray.model.naming import NEAR, Span, Wording, longest, overlap

MAX_READ = 8
"""Most facts that are read."""

READ_SHARE = 0.05
"""A fact is read whose retrieval score is at least this part of the best one's."""

NAMED_SHARE = 1e-3
"""The same for a fact that the question names: the second of two entities, or entity and property."""

NAME_SHARE = 1e-6
"""The same where the entity looks like a name in the question: a common word may be there for its meaning."""

ASKED_SHARE = 0.3
"""Where words do not decide, a fact may be the one asked for whose score is at least this part of the best one's."""

LINKS = frozenset(
    re.findall(
        r"\S+",
        """
    and or then now also what how about of for in with the one a an und oder dann wie was ist mit von für in der die das
    et ou alors de du des la le les pour en y o e del para com do da
    и а в для 那 么 呢 的 は の で に
    """,
    )
)
"""Words of a follow-up that asks the same of another entity: "And of Peru?", "What about France?"."""

MAX_NAMED = 256
"""Most facts of named entities that are looked at, best score first."""


@dataclass(frozen=True)
class ReadFact:
    """A fact that is read, with its retrieval score."""

    fact_id: int
    entity: str
    property: str
    value: str
    metadata: str | None
    score: float

    @builtins.property
    def pair(self) -> tuple[str, str]:
        return self.entity, self.property

    def texts(self) -> dict[str, str]:
        return {"entity": self.entity, "property": self.property, "value": self.value}


@dataclass(frozen=True)
class Reading:
    """The facts that are read for a question, best score first.

    Attributes:
        asked: places among `facts` of those that the question asks for, as far as can be told without a model.
        allowed: places of those that an answer may state: the asked ones, and others that may have been meant.
        is_certain: the question names entity and property of the asked facts.
    """

    facts: tuple[ReadFact, ...]
    asked: tuple[int, ...]
    allowed: frozenset[int]
    is_certain: bool

    def without_last(self) -> Reading | None:
        """The reading without the fact of the lowest score, for a prompt that is too long; None if it is the last."""
        last = len(self.facts) - 1
        if last < 1:
            return None
        asked = tuple(place for place in self.asked if place != last)
        return Reading(self.facts[:-1], asked or (0,), (self.allowed - {last}) | {*(asked or (0,))}, self.is_certain)


def choose(memory: KnowledgeMemory, scores_M: torch.Tensor, questions: Sequence[str]) -> Reading:
    """The facts to read for the last of some messages of the user.

    Args:
        memory: with texts and at least one fact.
        scores_M: retrieval scores, float32 [M].
        questions: what the user said, message by message; a follow-up names its entity in an earlier one.
    """
    scores = scores_M.cpu().numpy().astype(np.float64)
    fact_ids = memory.fact_ids
    best = float(scores.max())
    order = np.argsort(-scores, kind="stable")
    asked = Wording(questions[-1] if questions else "")
    about, named = _about(memory, questions, scores)
    by_score = [int(at) for at in order[:MAX_READ] if scores[at] >= READ_SHARE * best]
    looked = list(dict.fromkeys([*by_score, *named]))
    rows = memory.lookup(fact_ids[looked])
    facts = {
        at: ReadFact(
            int(fact_ids[at]), row["entity"], row["property"], row["value"], row["metadata"], float(scores[at])
        )
        for at, row in zip(looked, rows, strict=True)
    }
    words = _Words(memory, asked, about, questions, list(facts.values()), named=bool(named))
    own = {at: fact for at, fact in facts.items() if words.is_name(fact)}
    if own and words.is_exact and not words.is_follow_up and len(questions) > 1:
        # The earlier questions draw attention, too: what they were about is not what this one is about.
        facts, by_score = own, [at for at in by_score if at in own]
        best = max(fact.score for fact in own.values())
    least = {at: (NAME_SHARE if words.is_name(fact) else NAMED_SHARE) * best for at, fact in facts.items()}
    firsts = [at for at in words.best_of_each_entity(facts) if facts[at].score >= NAMED_SHARE * best]
    if not any(words.is_pair(fact) for fact in facts.values()):
        words.carry_over(memory, questions)
    pairs = [at for at in facts if facts[at].score >= least[at] and words.is_pair(facts[at])]
    # "What is AI?" asks for the description, unless attention says that it asks for something else.
    pairs = [at for at in pairs if words.properties or at in firsts]
    reached = {at for at, fact in facts.items() if fact.score >= NAMED_SHARE * best}
    whole = [at for at in reached if not words.properties and words.names_entity(facts[at])]
    # Named facts come first where there are too many; all are read in the order of their scores.
    chosen = [*_by_score(pairs, facts), *_by_score(firsts, facts), *by_score, *_by_score(whole, facts)]
    read = _by_score(list(dict.fromkeys(chosen))[:MAX_READ], facts)
    places = {at: place for place, at in enumerate(read)}
    asked_for, allowed, is_certain = _asked(read, facts, words, pairs, firsts)
    return Reading(
        tuple(facts[at] for at in read),
        tuple(places[at] for at in _in_order_of_question(asked_for, facts, words)),
        frozenset(places[at] for at in allowed),
        is_certain,
    )


def _about(memory: KnowledgeMemory, questions: Sequence[str], scores: np.ndarray) -> tuple[Wording, list[int]]:
    """The newest message that names an entity, and the facts of the entities that it names, best first."""
    for question in reversed(questions):
        named = np.flatnonzero(named_facts(memory, question))
        if len(named):
            named = named[np.argsort(-scores[named], kind="stable")][:MAX_NAMED]
            return Wording(question), named.tolist()
    return Wording(questions[-1] if questions else ""), []


class _Words:
    """What the question names: entities, in it or in the message it follows up, and properties.

    Attributes:
        entities, properties: mentions (span, normalized text), longest only.
        is_follow_up: the entities are named in an earlier message.
        is_other_entity: they are named in the last one, which takes the properties from an earlier one.
    """

    def __init__(
        self,
        memory: KnowledgeMemory,
        asked: Wording,
        about: Wording,
        questions: Sequence[str],
        facts: Sequence[ReadFact],
        *,
        named: bool,
    ) -> None:
        self._asked, self._about = asked, about
        self.is_follow_up = about.text != asked.text
        self.is_other_entity = False
        entities = {fact.entity for fact in facts}
        found = [(span, normalized(entity)) for entity in entities for span in about.mentions(entity)]
        if not found and facts:
            # Nobody is named exactly: the best fact's entity, misspelt.
            similarity, span = about.similarity(facts[0].entity)
            if similarity >= NEAR:
                found = [(span, normalized(facts[0].entity))]
        self.is_exact = named
        self.entities = longest(found)
        blocked: list[Span] = [] if self.is_follow_up else [span for span, _ in self.entities]
        self.properties = longest(
            (span, normalized(property))
            for property in named_properties(memory, questions[-1] if questions else "")
            for span in asked.mentions(property)
            # "the mass of High Mass": an entity's name may have a property's word in it.
            if not any(overlap(span, entity) and span != entity for entity in blocked)
        )
        strange = about.strange_words(span for span, _ in [*self.entities, *self._in_about()])
        self.is_extended = any(about.touches(span, strange) for span, _ in self.entities)

    def carry_over(self, memory: KnowledgeMemory, questions: Sequence[str]) -> None:
        """Take the properties from an earlier question if the last one is an entity only: "And of Peru?"."""
        rest = self._asked.text
        for start, end in sorted((span for span, _ in self.entities), reverse=True):
            rest = rest[:start] + " " + rest[end:]
        if self.is_follow_up or not (self.is_exact and self.entities) or not LINKS.issuperset(spelt(rest)):
            return
        for question in reversed(questions[:-1]):
            earlier = Wording(question)
            named = [(span, text) for text in named_properties(memory, question) for span in earlier.mentions(text)]
            if named:
                self.properties = [(span, normalized(text)) for span, text in longest(named)]
                self.is_other_entity = True
                return

    def _in_about(self) -> list[tuple[Span, str]]:
        return [] if self.is_follow_up else self.properties

    def names_entity(self, fact: ReadFact) -> bool:
        return any(text == normalized(fact.entity) for _, text in self.entities)

    def names_property(self, fact: ReadFact) -> bool:
        return any(text == normalized(fact.property) for _, text in self.properties)

    def is_pair(self, fact: ReadFact) -> bool:
        """Whether entity and property are named; a question that names no property asks for a description."""
        if not self.names_entity(fact):
            return False
        return self.names_property(fact) or (not self.properties and is_description(fact.property))

    def is_name(self, fact: ReadFact) -> bool:
        """Whether the question writes the fact's entity like a name: with capitals, digits, or letters without case."""
        return any(
            any(not letter.islower() for letter in self._about.text[slice(*span)] if letter.isalnum())
            for span, text in self.entities
            if text == normalized(fact.entity)
        )

    def best_of_each_entity(self, facts: dict[int, ReadFact]) -> list[int]:
        found: dict[str, int] = {}
        for at in _by_score(facts, facts):
            if self.names_entity(facts[at]):
                found.setdefault(normalized(facts[at].entity), at)
        return list(found.values())

    def place(self, fact: ReadFact) -> int:
        """Where the question names the fact's entity first; after all others where it does not."""
        places = [span[0] for span, text in self.entities if text == normalized(fact.entity)]
        return min(places, default=len(self._about.text))

    def gap(self, fact: ReadFact) -> int:
        """Letters between the nearest mentions of the fact's entity and its property."""
        gaps = [
            max(one[0] - other[1], other[0] - one[1], 0)
            for one, entity in self.entities
            for other, property in self.properties
            if entity == normalized(fact.entity) and property == normalized(fact.property)
        ]
        return min(gaps, default=len(self._asked.text))


def _asked(
    read: list[int], facts: dict[int, ReadFact], words: _Words, pairs: list[int], firsts: list[int]
) -> tuple[list[int], set[int], bool]:
    """The facts asked for, those that may be stated, and whether the question names the former."""
    best = facts[read[0]].score
    pairs = [at for at in read if at in pairs]
    if pairs:
        pairs = pairs if words.is_other_entity else _matched(pairs, facts, words)
        named = {normalized(facts[at].entity) for at in pairs}
        # "the capital of Ur and who founded Uruk": the second has no fact with entity and property named.
        others = [
            at
            for at in firsts
            if at in read and normalized(facts[at].entity) not in named and facts[at].score >= READ_SHARE * best
        ]
        asked = [*pairs, *others]
        is_certain = words.is_exact and not words.is_extended and not words.is_follow_up
        alike = set() if words.properties else {at for at in read if words.names_entity(facts[at])}
        return asked, set(asked) | alike, is_certain
    near = {at for at in read if facts[at].score >= ASKED_SHARE * best}
    firsts = [at for at in firsts if at in read and facts[at].score >= READ_SHARE * best]
    if words.properties or not firsts:
        chosen = [at for at in read if facts[at].pair == facts[read[0]].pair]
        return chosen, near | set(chosen), False
    least = {normalized(facts[at].entity): ASKED_SHARE * facts[at].score for at in firsts}
    asked = [at for at in read if facts[at].score >= least.get(normalized(facts[at].entity), np.inf)]
    same = {at for at in read if normalized(facts[at].entity) in least}
    return asked, near | same, False


def _matched(pairs: list[int], facts: dict[int, ReadFact], words: _Words) -> list[int]:
    """Of two entities and two properties, those facts that belong together: named nearest to each other."""
    entities = {normalized(facts[at].entity) for at in pairs}
    properties = {normalized(facts[at].property) for at in pairs}
    if len(entities) < 2 or len(properties) < 2:
        return pairs
    kept: list[tuple[str, str]] = []
    for at in sorted(pairs, key=lambda at: words.gap(facts[at])):
        entity, property = map(normalized, facts[at].pair)
        if all(entity != one and property != other for one, other in kept):
            kept.append((entity, property))
    # A property of two entities and another of one: what is left without a partner takes the nearest.
    for at in sorted(pairs, key=lambda at: words.gap(facts[at])):
        entity, property = map(normalized, facts[at].pair)
        if entity not in {one for one, _ in kept} or property not in {other for _, other in kept}:
            kept.append((entity, property))
    return [at for at in pairs if (normalized(facts[at].entity), normalized(facts[at].property)) in kept]


def _in_order_of_question(places: list[int], facts: dict[int, ReadFact], words: _Words) -> list[int]:
    return sorted(places, key=lambda at: (words.place(facts[at]), -facts[at].score))


def _by_score(places: Any, facts: dict[int, ReadFact]) -> list[int]:
    return sorted(places, key=lambda at: -facts[at].score)
