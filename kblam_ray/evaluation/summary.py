"""Figures of one way of answering: by kind of question and over all, each with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kblam_ray.evaluation.calibration import calibration
from kblam_ray.evaluation.intervals import mean, wilson
from kblam_ray.evaluation.metrics import area_under_curve, refusal_report
from kblam_ray.evaluation.outcomes import AT, Outcome, System
from kblam_ray.evaluation.questions import Asked

ALL = "all"
"""The group of all questions, whatever their kind."""

ANSWER_FIGURES = ("precision", "recall", "f1", "rouge_1", "rouge_2", "rouge_l", "bert_score")

Pair = tuple[Asked, Outcome]


def result(
    system: System,
    questions: Sequence[Asked],
    outcomes: Sequence[Outcome],
    *,
    seed: int = 0,
    threshold: float | None = None,
    is_probability: bool = False,
) -> dict[str, Any]:
    """`system, prior, grounding`, and what of `retrieval, answers, citations, refusal, calibration` there is.

    Each of the first four is a mapping from groups (`all`, and each kind that has answers) to figures: `@1, @5`;
    `exact_match, precision, recall, f1, rouge_1, rouge_2, rouge_l` and, where it was measured, `bert_score`; `recall`;
    `precision, recall, f1` where there are questions without an answer, and `area_under_curve` where there are others,
    too. A figure is `value, low, high, count`. The refusal of a kind is over its questions and a like share of those
    without an answer. `calibration` is that of the statistic over all questions,
    see `calibration.calibration`; a grounding has the statistic of attention without one, and it is given there only.

    Args:
        seed: of the bootstrap.
        threshold: below it the system refuses.
        is_probability: its statistic is one.
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
        group: _refusal(pairs if group == ALL else [*members, *unanswerable[: round(share * len(members))]], seed)
        for group, members in groups.items()
    }
    if refusal[ALL]:
        found["refusal"] = {group: those for group, those in refusal.items() if those}
    scored = _scored(pairs)
    # Of a broken adapter a statistic may be no number: it has no place on a curve.
    if system.grounding is None and scored and all(math.isfinite(statistic) for statistic, _ in scored):
        statistics, should_answer = zip(*scored, strict=True)
        found["calibration"] = calibration(
            statistics, should_answer, threshold=threshold, is_probability=is_probability, seed=seed
        )
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
    found = {"exact_match": wilson(sum(bool(outcome.is_exact) for outcome in judged), len(judged)).to_json()}
    for name in ANSWER_FIGURES:
        measured = [value for outcome in judged if (value := getattr(outcome, name)) is not None]
        if measured:
            found[name] = mean(np.array(measured), seed=seed).to_json()
    return found


def _citations(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    cited = [outcome.is_cited for _, outcome in pairs if outcome.is_cited is not None]
    return {"recall": wilson(sum(cited), len(cited)).to_json()} if cited else {}


def _refusal(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    known = [(question.should_answer, outcome) for question, outcome in pairs if question.should_answer is not None]
    found: dict[str, Any] = {}
    if all(should for should, _ in known):
        return found
    refused = [(bool(outcome.refused), not should) for should, outcome in known if outcome.refused is not None]
    if refused:
        found |= refusal_report(*zip(*refused, strict=True), seed=seed).to_json()
    if scored := _scored(pairs):
        found["area_under_curve"] = area_under_curve(*zip(*scored, strict=True), seed=seed).to_json()
    return found


def _scored(pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Statistic and whether there is an answer, of the questions of which both are known; none if they are alike."""
    found = [
        (outcome.statistic, question.should_answer)
        for question, outcome in pairs
        if outcome.statistic is not None and question.should_answer is not None
    ]
    return found if _both_sorts(should for _, should in found) else []


def _both_sorts(should_answer: Iterable[bool]) -> bool:
    """Whether there are questions with an answer and others: else there is nothing to tell apart."""
    return set(should_answer) == {True, False}
