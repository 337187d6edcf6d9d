"""Whether the facts can answer at all: features of the best facts' scores, and the probability that they do.

Shape legend: M facts.

Features, each a number. An adapter's `refusal_weights` names those it uses, and a `bias`; the statistic is their
logistic. Without weights it is `share`. The features of attention are always there:

    score            the best fact's score before the softmax, prior not included
    score_margin     how far the second is below it
    score_lead       how far the mean of the next ten is below it
    score_spread     log-sum-exp of all facts' scores minus the best one's
    share            the best retrieval score: its share of the softmax over facts, prior included
    kb_share         the weight of all facts beside the text
    log_facts        log M, as in the attention

Where the adapter has a question prior, or its weights name them, also:

    cosine           of the question and the fact with the best retrieval score
    cosine_margin    how far the nearest other fact is below it; negative where another one is nearer
    cosine_lead      how far the mean of the ten nearest others is below it

Where the memory has the facts' texts, of the eight best retrieval scores:

    entity_similarity    how near any words of the question come to the best fact's entity, from 0 to 1
    entity_named         1 if it stands there as whole words, else 0
    property_similarity, property_named    the same for its property
    pair_named           1 if one of the eight facts has entity and property named; "What is AI?" names its description
    other_property       1 if the question names another property of the table, and not the best fact's
    strange_words        words like parts of names that are in no entity and property of the eight, at most 3
    extended             how many of them touch the best fact's entity: "New Foo" and "Foo II" are not Foo

In small memories facts at the average key, whose score and cosine are 0, stand in for others that are not there. What
an adapter's weights name and the memory cannot give is an error: a feature is never taken for 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import Evidence, retrieval_evidence
from kblam_ray.errors import InputError
from kblam_ray.facts.questions.forms import asks_what_it_is, is_description
from kblam_ray.model.mentions import named_facts, named_properties, normalized
from kblam_ray.model.naming import NEAR, Span, Wording, longest, overlap

if TYPE_CHECKING:
    from kblam_ray.attention.adapter import AdapterConfig
    from kblam_ray.model.knowledge_model import KnowledgeModel

ATTENTION_FEATURES = ("score", "score_margin", "score_lead", "score_spread", "share", "kb_share", "log_facts")
PRIOR_FEATURES = ("cosine", "cosine_margin", "cosine_lead")
TEXT_FEATURES = (
    "entity_similarity",
    "entity_named",
    "property_similarity",
    "property_named",
    "pair_named",
    "other_property",
    "strange_words",
    "extended",
)
FEATURES = (*ATTENTION_FEATURES, *PRIOR_FEATURES, *TEXT_FEATURES)

BIAS = "bias"
NUM_BEST = 8
NUM_RIVALS = 10
MOST_STRANGE = 3

Messages = Sequence[Mapping[str, str]] | str


def evidence(
    model: KnowledgeModel,
    prompt_ids: torch.Tensor | Sequence[int],
    request_memory: KnowledgeMemory,
    messages: Messages,
) -> dict[str, float]:
    """The features of the facts for one question, in one forward pass; none at all for a memory without facts.

    Args:
        prompt_ids: what the chat template makes of `messages`, [1, T] or the T ids.
        request_memory: what `KnowledgeModel.prepare` gives for the question.
        messages: the conversation, or one question.
    """
    ids = torch.as_tensor(prompt_ids, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    return features(model, retrieval_evidence(model.attachment, ids, request_memory), request_memory, messages)


def evidence_batch(
    model: KnowledgeModel,
    prompts: Sequence[Sequence[int]],
    memories: Sequence[KnowledgeMemory],
    messages: Sequence[Messages],
) -> list[dict[str, float]]:
    """`evidence` for several questions, one forward pass each."""
    asked = zip(prompts, memories, messages, strict=True)
    return [evidence(model, ids, memory, conversation) for ids, memory, conversation in asked]


def features(
    model: KnowledgeModel, found: Evidence, request_memory: KnowledgeMemory, messages: Messages
) -> dict[str, float]:
    """The features, from evidence that is at hand."""
    if not request_memory.num_facts:
        return {}
    config = model.adapter.config
    wanted = config.refusal_weights or {}
    made = _of_attention(found) | {"log_facts": request_memory.log_num_facts}
    if config.question_prior or not wanted.keys().isdisjoint(PRIOR_FEATURES):
        made |= _of_cosines(_cosines(model, request_memory, messages), int(found.scores_M.argmax()))
    if request_memory.has_texts:
        made |= _of_texts(found, request_memory, messages)
    return made


def statistic(config: AdapterConfig, given: Mapping[str, float]) -> float:
    """The probability that the facts answer, from 0 to 1: what `refusal_threshold` is compared with.

    Without facts it is 0. Without weights it is the largest retrieval score.

    Raises:
        InputError: the weights name features that there are not: the memory has no texts, or no feature has the name.
    """
    if not given:
        return 0.0
    weights = config.refusal_weights
    if weights is None:
        return given["share"]
    if missing := sorted(weights.keys() - given.keys() - {BIAS}):
        raise InputError(
            f"the refusal decision needs {', '.join(missing)} of the facts, which this memory cannot give",
            where="refusal_weights",
            help="load the memory with the facts' texts; calibrate the adapter again if its features are unknown",
        )
    logit = weights[BIAS] + sum(weight * given[name] for name, weight in weights.items() if name != BIAS)
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))


def is_refusal(text: str, refusal_text: str) -> bool:
    """Whether an answer is the adapter's refusal, whatever its case, blanks and last full stop."""
    return plain(text) == plain(refusal_text)


