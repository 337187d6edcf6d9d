"""How the model with its adapter does on the questions of a task: retrieval, answers, refusals.

Shape legend: M facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import Evidence
from kblam_ray.evaluation.answers import generate_answers
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.outcomes import Outcome, System, judged
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.reading import ReadAnswer, verbatim_answers
from kblam_ray.evaluation.retrieval import evidence_of
from kblam_ray.evaluation.task import Task
from kblam_ray.model.asking import parse_selection
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.model.refusal import features, is_refusal, statistic

SAME_SCORE = 1e-3
"""Scores of equal keys that differ by less, relatively, differ by rounding."""


def attention_outcomes(task: Task, *, has_prior: bool) -> dict[System, list[Outcome]]:
    """Outcomes of attention under the adapter's settings as they are now, question by question.

    Args:
        has_prior: whether these settings have a question prior, for the name.
    """
    settings, model = task.settings, task.model
    groundings = [] if settings.retrieval_only else list(dict.fromkeys(settings.grounding))
    num_facts = parse_selection(settings.selection)
    prior = None
    if task.encoder is not None and (has_prior or num_facts is not None):
        prior = QuestionPrior.of(model.adapter.config, task.encoder)
    found: dict[System, dict[int, Outcome]] = {}
    named = f"attention {'with prior' if has_prior else 'alone'}"
    for numbers in task.batches(named):
        questions = [task.questions[number] for number in numbers]
        prompts = [task.prompts[number] for number in numbers]
        memories = [
            task.memory if prior is None else prior.apply(task.memory, question.messages, num_facts)
            for question in questions
        ]
        evidence = _evidence(task, prompts, memories)
        statistics = _statistics(task, questions, memories, evidence)
        outcomes = {System("attention", has_prior): _retrieved(task, questions, memories, evidence, statistics)}
        if "off" in groundings:
            texts = generate_answers(model, prompts, memories, settings.max_new_tokens)
            outcomes[System("attention", has_prior, "off")] = _answered(task, questions, texts, statistics)
        if "cite" in groundings:
            outcomes[System("attention", has_prior, "cite")] = _cited(task, questions, statistics)
        if "verbatim" in groundings:
            conversations = [question.messages for question in questions]
            answers = verbatim_answers(model, conversations, memories, evidence, statistics, settings.max_new_tokens)
            outcomes[System("attention", has_prior, "verbatim")] = _read(task, questions, answers, statistics)
        for system, batch in outcomes.items():
            found.setdefault(system, {}).update(zip(numbers, batch, strict=True))
    return {system: [by_number[number] for number in sorted(by_number)] for system, by_number in found.items()}


def _evidence(task: Task, prompts: Sequence[Sequence[int]], memories: Sequence[KnowledgeMemory]) -> list[Evidence]:
    """In one pass where all attend to the same facts; selections differ from question to question."""
    if not memories[0].is_selection:
        return evidence_of(task.model.attachment, prompts, memories)
    pairs = zip(prompts, memories, strict=True)
    return [evidence_of(task.model.attachment, [prompt], [memory])[0] for prompt, memory in pairs]


def _statistics(
    task: Task, questions: Sequence[Asked], memories: Sequence[KnowledgeMemory], evidence: Sequence[Evidence]
) -> list[float]:
    config = task.model.adapter.config
    return [
        statistic(config, features(task.model, one, memory, question.messages))
        for question, memory, one in zip(questions, memories, evidence, strict=True)
    ]


def _retrieved(
    task: Task,
    questions: Sequence[Asked],
    memories: Sequence[KnowledgeMemory],
    evidence: Sequence[Evidence],
    statistics: Sequence[float],
) -> list[Outcome]:
    threshold = task.model.adapter.config.refusal_threshold
    return [
        Outcome(
            ranks=tuple(retrieval_ranks(_scores(task, memory, one), question.wanted)) or None,
            statistic=sure,
            refused=None if threshold is None else sure < threshold,
        )
        for question, memory, one, sure in zip(questions, memories, evidence, statistics, strict=True)
    ]


def _scores(task: Task, memory: KnowledgeMemory, found: Evidence) -> np.ndarray:
    """Retrieval scores of all facts, float32 [M]; a fact that was not selected stands behind all others.

    Facts with one key have one score, unless words in the prior tell them apart.
    """
    scores_M = found.scores_M.cpu().numpy()
    if memory.is_selection:
        selected = scores_M
        scores_M = np.full(len(task.facts), -np.inf, np.float32)
        scores_M[task.rows(memory.fact_ids.tolist())] = selected
    alike_M = scores_M[task.first_alike_M]
    return np.where(np.isclose(scores_M, alike_M, rtol=SAME_SCORE, atol=0.0), alike_M, scores_M)


def _answered(
    task: Task, questions: Sequence[Asked], texts: Sequence[str], statistics: Sequence[float]
) -> list[Outcome]:
    config = task.model.adapter.config
    threshold = float("-inf") if config.refusal_threshold is None else config.refusal_threshold
    return [
        judged(
            question,
            task.values,
            text,
            refused=sure < threshold or is_refusal(text, config.refusal_text),
            statistic=sure,
        )
        for question, text, sure in zip(questions, texts, statistics, strict=True)
    ]


def _cited(task: Task, questions: Sequence[Asked], statistics: Sequence[float]) -> list[Outcome]:
    """One question at a time: citations take a pass over each answer."""
    found = []
    for question, sure in zip(questions, statistics, strict=True):
        answer = task.model.ask(
            list(question.messages),
            task.memory,
            grounding="cite",
            selection=task.settings.selection,
            max_new_tokens=task.settings.max_new_tokens,
        )
        cited = task.rows(citation.fact_id for citation in answer.citations)
        found.append(judged(question, task.values, answer.text, refused=answer.refused, statistic=sure, cited=cited))
    return found


def _read(
    task: Task, questions: Sequence[Asked], answers: Sequence[ReadAnswer], statistics: Sequence[float]
) -> list[Outcome]:
    return [
        judged(
            question,
            task.values,
            answer.text,
            refused=answer.refused,
            statistic=sure,
            cited=task.rows(answer.fact_ids),
        )
        for question, answer, sure in zip(questions, answers, statistics, strict=True)
    ]
