"""Ask a question of a knowledge memory: generate the answer, then cite the facts that it attended to.

Citations come from a second pass over prompt and answer, in which every token is given: one short prefill, whatever
engine generated the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.trace import mean_shares, retrieval_scores
from kblam_ray.errors import InputError
from kblam_ray.model.chat import Message

if TYPE_CHECKING:
    from kblam_ray.model.knowledge_model import KnowledgeModel

GROUNDINGS = ("off", "cite")
SIMILAR = "similar:"


@dataclass(frozen=True)
class Citation:
    """A fact that an answer attended to.

    Attributes:
        metadata: JSON text, or None.
        score: its share of the attention, mean over answer tokens, retrieval layers and heads; from 0 to 1.
    """

    fact_id: int
    entity: str | None
    property: str | None
    value: str | None
    metadata: str | None
    score: float

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: `fact_id` is a decimal string, because 64 bits exceed what JavaScript holds."""
        return {**asdict(self), "fact_id": str(self.fact_id)}


@dataclass(frozen=True)
class Answer:
    """What was answered, from which facts of which KB version; `refused` if no fact applied."""

    text: str
    citations: tuple[Citation, ...]
    refused: bool
    kb_version: int | None

    def to_json(self) -> dict[str, Any]:
        """`text, citations, refused, kb_version` as JSON has them."""
        citations = [citation.to_json() for citation in self.citations]
        return {"text": self.text, "citations": citations, "refused": self.refused, "kb_version": self.kb_version}


def parse_selection(selection: str) -> int | None:
    """K of `similar:K`, None of `all`.

    Raises:
        InputError: neither of the two, or K below 1.
    """
    if selection == "all":
        return None
    number = selection.removeprefix(SIMILAR) if isinstance(selection, str) else ""
    if number != selection and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    raise InputError(f"there is no selection {selection!r}", where="selection", help='give "all" or "similar:100"')


def check_grounding(grounding: str) -> None:
    """Raises InputError for a grounding that cannot be had."""
    if grounding == "verbatim":
        raise InputError(
            "this version cannot ground answers verbatim", where="grounding", help=f"choose {' or '.join(GROUNDINGS)}"
        )
    if grounding not in GROUNDINGS:
        raise InputError(
            f"there is no grounding {grounding!r}", where="grounding", help=f"choose {' or '.join(GROUNDINGS)}"
        )


def as_messages(question: str | Sequence[Message]) -> list[Message]:
    """A question as a conversation of one message; a conversation as it is.

    Raises:
        InputError: it is neither.
    """
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    if isinstance(question, Sequence) and not isinstance(question, str):
        return list(question)
    raise InputError(
        f"a question of type {type(question).__name__}",
        where="question",
        help="give a text, or a list of messages with role and content",
    )


