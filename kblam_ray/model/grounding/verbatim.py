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
from typing import TYPE_CHECKING

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import PromptTrace
from kblam_ray.errors import InputError
from kblam_ray.model.chat import Message
from kblam_ray.model.generation import answer_text, generate_answer, learned_positions, trained_positions
from kblam_ray.model.grounding.grounder import ground
from kblam_ray.model.grounding.reading import reading_message
from kblam_ray.model.grounding.selection import ReadFact, Reading, choose
from kblam_ray.model.mentions import check_texts
from kblam_ray.model.refusal import features, statistic, user_texts

if TYPE_CHECKING:
    from kblam_ray.model.knowledge_model import KnowledgeModel


@dataclass(frozen=True)
class VerbatimAnswer:
    """A grounded answer, the facts whose values it states, each with its share of the attention, and the refusal."""

    text: str
    facts: tuple[tuple[ReadFact, float], ...]
    refused: bool


def answer_verbatim(
    model: KnowledgeModel, messages: Sequence[Message], request_memory: KnowledgeMemory, max_new_tokens: int
) -> VerbatimAnswer:
    """Answer the last message of the user from the facts alone.

    Args:
        request_memory: what `KnowledgeModel.prepare` gives for the conversation.
        max_new_tokens: most that the model writes; a value that it does not finish is stated as a whole.

    Raises:
        InputError: the memory has no texts, or the conversation no message of the user.
    """
    check_texts(request_memory)
    config = model.adapter.config
    refusal = VerbatimAnswer(config.refusal_text, (), True)
    questions = user_texts(messages)
    if not questions:
        raise InputError("the conversation has no message of the user", where="messages", help="ask something")
    prompt_ids = torch.tensor([model.chat.render(messages)], device=model.device)
    if not request_memory.num_facts:
        return refusal
    trace = PromptTrace(model.attachment, prompt_ids, request_memory)
    if config.refusal_threshold is not None:
        found = features(model, trace.evidence, request_memory, messages)
        if statistic(config, found) < config.refusal_threshold:
            return refusal
    reading, ids = reading_prompt(
        model, messages, choose(request_memory, trace.evidence.scores_M, questions), max_new_tokens
    )
    text = ""
    if ids:
        written = generate_answer(model, torch.tensor([ids], device=model.device), None, max_new_tokens)
        text = answer_text(model, written, len(ids))
    grounded = ground(text, reading, questions, config.refusal_text)
    if grounded.refused or not grounded.text:
        return refusal
    shares_M = trace.answer(_answer_ids(model, messages, grounded.text, prompt_ids))
    shares = dict(zip(request_memory.fact_ids.tolist(), shares_M.tolist(), strict=True))
    stated = [reading.facts[place] for place in grounded.stated]
    ranked = sorted(((fact, shares[fact.fact_id]) for fact in stated), key=lambda pair: -pair[1])
    return VerbatimAnswer(grounded.text, tuple(ranked), False)


def reading_messages(messages: Sequence[Message], facts: Sequence[ReadFact]) -> list[Message]:
    """The conversation with the facts before the user's last question, and all that follows it left out."""
    last = max(place for place, message in enumerate(messages) if message.get("role") == "user")
    content = reading_message([fact.texts() for fact in facts], messages[last]["content"])
    return [*messages[:last], {"role": "user", "content": content}]


def reading_prompt(
    model: KnowledgeModel, messages: Sequence[Message], reading: Reading, max_new_tokens: int
) -> tuple[Reading, list[int]]:
    """As much of the reading as the base model's positions hold, and its prompt; no prompt if not one fact fits."""
    most = trained_positions(model)
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
    most = learned_positions(model)
    # Composed of whole values, an answer may be longer than any that the model could have written.
    return torch.tensor([ids[start:most]], device=prompt_ids.device)
