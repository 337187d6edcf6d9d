"""The baselines on the questions of a task, all of them with the same base model.

    zero_shot     the base model is asked, and reads nothing
    in_context    it reads all facts, where they fit
    dense         it reads the facts nearest to the question by the cosine of their embeddings
    bm25          it reads the facts nearest by their words; as a search, too
    cosine        that search by embeddings alone

Those that answer share wording, chat template, greedy decoding and the longest answer, and their answers are judged as
those of attention are; they refuse by what they say.
Shape legend: B questions, M facts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kblam_ray.errors import InputError
from kblam_ray.evaluation.baselines.answering import written
from kblam_ray.evaluation.baselines.bm25 import WordSearch
from kblam_ray.evaluation.baselines.cosine import KeySearch, nearest
from kblam_ray.evaluation.baselines.prompts import InContext, Prompt, reading_prompt
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.outcomes import Outcome, System, judged
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.settings import AskedSettings
from kblam_ray.evaluation.task import SCORES_PER_BATCH, Task
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.model.refusal import is_refusal

Scores = Callable[[Sequence[Asked]], np.ndarray]
"""From questions to a score of each and every fact, float [B, M]."""


def needs_encoder(settings: AskedSettings) -> bool:
    """Whether a baseline that the settings name embeds the questions."""
    return "cosine" in settings.baseline or ("dense" in settings.baseline and not settings.retrieval_only)


def baseline_outcomes(
    task: Task, prior: QuestionPrior | None, left_out: dict[str, str] | None = None
) -> dict[System, list[Outcome]]:
    """Outcomes of each baseline that the settings name, question by question.

    The statistic of a search is its largest score. With `retrieval_only` there are the searches alone.

    Args:
        prior: reads the questions; None where `needs_encoder` says that none has to.
        left_out: is given the name of each baseline that cannot answer these questions, and why.

    Raises:
        InputError: questions must be embedded, and there is no prior.
        EncoderError: the encoder failed.
        MissingDependencyError: bm25s is not installed.
    """
    settings, facts = task.settings, task.facts.facts
    answers = not settings.retrieval_only
    outcomes: dict[System, list[Outcome]] = {}
    if "zero_shot" in settings.baseline and answers:
        outcomes[System("zero_shot")] = _answered(task, "zero_shot", task.prompts)
    if "in_context" in settings.baseline and answers:
        made = InContext.of(task.model, task.questions, facts, settings.max_new_tokens)
        if made.prompts is not None:
            outcomes[System("in_context")] = _answered(task, "in_context", made.prompts)
        elif left_out is not None:
            left_out["in_context"] = (
                f"all facts take {made.num_tokens + settings.max_new_tokens:,} tokens with question and answer, the"
                f" base model was made for {made.limit:,}"
            )
    if needs_encoder(settings):
        if prior is None:
            raise InputError("there is no encoder to read the questions", where="baseline", help="give a prior")
        found = _searched(task, "cosine", KeySearch(prior, task.facts, task.model.device).scores)
        if "cosine" in settings.baseline:
            outcomes[System("cosine")] = [one.outcome() for one in found]
        if "dense" in settings.baseline and answers:
            outcomes[System("dense")] = _answered(task, "dense", _prompts(task, found), found)
    if "bm25" in settings.baseline:
        num_turns = 1 if task.model.adapter.config.prior_context == "last" else 2
        found = _searched(task, "bm25", WordSearch(facts, num_turns).scores)
        ranked = [one.outcome() for one in found]
        if answers:
            read = _answered(task, "bm25", _prompts(task, found), found)
            ranked = [replace(one, ranks=searched.ranks) for one, searched in zip(read, found, strict=True)]
        outcomes[System("bm25")] = ranked
    return outcomes


@dataclass(frozen=True)
class _Found:
    """What a search gives for a question: where the wanted facts stand, its largest score, the rows to read."""

    ranks: tuple[int, ...] | None
    statistic: float
    rows: list[int]

    def outcome(self) -> Outcome:
        return Outcome(ranks=self.ranks, statistic=self.statistic)


def _searched(task: Task, name: str, scores: Scores) -> list[_Found]:
    found: list[_Found] = []
    size = max(1, min(task.settings.batch_size, SCORES_PER_BATCH // max(1, len(task.facts))))
    for start in range(0, len(task.questions), size):
        questions = task.questions[start : start + size]
        for question, scores_M in zip(questions, scores(questions), strict=True):
            ranks = tuple(retrieval_ranks(scores_M, question.wanted)) or None
            found.append(_Found(ranks, float(scores_M.max()), nearest(scores_M, task.settings.read_facts)))
        task.tell(f"{name}, search", len(found))
    return found


def _prompts(task: Task, found: Sequence[_Found]) -> list[Prompt]:
    facts, most = task.facts.facts, task.settings.max_new_tokens
    return [
        reading_prompt(task.model, question, [facts[row] for row in one.rows], most)
        for question, one in zip(task.questions, found, strict=True)
    ]


def _answered(task: Task, name: str, prompts: Sequence[Prompt], found: Sequence[_Found] | None = None) -> list[Outcome]:
    refusal = task.model.adapter.config.refusal_text
    statistics = [None] * len(prompts) if found is None else [one.statistic for one in found]
    return [
        judged(question, task.values, text, refused=is_refusal(text, refusal), statistic=sure)
        for question, text, sure in zip(task.questions, written(task, name, prompts), statistics, strict=True)
    ]
