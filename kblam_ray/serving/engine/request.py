"""What is done for a request beside the engine: made ready before it writes, and concluded after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import ContextLengthError, InputError, UnsupportedParameterError
from kblam_ray.model.asking import Answer, Asked, check_number, generated_answer, prepared, render, verbatim_answer
from kblam_ray.model.grounding.verbatim import VerbatimReading
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.serving.engine.writing import VerbatimWriter, Writer
from kblam_ray.serving.messages import Choice, Question, Sampling


@dataclass(frozen=True)
class Prepared:
    """A question that the engine can write answers to.

    Attributes:
        read: for "verbatim" only.
        max_tokens: most that the base model writes.
        num_choices: answers that are wanted.
        num_written: answers that are written: one stands for all where nothing is left to chance.
    """

    asked: Asked
    read: VerbatimReading | None
    max_tokens: int
    num_choices: int
    num_written: int

    @property
    def num_prompt_tokens(self) -> int:
        return self.asked.num_prompt_tokens

    @cached_property
    def to_write(self) -> tuple[list[int], KnowledgeMemory | None]:
        """The prompt that the base model goes on with, and the facts that it attends to then; nothing: it writes
        nothing."""
        if self.read is not None:
            return self.read.prompt_ids, None
        return self.asked.prompt_ids[0].tolist(), self.asked.memory

    def choices_of(self, place: int) -> range:
        """Numbers of the choices that an answer written stands for."""
        return range(self.num_choices) if self.num_written == 1 else range(place, place + 1)


class Preparing:
    """Checks questions, and makes them ready.

    Args:
        room: tokens that prompt and answer have together.
        default_tokens: of an answer, where a request does not say.
    """

    def __init__(self, model: KnowledgeModel, room: int, default_tokens: int) -> None:
        self._model, self._room, self._default_tokens = model, room, default_tokens

    def prepare(self, question: Question, memory: KnowledgeMemory | None, selection: str) -> Prepared:
        """See `Engine.stream` for the errors. Runs the encoder and, for "verbatim", the base model."""
        sampling, model = question.sampling, self._model
        check_sampling(sampling)
        if question.grounding == "verbatim" and sampling.num_logprobs is not None:
            raise UnsupportedParameterError(
                "verbatim answers have no log probabilities: they state facts' texts, not the model's tokens",
                where="logprobs",
                help='leave logprobs out, or choose grounding "cite" or "off"',
            )
        asked = render(
            model,
            list(question.messages),
            memory,
            grounding=question.grounding,
            selection=selection,
            max_citations=question.max_citations,
        )
        max_tokens = self._max_tokens(asked.num_prompt_tokens, sampling.max_tokens)
        asked = prepared(model, asked, selection)
        num_written = sampling.num_choices if sampling.temperature > 0 else 1
        read = None
        if question.grounding == "verbatim":
            assert asked.memory is not None
            read = VerbatimReading(
                model,
                asked.messages,
                asked.memory,
                max_tokens,
                most_tokens=self._room,
                prompt_ids=asked.prompt_ids,
            )
            if not read.prompt_ids:
                num_written = 1
        return Prepared(asked, read, max_tokens, sampling.num_choices, num_written)

    def _max_tokens(self, num_prompt_tokens: int, asked_for: int | None) -> int:
        left = self._room - num_prompt_tokens
        if left < (asked_for or 1):
            answer = f"an answer of {asked_for or 1} tokens"
            raise ContextLengthError(
                f"a prompt of {num_prompt_tokens} tokens and {answer}, where {self._room} fit in together",
                where="messages",
                help="shorten the conversation, or lower max_tokens",
            )
        return min(self._default_tokens, left) if asked_for is None else asked_for


def check_sampling(sampling: Sampling) -> None:
    """Raises InputError for settings that no distribution has."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InputError(f"a temperature of {sampling.temperature}", where="temperature", help="give 0 or more")
    if not 0 <= sampling.top_p <= 1:
        raise InputError(f"top_p {sampling.top_p}", where="top_p", help="give a number from 0 to 1")
    check_number("n", sampling.num_choices, 1)
    if sampling.max_tokens is not None:
        check_number("max_tokens", sampling.max_tokens, 1)
    if sampling.num_logprobs is not None:
        check_number("top_logprobs", sampling.num_logprobs, 0)


def conclude(model: KnowledgeModel, ready: Prepared, writers: list[Writer]) -> list[Choice]:
    """The answers written, with citations and refusal. Runs the base model; equal answers are looked at once."""
    found: dict[tuple[int, ...] | str, Answer] = {}
    choices = []
    for writer in writers:
        if isinstance(writer, VerbatimWriter):
            key: tuple[int, ...] | str = writer.text
            if key not in found:
                found[key] = _verbatim(ready, writer)
            num_tokens = len(model.chat.tokenizer.encode(writer.text, add_special_tokens=False))
        else:
            key = tuple(writer.ids)
            if key not in found:
                answer_ids = torch.tensor([writer.ids], dtype=torch.int64, device=model.device)
                ids = torch.cat([ready.asked.prompt_ids, answer_ids], 1)
                found[key] = generated_answer(model, ready.asked, ids, writer.text)
            num_tokens = len(writer.ids)
        citations = tuple(citation.to_json() for citation in found[key].citations)
        assert writer.finish_reason is not None
        choices.append(
            Choice(
                writer.text,
                writer.finish_reason,
                found[key].refused,
                citations,
                num_tokens,
                tuple(writer.logprobs),
            )
        )
    return choices


def _verbatim(ready: Prepared, writer: VerbatimWriter) -> Answer:
    asked = ready.asked
    if writer.refused or not writer.text:
        return Answer(writer.text, (), writer.refused, asked.kb_version)
    assert ready.read is not None
    return verbatim_answer(asked, ready.read.answer(writer.text, writer.stated, needs_shares=asked.max_citations > 0))
