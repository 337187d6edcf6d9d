"""Training examples by number: a question or a text, the facts of its knowledge base, and what is right at each token.

Example i is a pure function of the facts, the settings and i, so that any worker can make it and a training that is
resumed begins where it stopped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import REFUSAL, Question
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.mix.labels import fact_of_token, value_ends
from kblam_ray.training.mix.proportions import Share, kinds
from kblam_ray.training.mix.questions import ATTEMPTS, Asked, TrainingQuestions
from kblam_ray.training.mix.rows import Neighbours
from kblam_ray.training.mix.settings import MixSettings
from kblam_ray.training.mix.texts import Conversation, Texts

TEXT = "text"
"""The kind of an example that is text in need of no fact."""

_PLANS_KEPT = 4
_SIZE, _ROWS = map(number_of, ("kb size", "kb rows"))


@dataclass(frozen=True, eq=False)
class Example:
    """One row of a training batch. Shape legend: T tokens, A answer tokens, M facts, W pairs of token and right fact.

    Attributes:
        number: of the example.
        kind: a kind of question, or `TEXT`.
        input_ids: int32 [T], the conversation with its answer and the token that ends it.
        answer_start: where the answer begins.
        kb_rows: int32 [M], rows of the maker's facts: the example's knowledge base.
        wanted_at: int32 [W], positions whose attention shall go to a fact: the one before each answer token that is
            written from a fact, the first of which is the last prompt token. A position may be named several times.
        wanted_places: int32 [W], the place in `kb_rows` of the right fact.
    """

    number: int
    kind: str
    input_ids: np.ndarray
    answer_start: int
    kb_rows: np.ndarray
    wanted_at: np.ndarray
    wanted_places: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 [T]: the token at each position of the answer, -100 elsewhere and everywhere in a text."""
        labels = np.full(len(self.input_ids), -100, np.int64)
        if self.kind != TEXT:
            labels[self.answer_start :] = self.input_ids[self.answer_start :]
        return labels

    @property
    def wanted(self) -> list[tuple[int, ...]]:
        """For each answer token the places in `kb_rows` of the facts that it is written from: mostly one, or none."""
        found: list[list[int]] = [[] for _ in range(len(self.input_ids) - self.answer_start)]
        for at, place in zip(self.wanted_at.tolist(), self.wanted_places.tolist(), strict=True):
            found[at + 1 - self.answer_start].append(place)
        return [tuple(places) for places in found]


@dataclass(frozen=True)
class _Step:
    """What the examples of one step have in common."""

    kinds: list[str]
    kb_size: int
    shared_rows: np.ndarray | None
    asked: dict[int, Asked]


