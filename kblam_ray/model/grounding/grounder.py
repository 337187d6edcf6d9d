"""Hold an answer to the facts that were read: every value it states is a fact's exact text, or is made so.

An answer is taken apart into units: sentences, whose ends are not looked for inside of a fact's own text. A unit
stands as it is if it states values of facts that may be stated, letter for letter, each beside its own entity and
property, and otherwise has words of the question, of those facts and of grammar only. Any other unit gives way to the
sentences that state the facts it is nearest to, or to nothing. Facts that are asked for and were not stated are stated
at the end.

It takes a text in pieces of any size and gives back pieces that are never taken back: whatever the cuts, the pieces
make the same text. An answer that begins with the sentence of a fact is known when its value is due: the value is given
then, before the model has spelt it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kblam_ray.facts.questions.forms import answer_sentence
from kblam_ray.model.grounding.support import PUNCTUATION, Support, occurrences
from kblam_ray.model.mentions import normalized
from kblam_ray.model.naming import NEAR, Span, Wording, longest, overlap
from kblam_ray.model.refusal import plain

if TYPE_CHECKING:
    from kblam_ray.model.grounding.selection import Reading

_END = re.compile(r"[.!?](?=\s)|[。！？\n]")
_PLACE = "\ue000"
_SIGN = rf"[^\w\s{_PLACE}{re.escape(''.join(sorted(PUNCTUATION)))}]"
_CHANGED = re.compile(rf"{_SIGN}{_PLACE}|{_PLACE}{_SIGN}|[0-9][.,]{_PLACE}|{_PLACE}[.,][0-9]")
"""A sign or digits directly at a value's text make another value of it: "-34", "34%", "34.5"."""


@dataclass(frozen=True)
class Grounded:
    """A grounded answer.

    Attributes:
        text: what is said; empty if there is nothing to say.
        stated: places in the reading of the facts whose values the text states, in its order.
        refused: the model refused, and the question does not name what the facts tell.
    """

    text: str
    stated: tuple[int, ...]
    refused: bool


def ground(text: str, reading: Reading, question: str | Sequence[str], refusal_text: str) -> Grounded:
    """An answer, held to the facts that were read.

    Args:
        text: what the model wrote, having read them.
        question: what the user said: one message or several.
        refusal_text: what the model says when no fact applies.
    """
    grounder = Grounder(reading, question, refusal_text)
    grounded = grounder.feed(text) + grounder.finish()
    return Grounded(grounded, tuple(grounder.stated), grounder.refused)


