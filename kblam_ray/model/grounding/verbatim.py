"""Answer verbatim: read the facts that the prompt attends to most, and state nothing but their text.

The prompt runs once with knowledge: its attention ranks the facts and decides whether they answer at all. The base
model then answers a second prompt in which they are written out. That pass has no knowledge attention: the letters
stand in the text, while a value vector holds their gist and would draw the copy away from them; and without it the pass
is the plain base model, whatever engine runs it. What it writes is held to the facts by `grounder`, so that the answer
is right where the right fact was ranked first, however poorly the base model copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import PromptTrace
from kblam_ray.attention.trace import mean_shares
from kblam_ray.errors import InputError
from kblam_ray.facts.questions.forms import answer_sentence
from kblam_ray.model.chat import Message
from kblam_ray.model.generation import answer_length, generate_answer, trained_positions
from kblam_ray.model.grounding.grounder import Grounder
from kblam_ray.model.grounding.reading import reading_message
from kblam_ray.model.grounding.selection import ReadFact, Reading, choose
from kblam_ray.model.mentions import check_texts
from kblam_ray.model.refusal import features, statistic, user_texts
from kblam_ray.model.token_text import TokenText

if TYPE_CHECKING:
    from kblam_ray.model.knowledge_model import KnowledgeModel


@dataclass(frozen=True)
class VerbatimAnswer:
    """A grounded answer, the facts whose values it states, each with its share of the attention, and the refusal."""

    text: str
    facts: tuple[tuple[ReadFact, float], ...]
    refused: bool


class VerbatimReading:
    """What is known of a verbatim answer before the base model writes: the facts to read, or that none answers.

    Attributes:
        prompt_ids: what the base model is given, without knowledge. Empty where it need not write: the answer is the
            refusal then, or what the facts alone say.
        refused: no fact is attended to enough, or there is none.

    Args:
        request_memory: what `KnowledgeModel.prepare` gives for the conversation.
        max_new_tokens: most that the model will write; a value that it does not finish is stated as a whole.
        most_tokens: room for prompt and answer where it is less than the base model's positions.
        prompt_ids: of the conversation itself, int64 [1, T], where they are at hand.

    Raises:
        InputError: the memory has no texts, or the conversation no message of the user.
    """

    def __init__(
        self,
        model: KnowledgeModel,
        messages: Sequence[Message],
        request_memory: KnowledgeMemory,
        max_new_tokens: int,
        *,
        most_tokens: int | None = None,
        prompt_ids: torch.Tensor | None = None,
    ) -> None:
        check_texts(request_memory)
        self._model, self._messages, self._memory = model, messages, request_memory
        self._questions = user_texts(messages)
        if not self._questions:
            raise InputError("the conversation has no message of the user", where="messages", help="ask something")
        if prompt_ids is None:
            prompt_ids = torch.tensor([model.chat.render(messages)], device=model.device)
        self._conversation_ids = prompt_ids
        self.prompt_ids: list[int] = []
        self._reading: Reading | None = None
        self._trace: PromptTrace | None = None
        self._shares: dict[str, torch.Tensor] = {}
        self.refused = not self._attends()
        if not self.refused:
            assert self._trace is not None
            chosen = choose(request_memory, self._trace.evidence.scores_M, self._questions)
            self._reading, self.prompt_ids = reading_prompt(model, messages, chosen, max_new_tokens, most_tokens)

    def _attends(self) -> bool:
        model, config = self._model, self._model.adapter.config
        if not self._memory.num_facts:
            return False
        self._trace = PromptTrace(model.attachment, self._conversation_ids, self._memory)
        if config.refusal_threshold is None:
            return True
        found = features(model, self._trace.evidence, self._memory, self._messages)
        return statistic(config, found) >= config.refusal_threshold

    def grounder(self) -> Grounder:
        """What holds one answer to the facts read."""
        assert self._reading is not None, "nothing is read for a refusal"
        return Grounder(self._reading, self._questions, self._model.adapter.config.refusal_text)

    def is_all_said(self, grounder: Grounder, num_written: int) -> bool:
        """Whether nothing that the model may still write can be stated: the answer is complete.

        Args:
            num_written: tokens that it wrote; after many more than the facts need, it has lost its way.
        """
        assert self._reading is not None
        if grounder.refused or self._reading.allowed <= set(grounder.stated):
            return True
        return num_written >= self._enough_tokens

    @cached_property
    def _enough_tokens(self) -> int:
        """Twice as many as it takes to state the facts that may be meant, or to refuse."""
        reading, config = self._reading, self._model.adapter.config
        assert reading is not None
        meant = [reading.facts[place] for place in (reading.asked if reading.is_certain else reading.allowed)]
        stating = " ".join(answer_sentence(fact.entity, fact.property, [fact.value]) for fact in meant)
        encode = self._model.chat.tokenizer.encode
        return 2 * max(len(encode(text, add_special_tokens=False)) for text in (stating, config.refusal_text))

    def value(self, place: int) -> str:
        """Of the fact at a place among those that are read."""
        assert self._reading is not None
        return self._reading.facts[place].value

    def answer(self, text: str, stated: Sequence[int], *, needs_shares: bool = True) -> VerbatimAnswer:
        """The answer with its facts' shares of the attention, largest first.

        Args:
            text: what the grounder said; empty for a refusal.
            stated: the grounder's.
            needs_shares: False leaves the facts out, and saves a forward pass.
        """
        if self.refused or not text:
            return VerbatimAnswer(self._model.adapter.config.refusal_text, (), True)
        if not needs_shares:
            return VerbatimAnswer(text, (), False)
        assert self._reading is not None
        shares_M = self._shares_of(text)
        fact_ids, facts = self._memory.fact_ids, [self._reading.facts[place] for place in stated]
        shares = [float(shares_M[int((fact_ids == fact.fact_id).argmax())]) for fact in facts]
        ranked = sorted(zip(facts, shares, strict=True), key=lambda pair: -pair[1])
        return VerbatimAnswer(text, tuple(ranked), False)

    def _shares_of(self, text: str) -> torch.Tensor:
        if text not in self._shares:
            answer_ids = _answer_ids(self._model, self._messages, text, self._conversation_ids)
            if self._trace is not None:
                # Its cache is used up by the first answer.
                trace, self._trace = self._trace, None
                self._shares[text] = trace.answer(answer_ids)
            else:
                ids, start = torch.cat([self._conversation_ids, answer_ids], 1), self._conversation_ids.shape[1]
                self._shares[text] = mean_shares(self._model.attachment, ids, self._memory, start)
        return self._shares[text]


def answer_verbatim(
    model: KnowledgeModel, messages: Sequence[Message], request_memory: KnowledgeMemory, max_new_tokens: int
) -> VerbatimAnswer:
    """Answer the last message of the user from the facts alone; the arguments are `VerbatimReading`'s."""
    read = VerbatimReading(model, messages, request_memory, max_new_tokens)
    if read.refused:
        return read.answer("", ())
    writing = _Writing(model, read)
    if read.prompt_ids:
        prompt_ids = torch.tensor([read.prompt_ids], device=model.device)
        written = generate_answer(
            model, prompt_ids, None, max_new_tokens, stopping_criteria=StoppingCriteriaList([writing])
        )
        writing.take(written, is_over=True)
    grounder = writing.grounder
    said = writing.said + grounder.finish()
    return read.answer("" if grounder.refused else said, grounder.stated)


