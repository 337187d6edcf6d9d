"""The plain search: facts ranked by the cosine of the question's embedding and their keys, from the same encoder.

Shape legend: M facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.evaluation.questions import Asked
from kblam_ray.model.prior import QuestionPrior


def question_cosines(prior: QuestionPrior, memory: KnowledgeMemory, question: Asked) -> np.ndarray:
    """The cosine of a question and each fact's key, float32 [M] in the memory's order.

    What is embedded is what the question prior reads: the last user message, or the last two.
    """
    return prior.cosines(memory, prior.question(question.messages)).cpu().numpy()


def nearest(cosines_M: np.ndarray, num_facts: int) -> Sequence[int]:
    """Positions of the facts with the largest cosines, largest first; of equal ones those that come first."""
    num_facts = min(num_facts, len(cosines_M))
    # The largest by value first, then sorted: of a large knowledge base a full sort is most of the time.
    least = np.partition(cosines_M, len(cosines_M) - num_facts)[len(cosines_M) - num_facts]
    candidates = np.flatnonzero(cosines_M >= least)
    order = np.argsort(-cosines_M[candidates], kind="stable")[:num_facts]
    return [int(position) for position in candidates[order]]
