"""The baselines on the questions of a task."""

from __future__ import annotations

from kblam_ray.evaluation.answers import generate_answers
from kblam_ray.evaluation.baselines.cosine import nearest, question_cosines
from kblam_ray.evaluation.baselines.dense import reading_messages
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.outcomes import Outcome, System, judged
from kblam_ray.evaluation.task import Task
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.model.refusal import is_refusal


def baseline_outcomes(task: Task, prior: QuestionPrior) -> dict[System, list[Outcome]]:
    """Outcomes of each baseline that the settings name, question by question.

    The statistic of both is the largest cosine; `dense` refuses by its text.

    Args:
        prior: reads the questions.
    """
    settings = task.settings
    has_answers = "dense" in settings.baseline and not settings.retrieval_only
    ranked: list[Outcome] = []
    prompts: list[list[int]] = []
    for number, question in enumerate(task.questions):
        cosines_M = question_cosines(prior, task.memory, question)
        ranks = tuple(retrieval_ranks(cosines_M, question.wanted)) or None
        ranked.append(Outcome(ranks=ranks, statistic=float(cosines_M.max())))
        if has_answers:
            read = [task.facts.facts[row] for row in nearest(cosines_M, settings.read_facts)]
            prompts.append(task.model.chat.render(reading_messages(question, read)))
        if (number + 1) % settings.batch_size == 0 or number + 1 == len(task.questions):
            task.tell("cosine", number + 1)
    outcomes: dict[System, list[Outcome]] = {}
    if "cosine" in settings.baseline:
        outcomes[System("cosine")] = ranked
    if has_answers:
        outcomes[System("dense")] = _read(task, prompts, ranked)
    return outcomes


def _read(task: Task, prompts: list[list[int]], ranked: list[Outcome]) -> list[Outcome]:
    refusal = task.model.adapter.config.refusal_text
    found: dict[int, Outcome] = {}
    for numbers in task.batches("dense", prompts):
        batch = [prompts[number] for number in numbers]
        texts = generate_answers(task.model, batch, None, task.settings.max_new_tokens)
        for number, text in zip(numbers, texts, strict=True):
            found[number] = judged(
                task.questions[number],
                task.values,
                text,
                refused=is_refusal(text, refusal),
                statistic=ranked[number].statistic,
            )
    return [found[number] for number in range(len(prompts))]
