"""Do units: one after the other in this process, or by Ray tasks on workers that keep what they loaded.

A unit whose worker dies is done again by another one. A unit that fails ends the sweep with its error, after those that
are running are done and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kblam_ray.errors import EvaluationError, KblamError
from kblam_ray.evaluation.sweep.unit import Found, Loaded, Progress, Unit, do_unit
from kblam_ray.ray_session import require_gpus

MAX_RETRIES = 3
"""How often a unit is done again after its worker died."""

Done = Callable[[Unit, Found], None]

_LOADED = Loaded()
"""What a worker's process keeps between its tasks."""


def do_here(units: Sequence[Unit], done: Done, progress: Progress | None = None) -> None:
    """Do units in this process.

    Args:
        done: called with each unit as soon as it is done.

    Raises:
        KblamError: of the unit that failed; those before it are done.
    """
    loaded = Loaded()
    for number, unit in enumerate(units, start=1):
        told = None if progress is None else _prefixed(progress, f"{number} of {len(units)}, {unit}: ")
        done(unit, do_unit(unit, loaded, told))


def do_on_ray(
    units: Sequence[Unit],
    done: Done,
    *,
    num_workers: int,
    gpus_per_worker: float = 0,
    progress: Progress | None = None,
) -> None:
    """Do units by tasks on the running Ray, those that measure time alone and after all others.

    Args:
        done: called in this process with each unit as it comes.
        num_workers: tasks at a time, each with one CPU.
        gpus_per_worker: GPUs of each task.

    Raises:
        InputError: more GPUs are asked for than a local Ray has.
        KblamError: of the first unit that failed.
        EvaluationError: the workers of a unit died again and again.
    """
    import ray

    require_gpus(gpus_per_worker)
    task = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_retries=MAX_RETRIES)(_do)
    timed = [unit for unit in units if unit.part == "cost"]
    total, num_done = len(units), 0

    def count(unit: Unit, result: Found) -> None:
        nonlocal num_done
        num_done += 1
        done(unit, result)
        if progress is not None:
            progress(f"{num_done} of {total} done: {unit}")

    _do_all(task, [unit for unit in units if unit.part != "cost"], count, num_workers)
    _do_all(task, timed, count, 1)


def _do_all(task: Any, units: Sequence[Unit], done: Done, num_workers: int) -> None:
    import ray
    from ray.exceptions import RayError

    waiting = list(units)
    running: dict[Any, Unit] = {}
    failure: KblamError | RayError | None = None
    try:
        while running or (waiting and failure is None):
            while waiting and failure is None and len(running) < num_workers:
                unit = waiting.pop(0)
                running[task.remote(unit)] = unit
            (ready, *_), _ = ray.wait(list(running))
            unit = running.pop(ready)
            try:
                result = ray.get(ready)
            except RayError as error:
                failure = failure or _meant(error, unit)
            else:
                done(unit, result)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if failure is not None:
        raise failure


def _meant(error: Any, unit: Unit) -> Any:
    """What a failed task is to the caller: the unit's own error, or that its workers died."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, KblamError) else error
    return EvaluationError(
        f"the workers died {1 + MAX_RETRIES} times: {str(error).partition(chr(10))[0]}",
        where=str(unit),
        help="see Ray's logs for the reason, most often too little memory: give fewer workers, then run it again;"
        " what is done is kept",
    )


def _do(unit: Unit) -> Found:
    import torch

    # A worker has one CPU; threads of several on the same cores are slower than one each.
    torch.set_num_threads(1)
    return do_unit(unit, _LOADED)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda line: progress(prefix + line)
