"""Figures of one way of answering: by kind of question and over all, each with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kblam_ray.evaluation.intervals import mean, wilson
from kblam_ray.evaluation.metrics import area_under_curve, refusal_report
from kblam_ray.evaluation.outcomes import AT, Outcome, System
from kblam_ray.evaluation.questions import Asked

ALL = "all"
"""The group of all questions, whatever their kind."""

Pair = tuple[Asked, Outcome]


def result(system: System, questions: Sequence[Asked], outcomes: Sequence[Outcome], *, seed: int = 0) -> dict[str, Any]:
    """`system, prior, grounding`, and what of `retrieval, answers, citations, refusal` there is.

    Each of the latter is a mapping from groups (`all`, and each kind that has answers) to figures: `@1, @5`;
    `exact_match, precision, recall, f1`; `recall`; `precision, recall, f1, area_under_curve`. A figure is
    `value, low, high, count`. The refusal of a kind is over its questions and a like share of those without an answer.

    Args:
        seed: of the bootstrap.
    """
    pairs = list(zip(questions, outcomes, strict=True))
    answerable = [pair for pair in pairs if pair[0].should_answer is not False]
    unanswerable = [pair for pair in pairs if pair[0].should_answer is False]
    groups = {ALL: answerable}
    for pair in answerable:
        groups.setdefault(pair[0].kind, []).append(pair)
    found: dict[str, Any] = {"system": system.name, "prior": system.prior, "grounding": system.grounding}
    for name, figures in (("retrieval", _retrieval), ("answers", _answers), ("citations", _citations)):
        by_group = {group: figures(members, seed) for group, members in groups.items()}
        if by_group[ALL]:
            found[name] = {group: those for group, those in by_group.items() if those}
    share = len(unanswerable) / len(answerable) if answerable else 0.0
    refusal = {
        # Reasons take turns among the unanswerable ones: each beginning of them has all reasons.
        group: _refusal([*members, *unanswerable[: round(share * len(members))]], seed)
        for group, members in groups.items()
    }
    if refusal[ALL]:
        found["refusal"] = {group: those for group, those in refusal.items() if those}
    return found


def _retrieval(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k in AT:
        hits = [hit for _, outcome in pairs if (hit := outcome.retrieved_at(k)) is not None]
        if hits:
            found[f"@{k}"] = wilson(sum(hits), len(hits)).to_json()
    return found


def _answers(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    judged = [outcome for _, outcome in pairs if outcome.is_exact is not None]
    if not judged:
        return {}
    exact = wilson(sum(bool(outcome.is_exact) for outcome in judged), len(judged))
    return {"exact_match": exact.to_json()} | {
        name: mean(np.array([getattr(outcome, name) for outcome in judged]), seed=seed).to_json()
        for name in ("precision", "recall", "f1")
    }


def _citations(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    cited = [outcome.is_cited for _, outcome in pairs if outcome.is_cited is not None]
    return {"recall": wilson(sum(cited), len(cited)).to_json()} if cited else {}


def _refusal(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    known = [(question.should_answer, outcome) for question, outcome in pairs if question.should_answer is not None]
    found: dict[str, Any] = {}
    # Without both sorts of question there is nothing to tell apart.
    if {should for should, _ in known} != {True, False}:
        return found
    refused = [(bool(outcome.refused), not should) for should, outcome in known if outcome.refused is not None]
    if refused:
        found |= refusal_report(*zip(*refused, strict=True), seed=seed).to_json()
    scored = [(outcome.statistic, should) for should, outcome in known if outcome.statistic is not None]
    if scored:
        found["area_under_curve"] = area_under_curve(*zip(*scored, strict=True), seed=seed).to_json()
    return found