class _Writing(StoppingCriteria):
    """Grounds an answer while it is generated, and ends it when nothing more can be stated."""

    def __init__(self, model: KnowledgeModel, read: VerbatimReading) -> None:
        self._model, self._read, self._text = model, read, TokenText(model.chat.tokenizer)
        self._num_taken = 0
        self.grounder = read.grounder()
        self.said = ""

    def take(self, ids: torch.Tensor, *, is_over: bool = False) -> None:
        """All tokens so far, int64 [1, T]."""
        answer_A = ids[0, len(self._read.prompt_ids) :]
        new = answer_A[self._num_taken : answer_length(self._model, answer_A)].tolist()
        self._num_taken += len(new)
        self.said += self.grounder.feed(self._text.finish(new) if is_over else self._text.feed(new))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.take(input_ids)
        return torch.tensor([self._read.is_all_said(self.grounder, self._num_taken)], device=input_ids.device)


def reading_messages(messages: Sequence[Message], facts: Sequence[ReadFact]) -> list[Message]:
    """The conversation with the facts before the user's last question, and all that follows it left out."""
    last = max(place for place, message in enumerate(messages) if message.get("role") == "user")
    content = reading_message([fact.texts() for fact in facts], messages[last]["content"])
    return [*messages[:last], {"role": "user", "content": content}]


def reading_prompt(
    model: KnowledgeModel,
    messages: Sequence[Message],
    reading: Reading,
    max_new_tokens: int,
    most_tokens: int | None = None,
) -> tuple[Reading, list[int]]:
    """As much of the reading as the base model's positions hold, and its prompt; no prompt if not one fact fits.

    Args:
        most_tokens: room for prompt and answer where it is less than the base model's positions.
    """
    most = min((room for room in (trained_positions(model), most_tokens) if room is not None), default=None)
    fitting: Reading | None = reading
    while fitting is not None:
        ids = model.chat.render(reading_messages(messages, fitting.facts))
        if most is None or len(ids) + max_new_tokens <= most:
            return fitting, ids
        fitting = fitting.without_last()
    return reading, []


def _answer_ids(
    model: KnowledgeModel, messages: Sequence[Message], text: str, prompt_ids: torch.Tensor
) -> torch.Tensor:
    ids, start = model.chat.render_with_answer(messages, text)
    if model.chat.end_of_turn_id is not None:
        ids = ids[:-1]
    most = trained_positions(model)
    # Composed of whole values, an answer may be longer than any that the model could have written: of one with a book
    # for a value the beginning tells which facts it rests on, and all of it would not fit into any memory.
    num_tokens = None if most is None else max(1, most - start)
    return torch.tensor([ids[start:][:num_tokens]], device=prompt_ids.device)
