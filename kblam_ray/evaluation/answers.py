"""Greedy answers to many prompts at once: those that `KnowledgeModel.ask` gives one by one.

Shape legend: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.evaluation.retrieval import padded
from kblam_ray.model.generation import check_length, stop_ids
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
    ids_BT, mask_BT = padded(prompts, left=True, pad_id=_pad_id(model), device=model.device)
    check_length(model, ids_BT.shape[1] + max_new_tokens)
    stops = stop_ids(model)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    # Settings that base models bring for sampling would only be warned about.
    settings |= {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": _pad_id(model)}
    if stops:
        settings["eos_token_id"] = stops
    knowledge = None if memories is None else list(memories)
    found = model.generate(ids_BT, attention_mask=mask_BT, knowledge=knowledge, **settings)
    answers = []
    for answer in found[:, ids_BT.shape[1] :].tolist():
        end = next((at for at, token in enumerate(answer) if token in stops), len(answer))
        answers.append(str(model.chat.tokenizer.decode(answer[:end], skip_special_tokens=True)).strip())
    return answers


def _pad_id(model: KnowledgeModel) -> int:
    # Never looked at: masked before the prompt, cut off after the token that ends the turn.
    return next(iter(stop_ids(model)), 0)
