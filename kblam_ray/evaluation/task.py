"""One knowledge base with the questions asked of it, ready for every way of answering.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.evaluation.question_embeddings import RememberingEncoder
from kblam_ray.evaluation.questions import Asked, EvaluationSet
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.evaluation.statements import ValueIndex
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.table.embedded import EmbeddedFacts

Progress = Callable[[str], None]

SCORES_PER_BATCH = 2**24
"""Scores, one per prompt and fact, that are held at a time."""


@dataclass(frozen=True)
class Task:
    """What is asked of what.

    Attributes:
        facts: the knowledge base; row m is fact m of `memory`.
        memory: its facts, without a prior.
        prompts: token ids of each question's conversation.
        values: of all facts.
        encoder: reads questions; None where nothing needs it.
    """

    model: KnowledgeModel
    settings: EvaluationSettings
    facts: EmbeddedFacts
    questions: tuple[Asked, ...]
    memory: KnowledgeMemory
    prompts: tuple[list[int], ...]
    values: ValueIndex
    encoder: RememberingEncoder | None
    progress: Progress | None

    @classmethod
    def of(
        cls,
        model: KnowledgeModel,
        chosen: EvaluationSet,
        settings: EvaluationSettings,
        encoder: RememberingEncoder | None,
        progress: Progress | None,
    ) -> Task:
        memory = memory_of(
            model.adapter,
            chosen.facts,
            device=model.device,
            dtype=torch.bfloat16 if model.dtype == torch.bfloat16 else None,
            form=settings.form,
        )
        return cls(
            model=model,
            settings=settings,
            facts=chosen.facts,
            questions=chosen.questions,
            memory=memory,
            prompts=tuple(model.chat.render(question.messages) for question in chosen.questions),
            values=ValueIndex(fact.value for fact in chosen.facts.facts),
            encoder=encoder,
            progress=progress,
        )

    def batches(self, what: str, prompts: Sequence[Sequence[int]] | None = None) -> Iterator[list[int]]:
        """Numbers of questions, batch by batch, those with prompts of like length together: padding is idle work.

        Args:
            what: is being done, for the progress.
            prompts: what is asked instead of the questions' own prompts.
        """
        lengths = [len(prompt) for prompt in (self.prompts if prompts is None else prompts)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = max(1, min(self.settings.batch_size, SCORES_PER_BATCH // max(1, len(self.facts))))
        for start in range(0, len(order), size):
            yield order[start : start + size]
            self.tell(what, min(start + size, len(order)))

    def rows(self, fact_ids: Iterable[int]) -> list[int]:
        """Rows of facts."""
        return [self._row_of[fact_id] for fact_id in fact_ids]

    @cached_property
    def _row_of(self) -> dict[int, int]:
        return {fact_id: row for row, fact_id in enumerate(self.facts.fact_ids_M.tolist())}

    @cached_property
    def first_alike_M(self) -> np.ndarray:
        """See `first_alike`, of all facts."""
        return first_alike(self.facts.keys_MP)

    def tell(self, what: str, num_done: int) -> None:
        if self.progress is not None:
            self.progress(f"{len(self.facts):,} facts, {what}: {num_done:,} of {len(self.questions):,} questions")


def first_alike(keys_MP: np.ndarray) -> np.ndarray:
    """For each key the row of the first that equals it, int64 [M]: facts that no search can tell apart.

    The last bits of a product hang on the place of its row in a block, and would tell equal keys apart.
    """
    first: dict[bytes, int] = {}
    rows = (first.setdefault(key_P.tobytes(), row) for row, key_P in enumerate(keys_MP))
    return np.fromiter(rows, np.int64, len(keys_MP))