class ExampleMaker:
    """Makes examples from the facts that are not held out.

    Copies of it in other processes make the same examples, and leave the embeddings behind: an example names its facts
    by row, and whoever trains has them.

    Args:
        facts: any embedded facts; those of held-out entities are left out here.
        chat: renders questions and answers for the base model.
        settings: what examples to make.
        refusal: the answer to an unanswerable question.
        texts: conversations in need of no fact, in place of the built-in ones; see `texts.read_texts`.

    Attributes:
        facts: the facts trained on, to which rows refer; None in a copy that was sent to another process.
        shares: the share of each kind of example that the facts allow.

    Raises:
        InputError: nothing is left to train on, or too few facts for the smallest knowledge base.
    """

    facts: EmbeddedFacts | None

    def __init__(
        self,
        facts: EmbeddedFacts,
        chat: ChatTemplate,
        settings: MixSettings,
        *,
        refusal: str = REFUSAL,
        texts: Sequence[Conversation] = (),
    ) -> None:
        train, out = facts.split(settings.held_out, settings.held_out_seed)
        self.facts, self.chat, self.settings = train, chat, settings
        if len(train) < settings.kb_size[0]:
            raise InputError(
                f"{len(train)} facts are left to train on, the smallest knowledge base has {settings.kb_size[0]}",
                where="kb_size",
                help="give more facts, hold out fewer, or begin with smaller knowledge bases",
            )
        self._facts: tuple[Fact, ...] = train.facts
        self._neighbours = Neighbours(self._facts, train.keys_MP)
        held_out = {fact.entity for fact in out.facts}
        self._questions = TrainingQuestions(self._facts, held_out, self._neighbours.of_entity, settings, refusal)
        self._texts = Texts(texts, settings.seed)
        self.shares = {kind: share * (1 - settings.text_share) for kind, share in self._questions.shares.items()}
        if settings.text_share:
            self.shares[TEXT] = settings.text_share
        self._steps: OrderedDict[int, _Step] = OrderedDict()

    def example(self, number: int) -> Example:
        """Example `number`, from 0; it belongs to step `number // batch_size`.

        Raises:
            InputError: no question of its kind can be asked within the longest example, or the chat template refuses.
        """
        step_number, place = divmod(number, self.settings.batch_size)
        step = self._step(step_number)
        kind = step.kinds[place]
        if kind == TEXT:
            return self._text(number, step)
        if number in step.asked:
            return self._render(number, kind, step.asked[number], step)
        for asked in self._questions.attempts(kind, number):
            example = self._render(number, kind, asked, step)
            if len(example.input_ids) <= self.settings.max_tokens:
                return example
        raise self._too_long(kind)

    def examples(self, numbers: Sequence[int]) -> list[Example]:
        """Several examples, in the order of their numbers given."""
        return [self.example(number) for number in numbers]

    def share(self, step: int, share: Share) -> list[Example]:
        """A worker's examples of a step, the shortest first, so that each of its micro-batches needs little padding.

        Raises:
            InputError: see `Share.numbers` and `example`.
        """
        found = self.examples(share.numbers(step, self.settings.batch_size))
        return sorted(found, key=lambda example: (len(example.input_ids), example.number))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "facts": None, "_steps": OrderedDict()}

    def _step(self, number: int) -> _Step:
        found = self._steps.get(number)
        if found is None:
            found = self._steps[number] = self._make_step(number)
            while len(self._steps) > _PLANS_KEPT:
                self._steps.popitem(last=False)
        return found

    def _make_step(self, number: int) -> _Step:
        settings = self.settings
        of_examples = kinds(self.shares, settings.batch_size, number, settings.seed)
        size = min(self.kb_size(number), len(self._facts))
        if settings.kb_per == "example":
            return _Step(of_examples, size, None, {})
        first = number * settings.batch_size
        asked = self._asked_together({first + place: kind for place, kind in enumerate(of_examples) if kind != TEXT})
        wanted = list(dict.fromkeys(row for each in asked.values() for row in each.question.facts))
        forbidden = frozenset().union(*(each.forbidden for each in asked.values()))
        pairs = [pair for each in asked.values() for pair in each.question.asked]
        draws = Draws(settings.seed, _ROWS, number)
        rows = self._neighbours.fill(wanted, pairs, forbidden, size, settings.hard_negatives, draws)
        return _Step(of_examples, size, rows, asked)

    def kb_size(self, step: int) -> int:
        """Facts in the knowledge bases of a step; fewer where so many are not there, more where more are wanted."""
        fewest, most = self.settings.kb_size
        if step < self.settings.kb_growth_steps:
            most = round(fewest * (most / fewest) ** (step / self.settings.kb_growth_steps))
        point = Draws(self.settings.seed, _SIZE, step).below(1 << 32) / (1 << 32)
        return min(most, int(fewest * ((most + 1) / fewest) ** point))

    def _asked_together(self, kind_of: dict[int, str]) -> dict[int, Asked]:
        """Questions whose facts may stand in one knowledge base: what one wants is forbidden by none."""
        asked: dict[int, Asked] = {}
        wanted: set[int] = set()
        forbidden: set[int] = set()
        # The unanswerable ones last: they are the ones that can yield.
        for number, kind in sorted(kind_of.items(), key=lambda item: item[1] == "unanswerable"):
            for each in self._questions.attempts(kind, number):
                clashes = not wanted.isdisjoint(each.forbidden) or not forbidden.isdisjoint(each.question.facts)
                if not clashes and self._fits(each.question):
                    asked[number] = each
                    wanted.update(each.question.facts)
                    forbidden.update(each.forbidden)
                    break
            else:
                raise self._too_long(kind)
        return asked

    def _fits(self, question: Question) -> bool:
        ids, _ = self.chat.render_with_answer(question.messages, question.answer)
        return len(ids) <= self.settings.max_tokens

    def _too_long(self, kind: str) -> InputError:
        return InputError(
            f"none of {ATTEMPTS} {kind} questions fits: into {self.settings.max_tokens} tokens, beside the others",
            where="max_tokens",
            help="allow longer examples, or leave the kind out",
        )

    def _render(self, number: int, kind: str, asked: Asked, step: _Step) -> Example:
        question = asked.question
        ids, answer_start = self.chat.render_with_answer(question.messages, question.answer)
        if step.shared_rows is None:
            draws = Draws(self.settings.seed, _ROWS, number)
            share = self.settings.hard_negatives
            rows = self._neighbours.fill(question.facts, question.asked, asked.forbidden, step.kb_size, share, draws)
        else:
            rows = step.shared_rows
        wanted_at, wanted_rows = self._wanted(question, ids, answer_start)
        order = np.argsort(rows, kind="stable")
        places = order[np.searchsorted(rows, np.array(wanted_rows, rows.dtype), sorter=order)]
        return _example(number, kind, ids, answer_start, rows, wanted_at, places)

    def _wanted(self, question: Question, ids: list[int], answer_start: int) -> tuple[list[int], list[int]]:
        """Positions and the rows of the facts that each of them shall attend to."""
        if not question.facts:
            return [], []
        has_end = bool(ids) and ids[-1] == self.chat.end_of_turn_id
        answer_ids = ids[answer_start : len(ids) - has_end]
        ends = value_ends(question, self._facts)
        sources = fact_of_token(self.chat.tokenizer, answer_ids, question.answer, ends)
        if question.kind == "open_ended":
            first = list(question.facts)
        else:
            pair = question.asked[0]
            first = [row for row in question.facts if (self._facts[row].entity, self._facts[row].property) == pair]
        positions, rows = [answer_start - 1] * len(first), first
        for token, source in enumerate(sources):
            if token and source is not None:
                positions.append(answer_start + token - 1)
                rows.append(question.facts[source])
        return positions, rows

    def _text(self, number: int, step: _Step) -> Example:
        settings = self.settings
        text = self._texts[number]
        # Cut before it is made tokens, few of which have more letters than this: a text may be a whole book.
        reply = text.reply[: settings.max_tokens * 16]
        ids, answer_start = self.chat.render_with_answer(list(text.messages), reply)
        if step.shared_rows is None:
            rows = self._neighbours.fill((), (), (), step.kb_size, 0.0, Draws(settings.seed, _ROWS, number))
        else:
            rows = step.shared_rows
        ids = ids[: settings.max_tokens]
        return _example(number, TEXT, ids, min(answer_start, len(ids)), rows, [], [])


def _example(
    number: int,
    kind: str,
    ids: Sequence[int],
    answer_start: int,
    rows: np.ndarray,
    wanted_at: Sequence[int],
    wanted_places: np.ndarray | Sequence[int],
) -> Example:
    return Example(
        number,
        kind,
        np.asarray(ids, np.int32),
        answer_start,
        rows,
        np.asarray(wanted_at, np.int32),
        np.asarray(wanted_places, np.int32),
    )
