"""Retrieval-augmented generation: the same base model, without the adapter, reads the facts nearest to the question."""

from __future__ import annotations

from collections.abc import Sequence

from kblam_ray.evaluation.questions import Asked
from kblam_ray.facts.fact import Fact
from kblam_ray.model.chat import Message
from kblam_ray.model.grounding import reading_message


def reading_messages(question: Asked, facts: Sequence[Fact]) -> list[Message]:
    """The conversation with the facts before the question, in the words in which facts are read everywhere.

    Args:
        facts: what to read, nearest first. Earlier turns stay as they are.
    """
    rows = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in facts]
    return [*question.messages[:-1], {"role": "user", "content": reading_message(rows, question.text)}]
