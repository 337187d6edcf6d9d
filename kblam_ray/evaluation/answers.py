"""Greedy answers to many prompts at once: those that `KnowledgeModel.ask` gives one by one.

Shape legend: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.evaluation.retrieval import padded
from kblam_ray.model.generation import answer_length, answer_text, check_length, greedy_settings
from kblam_ray.model.knowledge_model import KnowledgeModel


@torch.no_grad()
def generate_answers(
    model: KnowledgeModel,
    prompts: Sequence[Sequence[int]],
    memories: Sequence[KnowledgeMemory | None] | None,
    max_new_tokens: int,
) -> list[str]:
    """The greedy answer to each prompt of a batch, as `ask` words it: without the token that ends the turn.

    Args:
        prompts: token ids of each, up to where the answer begins.
        memories: what each prompt attends to; None: the base model answers.
        max_new_tokens: longest answer.

    Raises:
        InputError: a prompt is longer than the base model has positions for.
    """
    settings = greedy_settings(model, max_new_tokens)
    ids_BT, mask_BT = padded(prompts, left=True, pad_id=settings["pad_token_id"], device=model.device)
    check_length(model, ids_BT.shape[1] + max_new_tokens)
    knowledge = None if memories is None else list(memories)
    found = model.generate(ids_BT, attention_mask=mask_BT, knowledge=knowledge, **settings)
    start = ids_BT.shape[1]
    return [answer_text(model, row_T[None, : start + answer_length(model, row_T[start:])], start) for row_T in found]
