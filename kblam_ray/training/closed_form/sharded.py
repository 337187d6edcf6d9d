"""The passes over questions, shared out over Ray workers; their statistics add up to those of one process.

A task takes a run of blocks. Blocks, not questions, are what workers share, and sums are added in the order of the
blocks, so that nothing but float64 rounding of the additions depends on how many workers there are. Ray repeats a task
whose worker died.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from kblam_ray.ray_session import start_ray
from kblam_ray.training.closed_form.collect import Passes
from kblam_ray.training.closed_form.statistics import Statistics

TASKS_PER_WORKER = 4
"""So that a worker that is done early takes more, and what a dead one leaves is little."""

MAX_RETRIES = 3

_LOADED: dict[str, PreTrainedModel] = {}
"""The base model of this worker process, by what names it."""


def sharded_statistics(
    passes: Passes,
    base_model: PreTrainedModel,
    num_questions: int,
    num_workers: int,
    *,
    base_source: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Statistics:
    """Statistics of `num_questions` questions by Ray tasks.

    Args:
        num_workers: tasks at a time, each with one CPU, and one GPU where the model is on one.
        base_source: name or folder from which workers load the base model; None: they get a copy of this one.

    Raises:
        MissingDependencyError, RayStartError: Ray cannot be started.
    """
    start_ray()
    import ray

    num_blocks = passes.num_blocks(num_questions)
    num_tasks = min(num_blocks, num_workers * TASKS_PER_WORKER)
    bounds = [num_blocks * at // num_tasks for at in range(num_tasks + 1)]
    is_cuda = base_model.device.type == "cuda"
    shared: Any = ray.put(passes)
    model: Any = base_source
    if base_source is None:
        # A copy, so that the caller's stays where it is; workers move theirs to their own device.
        model = ray.put(torch.nn.Module.to(copy.deepcopy(base_model), "cpu") if is_cuda else base_model)
    task = ray.remote(num_cpus=1, num_gpus=1 if is_cuda else 0, max_retries=MAX_RETRIES)(_statistics)
    name = base_source or model.hex()
    dtype = str(base_model.dtype).removeprefix("torch.")
    waiting: list[tuple[int, int]] = list(pairwise(bounds))
    running: list[Any] = []
    total = Statistics()
    done = 0
    while waiting or running:
        while waiting and len(running) < num_workers:
            first, last = waiting.pop(0)
            running.append(task.remote(shared, model, name, dtype, range(first, last), num_questions))
        # In order: sums of floats depend on it. A finished task's successor waits for the first one's at most.
        total = total + ray.get(running.pop(0))
        done += 1
        if progress is not None:
            progress(f"{done} of {num_tasks} parts, {total.num_questions} of {num_questions} questions")
    return total


def _statistics(
    passes: Passes, model: PreTrainedModel | str, name: str, dtype: str, blocks: range, num_questions: int
) -> Statistics:
    if name not in _LOADED:
        _LOADED.clear()
        _LOADED[name] = _load(model, dtype)
    return passes.statistics(_LOADED[name], blocks, num_questions).cpu()


def _load(model: PreTrainedModel | str, dtype: str) -> PreTrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, str):
        from kblam_ray.model.base_model import load_base_model

        return load_base_model(model, device, dtype)[0]
    return torch.nn.Module.to(model.eval(), device)
