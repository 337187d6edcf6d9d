"""Ask a question of a knowledge memory: generate the answer, then cite the facts that it attended to.

Citations come from a second pass over prompt and answer, in which every token is given: one short prefill, whatever
engine generated the answer. The refusal decision looks at the same pass. Verbatim answers are `grounding.verbatim`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import Evidence, evidence_and_shares, retrieval_evidence
from kblam_ray.attention.trace import mean_shares, retrieval_scores
from kblam_ray.errors import InputError
from kblam_ray.model.chat import Message
from kblam_ray.model.generation import answer_text, check_length, generate_answer
from kblam_ray.model.grounding import GROUNDINGS
from kblam_ray.model.grounding.verbatim import VerbatimAnswer, answer_verbatim
from kblam_ray.model.refusal import features, is_refusal, statistic

if TYPE_CHECKING:
    from kblam_ray.model.knowledge_model import KnowledgeModel

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
    if grounding not in GROUNDINGS:
        raise InputError(
            f"there is no grounding {grounding!r}", where="grounding", help=f"choose {' or '.join(GROUNDINGS)}"
        )


def as_messages(question: str | Sequence[Message]) -> list[Message]:
    """A question as a conversation of one message; a conversation as it is.

    Raises:
        InputError: it is neither, or a blank text.
    """
    if isinstance(question, str):
        if not question.strip():
            raise InputError("the question is blank", where="question", help="ask something")
        return [{"role": "user", "content": question}]
    if isinstance(question, Sequence) and not isinstance(question, (str, bytes)):
        return list(question)
    raise InputError(
        f"a question of type {type(question).__name__}",
        where="question",
        help="give a text, or a list of messages with role and content",
    )


@dataclass(frozen=True)
class Asked:
    """A question that is ready to be answered, by whatever engine generates.

    Attributes:
        messages: the conversation.
        prompt_ids: what the chat template makes of it, int64 [1, T].
        memory: what this question attends to, see `KnowledgeModel.prepare`; None asks the base model.
        kb_version: of the memory.
    """

    messages: list[Message]
    prompt_ids: torch.Tensor
    memory: KnowledgeMemory | None
    kb_version: int | None
    grounding: str
    max_citations: int

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt_ids.shape[1]


def render(
    model: KnowledgeModel,
    question: str | Sequence[Message],
    memory: KnowledgeMemory | None,
    *,
    grounding: str,
    selection: str,
    max_citations: int,
) -> Asked:
    """The question as the base model is given it; its memory is still that of all questions, see `prepared`.

    Raises:
        InputError: a setting or a message that cannot be.
    """
    check_grounding(grounding)
    parse_selection(selection)
    check_number("max_citations", max_citations, 0)
    if memory is not None and not isinstance(memory, KnowledgeMemory):
        raise InputError(
            f"a memory of type {type(memory).__name__}", where="memory", help="give one that `model.load(kb)` made"
        )
    messages = as_messages(question)
    prompt_ids = torch.tensor([model.chat.render(messages)], device=model.device)
    version = None if memory is None else memory.version
    return Asked(messages, prompt_ids, memory, version, grounding, max_citations)


def prepared(model: KnowledgeModel, asked: Asked, selection: str) -> Asked:
    """The question with the memory that it attends to; it may have to be encoded for that.

    Raises:
        InputError: "verbatim" without a memory, or a prior that cannot read the conversation.
        EncoderMismatchError, EncoderNotFoundError, EncoderError: the question must be encoded and cannot be.
    """
    if asked.grounding == "verbatim" and asked.memory is None:
        raise InputError(
            "there are no facts to answer from: no memory was given",
            where="grounding",
            help='give a memory that `model.load(kb)` made; to ask the base model choose grounding "off"',
        )
    return replace(asked, memory=model.prepare(asked.memory, asked.messages, selection))


def check_number(name: str, number: object, least: int) -> None:
    """Raises InputError for what is not a whole number, or a smaller one."""
    if not isinstance(number, Integral) or int(number) < least:
        raise InputError(f"{name} {number!r}", where=name, help=f"give a whole number, {least} or more")


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
    check_number("max_new_tokens", max_new_tokens, 1)
    asked = render(model, question, memory, grounding=grounding, selection=selection, max_citations=max_citations)
    check_length(model, asked.num_prompt_tokens + max_new_tokens)
    asked = prepared(model, asked, selection)
    if grounding == "verbatim":
        assert asked.memory is not None
        return verbatim_answer(asked, answer_verbatim(model, asked.messages, asked.memory, max_new_tokens))
    ids = generate_answer(model, asked.prompt_ids, asked.memory, max_new_tokens)
    return generated_answer(model, asked, ids, answer_text(model, ids, asked.num_prompt_tokens))


def verbatim_answer(asked: Asked, found: VerbatimAnswer) -> Answer:
    """What was found verbatim, with as many citations as were asked for."""
    cited = tuple(
        Citation(**fact.texts(), fact_id=fact.fact_id, metadata=fact.metadata, score=score)
        for fact, score in found.facts[: asked.max_citations]
    )
    return Answer(found.text, cited, found.refused, asked.kb_version)


def generated_answer(model: KnowledgeModel, asked: Asked, ids: torch.Tensor, text: str) -> Answer:
    """An answer that the base model generated, with the facts that it attended to and whether it is a refusal.

    Args:
        asked: `prepared`, with grounding "off" or "cite".
        ids: prompt and answer, int64 [1, T], without the token that ends the turn.
        text: of the answer.
    """
    config, request, start = model.adapter.config, asked.memory, asked.num_prompt_tokens
    refused = is_refusal(text, config.refusal_text)
    citations: tuple[Citation, ...] = ()
    if request is not None:
        decides = config.refusal_threshold is not None
        if asked.grounding == "cite" and asked.max_citations and ids.shape[1] > start:
            evidence, shares_M = evidence_and_shares(model.attachment, ids, request, start)
            citations = _citations(request, shares_M, asked.max_citations)
        elif decides:
            evidence = retrieval_evidence(model.attachment, asked.prompt_ids, request)
        refused = refused or (decides and _lacks_evidence(model, evidence, request, asked.messages))
    return Answer(text, citations, refused, asked.kb_version)


def cite(
    model: KnowledgeModel, input_ids: torch.Tensor, memory: KnowledgeMemory, answer_start: int, max_citations: int
) -> tuple[Citation, ...]:
    """The facts that an answer attended to most, largest share first; facts without any share are none.

    Args:
        input_ids: prompt and answer, int64 [1, T], without the token that ends the turn.
        answer_start: where the answer begins.
    """
    return _citations(memory, mean_shares(model.attachment, input_ids, memory, answer_start), max_citations)


def _citations(memory: KnowledgeMemory, shares_M: torch.Tensor, max_citations: int) -> tuple[Citation, ...]:
    best = shares_M.topk(min(max_citations, len(shares_M)))
    positions = best.indices[best.values > 0].cpu().numpy()
    fact_ids = memory.fact_ids[positions]
    texts: dict[str, Any] = dict.fromkeys(("entity", "property", "value", "metadata"))
    rows = memory.lookup(fact_ids) if memory.has_texts else [texts] * len(fact_ids)
    return tuple(
        Citation(**{**{name: row[name] for name in texts}, "fact_id": int(fact_id), "score": score})
        for fact_id, score, row in zip(fact_ids, best.values.tolist(), rows, strict=False)
    )


def refusal_statistic(model: KnowledgeModel, prompt_ids: torch.Tensor, memory: KnowledgeMemory) -> float:
    """What an adapter's `refusal_threshold` is compared with where it has no `refusal_weights`.

    The largest retrieval score of any fact: how much of its attention to facts the last prompt token pays to the
    best one, from 0 to 1, with the question prior where there is one. 0 when there are no facts.

    Args:
        prompt_ids: int64 [1, T], the whole prompt.
    """
    scores_M = retrieval_scores(model.attachment, prompt_ids, memory)
    return float(scores_M.max()) if len(scores_M) else 0.0


def _lacks_evidence(
    model: KnowledgeModel, evidence: Evidence, memory: KnowledgeMemory, messages: Sequence[Message]
) -> bool:
    threshold = model.adapter.config.refusal_threshold
    assert threshold is not None
    return statistic(model.adapter.config, features(model, evidence, memory, messages)) < threshold