def plain(text: str) -> str:
    """A text as refusals are compared: case folded, one blank for a run of blanks, without its last full stop."""
    return " ".join(text.casefold().split()).rstrip(".!")


def user_texts(messages: Messages) -> list[str]:
    """What the user said, message by message."""
    if isinstance(messages, str):
        return [messages]
    return [message["content"] for message in messages if message.get("role") == "user"]


def _of_attention(found: Evidence) -> dict[str, float]:
    logits_M = found.logits_M[torch.isfinite(found.logits_M)].double()
    first, margin, lead = _first_and_rivals(logits_M)
    return {
        "score": first,
        "score_margin": margin,
        "score_lead": lead,
        "score_spread": float(torch.logsumexp(logits_M, 0)) - first if len(logits_M) else 0.0,
        "share": float(found.scores_M.max()),
        "kb_share": found.kb_share,
    }


def _first_and_rivals(scores_M: torch.Tensor) -> tuple[float, float, float]:
    """The largest, how far the second and how far the mean of the next ten are below it."""
    largest = scores_M.topk(min(1 + NUM_RIVALS, len(scores_M))).values.tolist()
    first, *rivals = largest or [0.0]
    rivals += [min(first, 0.0)] * (NUM_RIVALS - len(rivals))
    return first, first - rivals[0], first - sum(rivals) / NUM_RIVALS


def _cosines(model: KnowledgeModel, memory: KnowledgeMemory, messages: Messages) -> torch.Tensor:
    config, prior = model.adapter.config, model.prior
    conversation: Any = messages
    if config.question_prior and memory.priors is not None:
        # The request's own prior: the question is not encoded a second time.
        live = [
            prior_M if view.positions is not None else view.live_rows(prior_M)
            for prior_M, view in zip(memory.priors, memory.views, strict=True)
        ]
        prior_M = torch.cat(live)
        if config.prior_lexical:
            named_M = torch.from_numpy(named_facts(memory, prior.question(conversation))).to(prior_M)
            prior_M = prior_M - config.prior_lexical * named_M
        return prior_M / config.question_prior
    return prior.cosines(memory, prior.question(conversation))


def _of_cosines(cosines_M: torch.Tensor, best: int) -> dict[str, float]:
    cosine = float(cosines_M[best])
    others_M = torch.cat([cosines_M[:best], cosines_M[best + 1 :]]).double()
    rivals = others_M.topk(min(NUM_RIVALS, len(others_M))).values.tolist()
    rivals += [min(cosine, 0.0)] * (NUM_RIVALS - len(rivals))
    return {
        "cosine": cosine,
        "cosine_margin": cosine - rivals[0],
        "cosine_lead": cosine - sum(rivals) / NUM_RIVALS,
    }


def _of_texts(found: Evidence, memory: KnowledgeMemory, messages: Messages) -> dict[str, float]:
    scores_M = found.scores_M
    places = scores_M.topk(min(NUM_BEST, len(scores_M))).indices.cpu().numpy()
    facts = memory.lookup(memory.fact_ids[places])
    best = facts[0]
    texts = user_texts(messages) or [""]
    asked = Wording(texts[-1])
    about, entity_similarity, entity_span = asked, *asked.similarity(best["entity"])
    if entity_similarity < NEAR and len(texts) > 1:
        # A follow-up names no entity: the message before does.
        before = Wording(texts[-2])
        similarity, span = before.similarity(best["entity"])
        if similarity >= NEAR:
            about, entity_similarity, entity_span = before, similarity, span
    property_similarity, property_span = asked.similarity(best["property"])

    entities = [span for fact in facts for span in about.mentions(fact["entity"])]
    if entity_similarity >= NEAR:
        entities.append(entity_span)
    covered = entities + [span for fact in facts for span in about.mentions(fact["property"])]
    if about is asked and property_similarity >= NEAR:
        covered.append(property_span)
    strange = about.strange_words(covered)
    is_pair = any(
        (asked.names(fact["property"]) and about.names(fact["entity"])) or _asks_for_description(asked, fact)
        for fact in facts
    )
    is_near_pair = entity_similarity >= NEAR and asked.names(best["property"])
    return {
        "entity_similarity": entity_similarity,
        "entity_named": float(about.names(best["entity"])),
        "property_similarity": property_similarity,
        "property_named": float(asked.names(best["property"])),
        "pair_named": float(is_pair or is_near_pair),
        "other_property": float(_names_another(asked, texts[-1], memory, facts, entities if about is asked else [])),
        "strange_words": float(min(MOST_STRANGE, len(strange))),
        "extended": float(about.touches(entity_span, strange)) if entity_similarity >= NEAR else 0.0,
    }


def _asks_for_description(asked: Wording, fact: Mapping[str, Any]) -> bool:
    """Whether the question asks what the fact's entity is, which a description says without being named."""
    return is_description(fact["property"]) and any(
        asks_what_it_is(asked.text, *span) for span in asked.mentions(fact["entity"])
    )


def _names_another(
    asked: Wording,
    question: str,
    memory: KnowledgeMemory,
    facts: list[dict[str, Any]],
    entities: list[Span],
) -> bool:
    """Whether the question names properties of the table, and the best fact's is none of them."""
    named = [
        (span, property)
        for property in named_properties(memory, question)
        for span in asked.mentions(property)
        if not any(overlap(span, entity) for entity in entities)
    ]
    others = {normalized(property) for _, property in longest(named)}
    return bool(others) and normalized(facts[0]["property"]) not in others
