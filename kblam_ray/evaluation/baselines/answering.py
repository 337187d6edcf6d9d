"""Greedy answers of the base model to prompts of any length, in batches that bound the memory they take.

Prompts that begin with the same long text, as with all facts of a knowledge base in them, have it read once: each then
goes on from a copy of the cache, which holds what reading the text by itself would put there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from kblam_ray.evaluation.answers import generate_answers
from kblam_ray.evaluation.baselines.prompts import Prompt
from kblam_ray.evaluation.task import Task
from kblam_ray.model.generation import answer_length, answer_text, check_length, greedy_settings
from kblam_ray.model.knowledge_model import KnowledgeModel

TOKENS_PER_BATCH = 2**15
"""Tokens of the prompts of a batch with their padding and answers: what the base model's cache grows with."""

PAIRS_PER_BATCH = 2**27
"""Pairs of such tokens within prompts: what an attention mask grows with. A single prompt needs no mask."""

SHARED_TOKENS = 256
"""From so many tokens on, a beginning that prompts share is read once."""


def written(task: Task, what: str, prompts: Sequence[Prompt]) -> list[str]:
    """The base model's answer to each prompt, without knowledge.

    Args:
        what: is being answered, for the progress.
        prompts: one per question of the task.

    Raises:
        InputError: a prompt is longer than the base model has positions for.
    """
    texts: dict[int, str] = {}

    def write(numbers: Sequence[int], answers: Callable[[list[Prompt], int], list[str]]) -> None:
        most = task.settings.max_new_tokens
        for batch in bounded_batches([len(prompts[number]) + most for number in numbers], task.settings.batch_size):
            chosen = [numbers[place] for place in batch]
            texts.update(zip(chosen, answers([prompts[number] for number in chosen], most), strict=True))
            task.tell(what, len(texts))

    alone: list[int] = []
    for group in _alike(prompts, lambda prompt: tuple(prompt[:SHARED_TOKENS])):
        alike = [prompts[number] for number in group]
        num_shared = _num_shared(alike)
        if len(group) == 1 or num_shared < SHARED_TOKENS:
            alone += group
            continue
        beginning = Beginning(task.model, alike[0][:num_shared])
        for places in _alike(alike, len):
            write([group[place] for place in places], beginning.answers)
    write(alone, lambda batch, most: generate_answers(task.model, batch, None, most))
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


class Beginning:
    """A text that prompts begin with, read once by the base model.

    Args:
        ids: its tokens.
    """

    def __init__(self, model: KnowledgeModel, ids: Sequence[int]) -> None:
        self._model, self._num_tokens = model, len(ids)
        # Newer base models can leave out the logits of all tokens but the last, which nobody looks at.
        accepts = inspect.signature(model.base_model.forward).parameters
        options = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        check_length(model, len(ids))
        with torch.no_grad():
            read = model(torch.tensor([list(ids)], device=model.device), use_cache=True, **options)
        self._cache: Any = read.past_key_values

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt, as `generate_answers` gives it.

        Args:
            prompts: of one length, so that none is padded; each begins with the text and goes on.
        """
        model, num_prompts = self._model, len(prompts)
        settings = greedy_settings(model, max_new_tokens)
        ids_BT = torch.tensor(prompts, device=model.device)
        check_length(model, ids_BT.shape[1] + max_new_tokens)
        cache = copy.deepcopy(self._cache)
        if num_prompts > 1:
            cache.batch_repeat_interleave(num_prompts)
        found = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), past_key_values=cache, **settings)
        start = ids_BT.shape[1]
        return [
            answer_text(model, row_T[None, : start + answer_length(model, row_T[start:])], start) for row_T in found
        ]


def _alike(prompts: Sequence[Prompt], part: Callable[[Prompt], Hashable]) -> list[list[int]]:
    """Numbers of the prompts that have the same of something."""
    groups: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(part(prompt), []).append(number)
    return list(groups.values())


def _num_shared(prompts: Sequence[Prompt]) -> int:
    """Tokens that all prompts begin with, at least one less than the shortest has."""
    # What the first and the last in order share, all between them share, too.
    first, last = min(prompts), max(prompts)
    shared = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(shared, min(map(len, prompts)) - 1)
