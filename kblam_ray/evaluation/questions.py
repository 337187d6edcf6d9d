"""The knowledge base and the questions of one evaluation: drawn from facts by a seed, or a user's own questions.

A draw takes whole entities as far as the number allows, since what makes retrieval hard is the other facts of the same
entity. Every question is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import pyarrow as pa

from kblam_ray.errors import InputError
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.facts.questions import Question, QuestionMaker
from kblam_ray.facts.questions.maker import QuestionKind, Reason
from kblam_ray.facts.split import is_held_out
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.model.chat import Message
from kblam_ray.model.mentions import EntityIndex
from kblam_ray.table.embedded import EmbeddedFacts

REASONS: tuple[Reason, ...] = ("same_entity", "same_property", "unknown_entity")

TRIES_PER_QUESTION = 40
"""Numbers tried for each question wanted, before fewer are asked: most often the same question came again."""

_ORDER = number_of("evaluation order")


@dataclass(frozen=True)
class Asked:
    """One question as a model is asked it, and what is right.

    Attributes:
        kind: of the question; `own` for a user's.
        messages: the conversation, the user's question last.
        should_answer: whether the facts answer it; None where nobody said.
        wanted: rows of the facts it takes; empty where there are none or nobody said.
        values: what a right answer states; empty likewise.
        names: entities and properties asked for.
        reason: why there is no answer.
        sentence: a right answer as a sentence; None where nobody wrote one.
        num_values: how many of the values each entity and property asked for has, see `metrics.exact_match`.
    """

    kind: str
    messages: tuple[Message, ...]
    should_answer: bool | None
    wanted: tuple[int, ...] = ()
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    reason: str | None = None
    sentence: str | None = None
    num_values: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]

    @property
    def given(self) -> str:
        """All that was said before the answer."""
        return "\n".join(message["content"] for message in self.messages)

    @classmethod
    def of(cls, question: Question) -> Asked:
        """A question of `QuestionMaker`; its facts are rows."""
        return cls(
            kind=question.kind,
            messages=tuple(question.messages),
            should_answer=bool(question.facts),
            wanted=question.facts,
            values=question.values,
            sentence=question.answer if question.facts else None,
            names=tuple(name for pair in question.asked for name in pair),
            reason=question.reason,
            num_values=question.num_values,
        )


@dataclass(frozen=True)
class EvaluationSet:
    """A knowledge base and the questions asked of it.

    Attributes:
        facts: the knowledge base; row m is fact m of its memory.
        questions: those that have an answer kind by kind, then those that have none.
        left_out: kinds, and reasons why there is no answer, of which fewer were asked than wanted, and why.
    """

    facts: EmbeddedFacts
    questions: tuple[Asked, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def draw(
        cls, pool: EmbeddedFacts, num_facts: int | None, settings: EvaluationSettings, *, refusal: str
    ) -> EvaluationSet:
        """Draw facts and make questions about them: the same for the same pool, number, settings and seed.

        Args:
            pool: where facts are drawn from.
            num_facts: how many; None: all of them.
            settings: kinds, numbers, held-out share and seed. With a held-out share, facts of the entities to ask
                about, held out or trained on, are taken first; others only fill up, and nothing is asked about them.
            refusal: the answer where no fact applies.

        Raises:
            InputError: the pool has not so many facts, or nothing can be asked about it.
        """
        is_asked = _asked_about(settings)
        facts = pool if num_facts is None else pool.take(drawn_rows(pool, num_facts, settings.seed, is_asked))
        if not len(facts):
            raise InputError("there are no facts to ask about", where="facts", help="give a table that has some")
        source = _Source(facts, is_asked, settings, refusal)
        possible = source.maker.possible_kinds()
        left_out: dict[str, str] = {
            kind: "the facts do not allow it" for kind in settings.kinds if kind not in possible
        }
        questions: list[Question] = []
        for kind in (kind for kind in possible if kind in settings.kinds and kind != "unanswerable"):
            found = list(islice(source.questions(kind, settings.num_questions), settings.num_questions))
            _note(left_out, kind, len(found), settings.num_questions)
            questions += found
        if not questions:
            raise InputError(
                f"no question of the kinds {', '.join(settings.kinds)} can be asked about the facts",
                where="kinds",
                help="add `simple`",
            )
        if "unanswerable" in settings.kinds:
            questions += _unanswerable(source, round(settings.unanswerable * len(questions)), left_out)
        return cls(facts, tuple(map(Asked.of, questions)), left_out)


def drawn_rows(pool: EmbeddedFacts, num_facts: int, seed: int, is_asked: Callable[[str], bool]) -> list[int]:
    """Rows of `num_facts` facts: entities in an order of the seed, those to ask about first, each whole if it fits.

    Raises:
        InputError: there are not so many facts.
    """
    if num_facts > len(pool):
        raise InputError(
            f"{num_facts} facts of {len(pool)}", where="num_facts", help="ask for fewer, or leave the number out: all"
        )
    rows_of: dict[str, list[int]] = {}
    for row, fact in enumerate(pool.facts):
        rows_of.setdefault(fact.entity, []).append(row)
    order = sorted(rows_of, key=lambda name: (not is_asked(name), Draws(seed, _ORDER, number_of(name)).below(1 << 32)))
    chosen: list[int] = []
    too_large: list[int] = []
    for entity in order:
        rows = rows_of[entity]
        if len(chosen) + len(rows) <= num_facts:
            chosen += rows
        elif not too_large:
            too_large = rows
        if len(chosen) == num_facts:
            break
    return sorted(chosen + too_large[: num_facts - len(chosen)])


def _asked_about(settings: EvaluationSettings) -> Callable[[str], bool]:
    """Whether an entity is one to ask about."""
    share, seed, wants_held_out = settings.held_out, settings.held_out_seed, settings.entities == "held_out"
    if share is None and not wants_held_out:
        raise InputError(
            "entities trained on, and no share that was held out",
            where="entities",
            help="give held_out, the share of entities that training held out",
        )
    return lambda entity: share is None or is_held_out(entity, share, seed) == wants_held_out


class _Source:
    """Questions about the facts of some entities, in a knowledge base that may hold others."""

    def __init__(
        self, facts: EmbeddedFacts, is_asked: Callable[[str], bool], settings: EvaluationSettings, refusal: str
    ) -> None:
        self._rows = [row for row, fact in enumerate(facts.facts) if is_asked(fact.entity)]
        if not self._rows:
            is_held = settings.entities == "held_out"
            raise InputError(
                "none of the entities is held out" if is_held else "all of the entities are held out",
                where="held_out",
                help=f"give a {'larger' if is_held else 'smaller'} share, or more facts",
            )
        self.maker = QuestionMaker([facts.facts[row] for row in self._rows], settings.seed, refusal=refusal)
        self._others: EntityIndex | None = None
        self._pairs: set[tuple[str, str]] = set()
        if len(self._rows) < len(facts):
            self._others = EntityIndex(pa.table({"entity": [fact.entity for fact in facts.facts]}))
            self._pairs = {(fact.entity.casefold(), fact.property.casefold()) for fact in facts.facts}

    def questions(self, kind: QuestionKind, wanted: int) -> Iterator[Question]:
        """Different questions of a kind, as many as are found in a number of tries that grows with those wanted."""
        seen: set[tuple[str, ...]] = set()
        for number in range(wanted * TRIES_PER_QUESTION):
            try:
                question = self.maker.make(kind, number)
            except InputError:
                # A draw can fail where the kind is possible: a name too short to misspell, an entity with everything.
                continue
            words = (*question.context, question.text)
            if words not in seen and not self._is_about_others(question):
                seen.add(words)
                yield replace(question, facts=tuple(self._rows[row] for row in question.facts))

    def _is_about_others(self, question: Question) -> bool:
        """Whether facts that the maker did not see change what is right."""
        if self._others is None:
            return False
        if question.kind == "unanswerable":
            return any((entity.casefold(), name.casefold()) in self._pairs for entity, name in question.asked)
        # One letter off, a name may be another entity's.
        return question.kind == "misspelt" and bool(len(self._others.named_in(question.text)))


def _unanswerable(source: _Source, wanted: int, left_out: dict[str, str]) -> list[Question]:
    """As many for each reason as can be had, in turn, so that every beginning of the list has all reasons."""
    quota = {reason: wanted // 3 + (place < wanted % 3) for place, reason in enumerate(REASONS)}
    by_reason: dict[Reason, list[Question]] = {reason: [] for reason in REASONS}
    missing = wanted
    for question in source.questions("unanswerable", 3 * wanted):
        if question.reason is not None and len(by_reason[question.reason]) < quota[question.reason]:
            by_reason[question.reason].append(question)
            missing -= 1
        if not missing:
            break
    for reason, group in by_reason.items():
        _note(left_out, f"unanswerable: {reason}", len(group), quota[reason])
    most = max(map(len, by_reason.values()), default=0)
    return [group[place] for place in range(most) for group in by_reason.values() if place < len(group)]


def _note(left_out: dict[str, str], what: str, found: int, wanted: int) -> None:
    if found < wanted:
        left_out[what] = f"{found} of {wanted}: the facts allow no more different ones" if found else "none possible"
