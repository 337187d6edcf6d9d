"""How the model with its adapter does on the questions of a task: retrieval, answers, refusals.

Shape legend: M facts.
"""

from __future__ import annotations

from collections.abc import Sequence

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import Evidence
from kblam_ray.evaluation.answers import generate_answers
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.outcomes import Outcome, System, judged
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.reading import ReadAnswer, verbatim_answers
from kblam_ray.evaluation.retrieval import evidence_of
from kblam_ray.evaluation.task import Task
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.model.refusal import features, is_refusal, statistic


def attention_outcomes(task: Task, *, has_prior: bool) -> dict[System, list[Outcome]]:
    """Outcomes of attention under the adapter's settings as they are now, question by question.

    Args:
        has_prior: whether these settings have a question prior, for the name.
    """
    settings, model = task.settings, task.model
    groundings = [] if settings.retrieval_only else list(dict.fromkeys(settings.grounding))
    prior = None if task.encoder is None else QuestionPrior.of(model.adapter.config, task.encoder)
    found: dict[System, dict[int, Outcome]] = {}
    named = f"attention {'with prior' if has_prior else 'alone'}"
    for numbers in task.batches(named):
        questions = [task.questions[number] for number in numbers]
        prompts = [task.prompts[number] for number in numbers]
        memories = [_request(task.memory, question, prior if has_prior else None) for question in questions]
        evidence = evidence_of(model.attachment, prompts, memories)
        statistics = _statistics(task, questions, memories, evidence)
        outcomes = {System("attention", has_prior): _retrieved(task, questions, evidence, statistics)}
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


def _request(memory: KnowledgeMemory, question: Asked, prior: QuestionPrior | None) -> KnowledgeMemory:
    return memory if prior is None else prior.apply(memory, question.messages)


def _statistics(
    task: Task, questions: Sequence[Asked], memories: Sequence[KnowledgeMemory], evidence: Sequence[Evidence]
) -> list[float]:
    config = task.model.adapter.config
    return [
        statistic(config, features(task.model, one, memory, question.messages))
        for question, memory, one in zip(questions, memories, evidence, strict=True)
    ]


def _retrieved(
    task: Task, questions: Sequence[Asked], evidence: Sequence[Evidence], statistics: Sequence[float]
) -> list[Outcome]:
    threshold = task.model.adapter.config.refusal_threshold
    return [
        Outcome(
            ranks=tuple(retrieval_ranks(one.scores_M.cpu().numpy(), question.wanted)) or None,
            statistic=sure,
            refused=None if threshold is None else sure < threshold,
        )
        for question, one, sure in zip(questions, evidence, statistics, strict=True)
    ]


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
            list(question.messages), task.memory, grounding="cite", max_new_tokens=task.settings.max_new_tokens
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