class Grounder:
    """Grounds one answer as it is written, see `ground`.

    Attributes:
        stated: places of the facts stated so far.
        refused: see `Grounded`; nothing more is said then.
    """

    def __init__(self, reading: Reading, question: str | Sequence[str], refusal_text: str) -> None:
        questions = [question] if isinstance(question, str) else list(question)
        self._reading, self._questions = reading, questions
        self._facts = reading.facts
        self._refusal = plain(refusal_text)
        self.stated: list[int] = []
        self.refused = False
        self._held = ""
        self._said = False
        self._is_swallowing = False
        # What a sentence may not be cut in: a name or value has full stops of its own.
        texts = {text for fact in self._facts for text in (fact.value, fact.entity, fact.property)}
        self._phrases = sorted(texts, key=len, reverse=True)
        self._frames = {_frame(self._facts[at].pair): at for at in reading.allowed if self._is_framed(at)}

    def feed(self, piece: str) -> str:
        """Take the next piece of the model's text; give what can be said now, which may be nothing."""
        self._held += piece
        return self._release(is_over=False)

    def finish(self) -> str:
        """The rest, once the model's text is over: what was held back, and facts asked for that were not stated."""
        text = self._release(is_over=True)
        if self.refused:
            return text
        return text + self._say(self._state(self._unstated()))

    def _unstated(self) -> list[int]:
        stated = {self._facts[at].pair for at in self.stated}
        entities = {normalized(entity) for entity, _ in stated}
        num_entities = len({normalized(self._facts[at].entity) for at in self._reading.asked})
        if entities and num_entities < 2 and not self._reading.is_certain:
            return []
        return [
            at
            for at in self._reading.asked
            if at not in self.stated
            # Where words do not decide, the model's choice among an entity's facts stands.
            and (self._reading.is_certain or normalized(self._facts[at].entity) not in entities)
        ]

    def _release(self, *, is_over: bool) -> str:
        said = ""
        while self._held.strip() and not self.refused:
            if not self._is_swallowing:
                self._held = self._held.lstrip()
                begun = self._begin(is_over=is_over)
                if begun is None:
                    break
                said += begun
                if self.refused:
                    break
            end = self._unit_end(is_over=is_over)
            if end is None:
                break
            unit, self._held = self._held[:end], self._held[end:]
            if not self._is_swallowing:
                said += self._judge(unit.strip())
            self._is_swallowing = False
        if is_over or self.refused:
            self._held = ""
        return said

    def _begin(self, *, is_over: bool) -> str | None:
        """What can be said at the beginning of a unit: the sentence whose value is due, or nothing; None: wait."""
        held = self._held
        if not self.stated and not self._reading.is_certain and self._refusal:
            said = plain(held)
            if said.startswith(self._refusal):
                self.refused = True
                return ""
            if not is_over and self._refusal.startswith(said):
                return None
        frames = [frame for frame in self._frames if held.startswith(frame)]
        if not is_over and any(frame.startswith(held) and frame != held for frame in self._frames):
            return None
        if not frames:
            return ""
        place = self._frames[max(frames, key=len)]
        # The model may have more to say, or garble the value: both are heard out and dropped.
        self._is_swallowing = True
        return self._say(self._state([place]))

    def _is_framed(self, place: int) -> bool:
        fact = self._facts[place]
        return answer_sentence(fact.entity, fact.property, [fact.value]).startswith(_frame(fact.pair))

    def _unit_end(self, *, is_over: bool) -> int | None:
        held = self._held
        inside = [span for phrase in self._phrases for span in occurrences(held, phrase)]
        for match in _END.finditer(held):
            at = match.start()
            if not is_over and self._may_be_inside(at):
                return None
            if not any(start <= at < end - 1 for start, end in inside):
                return match.end()
        return len(held) if is_over else None

    def _may_be_inside(self, at: int) -> bool:
        """Whether a phrase that is being spelt may reach beyond a place."""
        held = self._held
        for phrase in self._phrases:
            for start in range(max(0, len(held) - len(phrase) + 1), at + 1):
                if len(phrase) > len(held) - start and phrase.startswith(held[start:]):
                    return True
            # The letter after a phrase says whether it ends there.
            if held.endswith(phrase) and len(held) - len(phrase) <= at < len(held) - 1:
                return True
        return False

    def _judge(self, unit: str) -> str:
        if not unit:
            return ""
        spans = self._values_in(unit)
        chosen = self._attributed(unit, spans)
        if spans and chosen is not None and self._rests_on(unit, spans, chosen):
            if all(at in self.stated for at in chosen):
                return ""
            if all(self._is_framed(at) for at in chosen):
                self.stated += [at for at in dict.fromkeys(chosen) if at not in self.stated]
                return self._say(unit)
            return self._say(self._state(chosen))
        return self._say(self._state(self._nearest(unit, spans)))

    def _values_in(self, unit: str) -> list[tuple[Span, list[int]]]:
        """Exact values in a unit, longest first where they overlap, in the order of the text."""
        names = [span for fact in self._facts for name in fact.pair for span in occurrences(unit, name)]
        by_value: dict[str, list[int]] = {}
        for place, fact in enumerate(self._facts):
            by_value.setdefault(fact.value, []).append(place)
        found: list[tuple[Span, list[int]]] = []
        for value in sorted(by_value, key=len, reverse=True):
            for span in occurrences(unit, value):
                # "Paris" is not stated where "Paris Hilton" is spoken of.
                is_of_name = any(name[0] <= span[0] and span[1] <= name[1] and name != span for name in names)
                if not is_of_name and not any(overlap(span, other) for other, _ in found):
                    found.append((span, by_value[value]))
        return sorted(found)

    def _attributed(self, unit: str, spans: list[tuple[Span, list[int]]]) -> list[int] | None:
        """The facts whose values a unit states; None if a value stands beside another's entity or property."""
        rest = Wording(_blanked(unit, [span for span, _ in spans], f" {_PLACE} "))
        entities = _mentions(rest, {fact.entity for fact in self._facts})
        properties = _mentions(rest, {fact.property for fact in self._facts}, but=[span for span, _ in entities])
        chosen = []
        for place, (_, candidates) in zip(_places(rest.text), spans, strict=True):
            fitting = [
                at
                for at in candidates
                if at in self._reading.allowed
                and _beside(place, entities, self._facts[at].entity)
                and _beside(place, properties, self._facts[at].property)
            ]
            if not fitting:
                return None
            chosen.append(next((at for at in fitting if at in self._reading.asked), fitting[0]))
        # A value that is a name, too, may stand for either: "The capital of Luxembourg is Paris".
        names = {normalized(fact.entity) for fact in self._facts}
        if len(set(chosen)) > 1 and any(normalized(self._facts[at].value) in names for at in chosen):
            return None
        return chosen

    def _rests_on(self, unit: str, spans: list[tuple[Span, list[int]]], chosen: list[int]) -> bool:
        texts = [text for at in chosen for text in (*self._facts[at].pair, self._facts[at].value)]
        rest = _blanked(unit, [span for span, _ in spans], _PLACE)
        return not _CHANGED.search(rest) and Support([*self._questions, *texts, _PLACE]).holds(rest)

    def _nearest(self, unit: str, spans: list[tuple[Span, list[int]]]) -> list[int]:
        """The facts that a unit is nearest to, of those that may be stated and are not yet."""
        said = Wording(unit)
        free = [at for at in sorted(self._reading.allowed) if at not in self.stated]
        exact = {at for _, candidates in spans for at in candidates}
        named = {at for at in free if said.names(self._facts[at].entity)}
        garbled = {at for at in free if at not in exact and said.similarity(self._facts[at].value)[0] >= NEAR}
        near = (exact | garbled) & (named or set(free))
        if not near and self._reading.is_certain:
            near = named
        return [at for at in (*self._reading.asked, *free) if at in near and at in free]

    def _state(self, places: Iterable[int]) -> str:
        """The sentences that state facts, those of one entity and property in one; they count as stated."""
        pairs: dict[tuple[str, str], None] = dict.fromkeys(self._facts[at].pair for at in places)
        sentences = []
        for pair in pairs:
            members = [at for at in sorted(self._reading.allowed) if self._facts[at].pair == pair]
            new = [at for at in members if at not in self.stated]
            if new:
                self.stated += new
                sentences.append(answer_sentence(*pair, [self._facts[at].value for at in new]))
        return " ".join(sentences)

    def _say(self, text: str) -> str:
        """Text with a blank before it where something was said before."""
        if not text:
            return ""
        blank = " " if self._said else ""
        self._said = True
        return blank + text


def _frame(pair: tuple[str, str]) -> str:
    """What comes before the value in the sentence that states a fact."""
    entity, property = pair
    return f"The {property} of {entity} is "


def _blanked(unit: str, spans: Sequence[Span], mark: str) -> str:
    """A unit with a mark in the place of each span."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [unit[end:start], mark]
        end = stop
    return "".join([*pieces, unit[end:]])


def _places(text: str) -> list[int]:
    return [match.start() for match in re.finditer(_PLACE, text)]


def _mentions(rest: Wording, phrases: Iterable[str], but: Sequence[Span] = ()) -> list[tuple[Span, str]]:
    found = [(span, normalized(phrase)) for phrase in phrases for span in rest.mentions(phrase)]
    return sorted((span, phrase) for span, phrase in longest(found) if not any(overlap(span, other) for other in but))


def _beside(place: int, mentions: list[tuple[Span, str]], phrase: str) -> bool:
    """Whether the nearest mention before a value, else the nearest after it, is of this phrase; true without any."""
    before = [text for (_, end), text in mentions if end <= place]
    after = [text for (start, _), text in mentions if start > place]
    nearest = before[-1] if before else after[0] if after else None
    return nearest is None or nearest == normalized(phrase)
