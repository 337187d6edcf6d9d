"""Answers about held-out facts, with an adapter attached: the knowledge base that they need, and their loss.

Shape legend: B batch, T tokens, M facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.attach import attach
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.facts.questions import Question
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.closed_form.collect import HeldOutRows, padded
from kblam_ray.training.closed_form.positions import AskedTokens

ANSWERS_PER_BATCH = 16


def held_out_facts(
    held_out: EmbeddedFacts, train: EmbeddedFacts, rows: HeldOutRows, num_facts: int, seed: int
) -> EmbeddedFacts:
    """A knowledge base with every fact that the held-out questions need, one per key, filled up with others.

    At least the facts needed; up to `num_facts` held-out ones, then training ones, at random.
    """
    needed = {number for question, _ in rows.asked for number in question.facts}
    draw = np.random.default_rng(seed)
    order = [*sorted(needed), *(number for number in draw.permutation(len(held_out)).tolist() if number not in needed)]
    seen: set[tuple[str, str]] = set()
    chosen: list[list[int]] = [[], []]
    places = ((0, held_out, order), (1, train, draw.permutation(len(train)).tolist()))
    for place, table, numbers in places:
        for number in numbers:
            key = (table.facts[number].entity, table.facts[number].property)
            is_needed = place == 0 and number in needed
            if key not in seen and (is_needed or len(seen) < num_facts):
                seen.add(key)
                chosen[place].append(number)
    return EmbeddedFacts.concat([held_out.take(chosen[0]), train.take(chosen[1])])


class HeldOutAnswers:
    """Questions with answers, and the facts that they are asked of.

    Args:
        kb: the facts attended to.
        asked: what is asked.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        chat: ChatTemplate,
        kb: EmbeddedFacts,
        asked: Sequence[tuple[Question, AskedTokens]],
    ) -> None:
        self._model, self._kb = base_model, kb
        self._batches = []
        # Questions of one length side by side.
        ordered = sorted((one for _, one in asked), key=lambda one: len(one.input_ids))
        for start in range(0, len(ordered), ANSWERS_PER_BATCH):
            batch = ordered[start : start + ANSWERS_PER_BATCH]
            ids_BT, mask_BT = padded(batch, chat)
            labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
            for row, one in enumerate(batch):
                labels_BT[row, : one.answer_start] = -100
            self._batches.append((ids_BT, mask_BT, labels_BT))

    @property
    def num_facts(self) -> int:
        return len(self._kb)

    @torch.no_grad()
    def loss(self, adapter: KnowledgeAdapter | None) -> float:
        """Mean cross-entropy of the answers' tokens in nats, attending to the facts; without an adapter, to none."""
        if adapter is None:
            return self._loss()
        memory = KnowledgeMemory.from_embeddings(
            adapter,
            self._kb.keys_MP,
            self._kb.values_MP,
            fact_ids=self._kb.fact_ids_M,
            dtype=torch.bfloat16 if self._model.dtype == torch.bfloat16 else None,
            device=self._model.device,
        )
        attachment = attach(self._model, adapter)
        try:
            with attachment.using(memory):
                return self._loss()
        finally:
            attachment.detach()

    def _loss(self) -> float:
        total, count = 0.0, 0
        device = self._model.device
        for ids_BT, mask_BT, labels_BT in self._batches:
            logits_BTV = self._model(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False
            ).logits
            labels_BT = labels_BT[:, 1:].to(device)
            is_answer_BT = labels_BT >= 0
            logits_nV = logits_BTV[:, :-1][is_answer_BT].float()
            total += torch.nn.functional.cross_entropy(logits_nV, labels_BT[is_answer_BT], reduction="sum").item()
            count += int(is_answer_BT.sum())
        return total / max(1, count)
