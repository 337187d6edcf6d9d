"""One greedy answer of the base model, with or without knowledge: where it ends, and how long it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import InputError

if TYPE_CHECKING:
    from kblam_ray.model.knowledge_model import KnowledgeModel


def generate_answer(
    model: KnowledgeModel,
    prompt_ids: torch.Tensor,
    memory: KnowledgeMemory | None,
    max_new_tokens: int,
    **options: Any,
) -> torch.Tensor:
    """Prompt and greedy answer, int64 [1, T], without the token that ends the turn; `options` are of `generate`."""
    settings = greedy_settings(model, max_new_tokens) | options
    with torch.no_grad():
        ids = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), knowledge=memory, **settings)
    start = prompt_ids.shape[1]
    return ids[:, : start + answer_length(model, ids[0, start:])]


def greedy_settings(model: KnowledgeModel, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` is given for a greedy answer that ends with its turn."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    # Settings that base models bring for sampling would only be warned about.
    settings |= {"temperature": None, "top_p": None, "top_k": None}
    # What pads is never looked at: it is masked before a prompt, and stands after the token that ends the turn.
    stops = stop_ids(model)
    return settings | ({"eos_token_id": stops, "pad_token_id": stops[0]} if stops else {"pad_token_id": 0})


def answer_length(model: KnowledgeModel, answer_A: torch.Tensor) -> int:
    """Tokens before the one that ends the turn, of what was generated, int64 [A]."""
    stops = stop_ids(model)
    return next((at for at, token in enumerate(answer_A.tolist()) if token in stops), len(answer_A))


def answer_text(model: KnowledgeModel, ids: torch.Tensor, start: int) -> str:
    """The text of an answer that begins at `start` of prompt and answer [1, T]."""
    return str(model.chat.tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()


def check_length(model: KnowledgeModel, num_tokens: int) -> None:
    """Raises InputError if the base model has a learned table of positions, and not so many of them.

    Rotary and relative positions go on beyond what was trained: there the library warns.
    """
    most = learned_positions(model)
    if most is not None and num_tokens > most:
        raise InputError(
            f"prompt and answer may take {num_tokens} tokens, the base model has positions for {most}",
            where="question",
            help="ask a shorter question, or lower max_new_tokens",
        )


def learned_positions(model: KnowledgeModel) -> int | None:
    """How many positions the base model's table has; None where positions are computed."""
    base: Any = model.base_model
    most = trained_positions(model)
    if most is None:
        return None
    tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    # OPT keeps two rows before its first position.
    if any(table.num_embeddings in (most, most + 2) for table in tables if table is not base.get_input_embeddings()):
        return most
    return None


def trained_positions(model: KnowledgeModel) -> int | None:
    """The longest text that the base model was made for, in tokens; None where its configuration does not say."""
    most = getattr(model.base_model.config, "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def stop_ids(model: KnowledgeModel) -> list[int]:
    """The chat template's end of turn, and what the base model says ends a text."""
    configured = getattr(model.base_model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in (model.chat.end_of_turn_id, *configured) if token is not None))
