"""The prompts of the ways that read: one wording of facts and question for all of them, and what fits the base model.

They differ in the facts that they list and in nothing else; with none to list, the question is put as it is, as it is
to the model with its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kblam_ray.evaluation.questions import Asked
from kblam_ray.facts.fact import Fact
from kblam_ray.model.chat import Message
from kblam_ray.model.generation import trained_positions
from kblam_ray.model.grounding import reading_message
from kblam_ray.model.knowledge_model import KnowledgeModel

Prompt = list[int]
"""Token ids up to where the answer begins."""


def reading_messages(question: Asked, facts: Sequence[Fact]) -> list[Message]:
    """The conversation with the facts before the question, in the words in which facts are read everywhere.

    Args:
        facts: what to read, in this order. Earlier turns stay as they are; with no facts the question does, too.
    """
    if not facts:
        return list(question.messages)
    rows = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in facts]
    return [*question.messages[:-1], {"role": "user", "content": reading_message(rows, question.text)}]


def reading_prompt(model: KnowledgeModel, question: Asked, facts: Sequence[Fact], max_new_tokens: int) -> Prompt:
    """The prompt with as many of the facts, from the first on, as leave room for the answer.

    Args:
        facts: nearest first.
        max_new_tokens: longest answer.
    """
    limit = trained_positions(model)
    for num_facts in range(len(facts), 0, -1):
        prompt = model.chat.render(reading_messages(question, facts[:num_facts]))
        if limit is None or len(prompt) + max_new_tokens <= limit:
            return prompt
    return model.chat.render(question.messages)


@dataclass(frozen=True)
class InContext:
    """All facts of a knowledge base in the prompt of each question, or the news that they do not fit.

    Attributes:
        prompts: one per question; None where one of them, with its answer, is longer than the base model was made for.
        num_tokens: of the longest prompt looked at, without an answer. Where it does not fit no longer one is looked
            for: it is that of the question with most tokens of its own.
        limit: tokens that the base model was made for; None: its configuration does not say, and everything fits.
    """

    prompts: list[Prompt] | None
    num_tokens: int
    limit: int | None

    @classmethod
    def of(
        cls, model: KnowledgeModel, questions: Sequence[Asked], facts: Sequence[Fact], max_new_tokens: int
    ) -> InContext:
        """Put all facts, in their order, before each question.

        Args:
            questions: at least one.
            max_new_tokens: longest answer; prompt and answer must fit together.
        """
        limit = trained_positions(model)
        own_tokens = [len(model.chat.render(question.messages)) for question in questions]
        # The longest first: of a knowledge base that is far too large one prompt is made, not one for each question.
        order = sorted(range(len(questions)), key=lambda number: -own_tokens[number])
        prompts: dict[int, Prompt] = {}
        for number in order:
            prompt = model.chat.render(reading_messages(questions[number], facts))
            if limit is not None and len(prompt) + max_new_tokens > limit:
                return cls(None, len(prompt), limit)
            prompts[number] = prompt
        made = [prompts[number] for number in range(len(questions))]
        return cls(made, max(map(len, made)), limit)
