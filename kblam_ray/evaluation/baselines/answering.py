"""Greedy answers of the base model to prompts of any length, in batches that bound the memory they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kblam_ray.evaluation.answers import generate_answers
from kblam_ray.evaluation.baselines.prompts import Prompt
from kblam_ray.evaluation.task import Task

TOKENS_PER_BATCH = 2**15
"""Tokens of the prompts of a batch with their padding and answers: what the base model's cache grows with."""

PAIRS_PER_BATCH = 2**27
"""Pairs of such tokens within prompts: what an attention mask grows with. A single prompt needs no mask."""


def written(task: Task, what: str, prompts: Sequence[Prompt]) -> list[str]:
    """The base model's answer to each prompt, without knowledge.

    Args:
        what: is being answered, for the progress.
        prompts: one per question of the task.

    Raises:
        InputError: a prompt is longer than the base model has positions for.
    """
    most = task.settings.max_new_tokens
    texts: dict[int, str] = {}
    for numbers in bounded_batches([len(prompt) + most for prompt in prompts], task.settings.batch_size):
        answers = generate_answers(task.model, [prompts[number] for number in numbers], None, most)
        texts.update(zip(numbers, answers, strict=True))
        task.tell(what, len(texts))
    return [texts[number] for number in range(len(prompts))]


def bounded_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts, batch by batch, those of like length together; a prompt too long for any bound is alone.

    Args:
        lengths: tokens of each prompt with its answer.
        batch_size: most prompts of a batch.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        # In this order the newest is the longest, to which the others are padded.
        size, longest = len(batch) + 1, lengths[number]
        if batch and (
            size > batch_size or size * longest > TOKENS_PER_BATCH or size * longest * longest > PAIRS_PER_BATCH
        ):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
