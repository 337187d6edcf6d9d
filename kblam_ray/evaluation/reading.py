"""Verbatim answers to many questions at once: those that `KnowledgeModel.ask(..., grounding="verbatim")` gives.

The evidence for each fact is at hand; what is left is to let the base model read the facts, batch by batch, and to hold
what it writes to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import Evidence
from kblam_ray.evaluation.answers import generate_answers
from kblam_ray.model.chat import Message
from kblam_ray.model.grounding.grounder import ground
from kblam_ray.model.grounding.selection import Reading, choose
from kblam_ray.model.grounding.verbatim import reading_prompt
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.refusal import user_texts


@dataclass(frozen=True)
class ReadAnswer:
    """A grounded answer and the ids of the facts whose values it states."""

    text: str
    fact_ids: tuple[int, ...]
    refused: bool


@dataclass(frozen=True)
class _Prompt:
    number: int
    reading: Reading
    ids: list[int]


def verbatim_answers(
    model: KnowledgeModel,
    conversations: Sequence[Sequence[Message]],
    memories: Sequence[KnowledgeMemory],
    evidence: Sequence[Evidence],
    statistics: Sequence[float],
    max_new_tokens: int,
) -> list[ReadAnswer]:
    """The grounded answer to each conversation of a batch.

    Args:
        memories: what each attends to, with texts.
        evidence: for each fact, at the end of each prompt.
        statistics: what the adapter's refusal threshold is compared with.
        max_new_tokens: most that the model writes.
    """
    config = model.adapter.config
    refusal = ReadAnswer(config.refusal_text, (), True)
    threshold = float("-inf") if config.refusal_threshold is None else config.refusal_threshold
    asked = [number for number, sure in enumerate(statistics) if sure >= threshold]
    prompts: list[_Prompt] = []
    unread: list[_Prompt] = []
    for number in asked:
        reading = choose(memories[number], evidence[number].scores_M, user_texts(conversations[number]))
        fitting, ids = reading_prompt(model, conversations[number], reading, max_new_tokens)
        (prompts if ids else unread).append(_Prompt(number, fitting, ids))
    texts = generate_answers(model, [prompt.ids for prompt in prompts], None, max_new_tokens) if prompts else []
    answers = [refusal] * len(conversations)
    for prompt, text in zip([*prompts, *unread], [*texts, *[""] * len(unread)], strict=True):
        grounded = ground(text, prompt.reading, user_texts(conversations[prompt.number]), config.refusal_text)
        if grounded.text and not grounded.refused:
            stated = tuple(prompt.reading.facts[place].fact_id for place in grounded.stated)
            answers[prompt.number] = ReadAnswer(grounded.text, stated, False)
    return answers
