"""The plain search: facts ranked by the cosine of the question's embedding and their keys, from the same encoder.

Shape legend: B questions, M facts, P encoder dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.task import first_alike
from kblam_ray.model.prior import BLOCK_ROWS, QuestionPrior
from kblam_ray.table.embedded import EmbeddedFacts


class KeySearch:
    """Compares questions with the keys of one knowledge base.

    Args:
        prior: its encoder reads the questions; what is embedded is what the question prior reads: the last user
            message, or the last two.
        facts: the knowledge base.
        device: where the products are computed.
    """

    def __init__(self, prior: QuestionPrior, facts: EmbeddedFacts, device: torch.device | str = "cpu") -> None:
        self._prior, self._facts, self._device = prior, facts, torch.device(device)
        self._first_M = first_alike(facts.keys_MP)

    def scores(self, questions: Sequence[Asked]) -> np.ndarray:
        """The cosine of each question and each fact's key, float32 [B, M]; 0 for a key that is zero.

        Facts with one key have one cosine, to the last bit.

        Raises:
            EncoderError: the encoder failed, or gave nothing that has a direction.
        """
        texts = [self._prior.question(question.messages) for question in questions]
        # In one go; an encoder that remembers answers from memory below.
        self._prior.encoder.encode(texts)
        questions_BP = torch.stack([self._prior.embed(text) for text in texts]).to(self._device)
        cosines_BM = np.empty((len(texts), len(self._facts)), np.float32)
        block = BLOCK_ROWS["cpu" if self._device.type == "cpu" else "cuda"]
        for start in range(0, len(self._facts), block):
            keys_mP = torch.from_numpy(self._facts.keys_MP[start : start + block]).to(self._device).float()
            norms_m = torch.linalg.vector_norm(keys_mP, dim=1)
            cosines_Bm = torch.where(norms_m > 0, questions_BP @ keys_mP.T / norms_m, 0.0)
            cosines_BM[:, start : start + block] = cosines_Bm.cpu().numpy()
        return np.take(cosines_BM, self._first_M, axis=1)


def nearest(scores_M: np.ndarray, num_facts: int) -> list[int]:
    """Positions of the facts with the largest scores, largest first; of equal ones those that come first."""
    num_facts = min(num_facts, len(scores_M))
    if not num_facts:
        return []
    # The largest by value first, then sorted: of a large knowledge base a full sort is most of the time.
    least = np.partition(scores_M, len(scores_M) - num_facts)[len(scores_M) - num_facts]
    candidates = np.flatnonzero(scores_M >= least)
    order = np.argsort(-scores_M[candidates], kind="stable")[:num_facts]
    return [int(position) for position in candidates[order]]