def ask(
    model: KnowledgeModel,
    question: str | Sequence[Message],
    memory: KnowledgeMemory | None,
    *,
    grounding: str,
    selection: str,
    max_citations: int,
    max_new_tokens: int,
) -> Answer:
    """See `KnowledgeModel.ask`."""
    check_grounding(grounding)
    parse_selection(selection)
    if max_citations < 0 or max_new_tokens < 1:
        raise InputError(
            f"max_citations {max_citations}, max_new_tokens {max_new_tokens}",
            help="give at least 0 citations and at least 1 token",
        )
    if memory is not None and not isinstance(memory, KnowledgeMemory):
        raise InputError(
            f"a memory of type {type(memory).__name__}", where="memory", help="give one that `model.load(kb)` made"
        )
    messages = as_messages(question)
    prompt_ids = torch.tensor([model.chat.render(messages)], device=model.device)
    _check_length(model, prompt_ids.shape[1] + max_new_tokens)
    request = model.prepare(memory, messages, selection)
    ids = _generate(model, prompt_ids, request, max_new_tokens)
    start = prompt_ids.shape[1]
    text = str(model.chat.tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()
    citations: tuple[Citation, ...] = ()
    if grounding == "cite" and request is not None and max_citations and ids.shape[1] > start:
        citations = cite(model, ids, request, start, max_citations)
    return Answer(
        text=text,
        citations=citations,
        refused=is_refusal(text, model.adapter.config.refusal_text) or _lacks_evidence(model, prompt_ids, request),
        kb_version=None if memory is None else memory.version,
    )


def cite(
    model: KnowledgeModel, input_ids: torch.Tensor, memory: KnowledgeMemory, answer_start: int, max_citations: int
) -> tuple[Citation, ...]:
    """The facts that an answer attended to most, largest share first; facts without any share are none.

    Args:
        input_ids: prompt and answer, int64 [1, T], without the token that ends the turn.
        answer_start: where the answer begins.
    """
    shares_M = mean_shares(model.attachment, input_ids, memory, answer_start)
    best = shares_M.topk(min(max_citations, len(shares_M)))
    positions = best.indices[best.values > 0].cpu().numpy()
    fact_ids = memory.fact_ids[positions]
    texts: dict[str, Any] = dict.fromkeys(("entity", "property", "value", "metadata"))
    rows = memory.lookup(fact_ids) if memory.has_texts else [texts] * len(fact_ids)
    return tuple(
        Citation(**{**{name: row[name] for name in texts}, "fact_id": int(fact_id), "score": score})
        for fact_id, score, row in zip(fact_ids, best.values.tolist(), rows, strict=False)
    )


def is_refusal(text: str, refusal_text: str) -> bool:
    """Whether an answer is the adapter's refusal, whatever its case, blanks and last full stop."""
    return _plain(text) == _plain(refusal_text)


def refusal_statistic(model: KnowledgeModel, prompt_ids: torch.Tensor, memory: KnowledgeMemory) -> float:
    """What an adapter's `refusal_threshold` is compared with: the largest retrieval score of any fact.

    That is how much of its attention to facts the last prompt token pays to the best one, from 0 to 1, with the
    question prior where there is one. 0 when there are no facts.

    Args:
        prompt_ids: int64 [1, T], the whole prompt.
    """
    scores_M = retrieval_scores(model.attachment, prompt_ids, memory)
    return float(scores_M.max()) if len(scores_M) else 0.0


def _lacks_evidence(model: KnowledgeModel, prompt_ids: torch.Tensor, memory: KnowledgeMemory | None) -> bool:
    threshold = model.adapter.config.refusal_threshold
    if threshold is None or memory is None:
        return False
    return refusal_statistic(model, prompt_ids, memory) < threshold


def _check_length(model: KnowledgeModel, num_tokens: int) -> None:
    """Raises InputError if the base model has a learned table of positions, and not so many of them.

    Rotary and relative positions go on beyond what was trained: there the library warns.
    """
    base: Any = model.base_model
    most = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(most, int) or num_tokens <= most:
        return
    tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    # OPT keeps two rows before its first position.
    if any(table.num_embeddings in (most, most + 2) for table in tables if table is not base.get_input_embeddings()):
        raise InputError(
            f"prompt and answer may take {num_tokens} tokens, the base model has positions for {most}",
            where="question",
            help="ask a shorter question, or lower max_new_tokens",
        )


def _generate(
    model: KnowledgeModel, prompt_ids: torch.Tensor, memory: KnowledgeMemory | None, max_new_tokens: int
) -> torch.Tensor:
    """Prompt and greedy answer, int64 [1, T], without the token that ends the turn."""
    stops = _stop_ids(model)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    # Settings that base models bring for sampling would only be warned about.
    settings |= {"temperature": None, "top_p": None, "top_k": None}
    if stops:
        settings |= {"eos_token_id": stops, "pad_token_id": stops[0]}
    with torch.no_grad():
        ids = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), knowledge=memory, **settings)
    start = prompt_ids.shape[1]
    answer = ids[0, start:].tolist()
    end = next((at for at, token in enumerate(answer) if token in stops), len(answer))
    return ids[:, : start + end]


def _stop_ids(model: KnowledgeModel) -> list[int]:
    """The chat template's end of turn, and what the base model says ends a text."""
    configured = getattr(model.base_model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in (model.chat.end_of_turn_id, *configured) if token is not None))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
