"""The ranks as Ray Train workers: as many as asked for, started again when they fail, told to stop when the job is."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import InputError, KblamError, TrainingError
from kblam_ray.training.loop.plan import RunPlan
from kblam_ray.training.loop.reports import BoardContent, BoardFar, Sinks
from kblam_ray.training.loop.trackers import ray_callbacks
from kblam_ray.training.settings import TrainSettings

HEADROOM_CPUS = 0.5
"""Left to Ray's own tasks: a worker group that asks for every logical CPU waits for ever."""

LEAST_CPUS = 0.25
POLL_S = 0.3
COLLECTIVE_TIMEOUT_S = 3_600
"""How long ranks wait for each other: while the first one writes a checkpoint or evaluates, too."""

RAY_FOLDER = "ray"


def cpus_per_worker(settings: TrainSettings, total: float, is_local: bool) -> float:
    """Logical CPUs to set aside for each worker.

    Args:
        total: logical CPUs of the machine or cluster.
        is_local: no cluster, to which CPUs might be added while the workers wait.

    Raises:
        InputError: there are not so many.
    """
    workers, wanted = settings.num_workers, settings.cpus_per_worker
    if wanted is None:
        if not is_local:
            return 1.0
        if workers > total:
            raise InputError(
                f"{workers} workers for {total:g} logical CPUs",
                where="--num-workers",
                help=f"give at most {int(total)}, or say with --cpus-per-worker that they are to share",
            )
        return min(1.0, (total - HEADROOM_CPUS) / workers)
    if is_local and workers * wanted > total - HEADROOM_CPUS + 1e-9:
        raise InputError(
            f"{workers} workers of {wanted:g} CPUs each ask for {workers * wanted:g} of {total:g} logical CPUs",
            where="--cpus-per-worker",
            help=f"leave {HEADROOM_CPUS:g} to Ray itself: at most {(total - HEADROOM_CPUS) / workers:.2f} each",
        )
    return wanted


def require_gpus(settings: TrainSettings, resources: dict[str, float]) -> None:
    """Raises InputError where fewer GPUs are there than the workers ask for."""
    there, wanted = resources.get("GPU", 0.0), settings.num_workers * settings.gpus_per_worker
    if wanted > there:
        raise InputError(
            f"{settings.num_workers} workers ask for {wanted:g} GPUs, {there:g} are there",
            where="--gpus-per-worker",
            help="give fewer workers, or --device cpu",
        )


def train_on_ray(plan: RunPlan, sinks: Sinks, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Train to the end, or until asked to stop; Ray is running.

    Args:
        should_stop: asked again and again while the workers train.

    Returns:
        `step` and `was_stopped`.

    Raises:
        KblamError: what the workers agreed on, or what one of them raised after the last restart.
        TrainingError: workers died more often than they are started again.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings = plan.settings
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # Attaches the controller's and workers' loggers to nothing that writes on the driver's stdout.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    resources = ray.cluster_resources()
    is_cuda = plan.device == "cuda"
    per_worker = {"CPU": cpus_per_worker(settings, resources.get("CPU", 0.0), not os.environ.get("RAY_ADDRESS"))}
    if is_cuda:
        per_worker["GPU"] = settings.gpus_per_worker
    board = board_beside_driver()
    files, path = storage.filesystem(storage.join(settings.output, RAY_FOLDER))
    trainer = TorchTrainer(
        _train_function,
        train_loop_config={"plan": plan, "board": board},
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers, use_gpu=is_cuda, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=f"run-{os.getpid()}",
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=ray_callbacks(settings),
        ),
        torch_config=TorchConfig(backend="nccl" if is_cuda else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except TrainingFailedError as error:
            outcome["error"] = error

    # In another thread, so that signals find this one free to tell the workers.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(POLL_S)
        sinks.take(ray.get(board.take.remote()))
        if should_stop():
            # Again and again: a board that was started anew knows nothing of it.
            ray.get(board.stop.remote())
            if not told:
                told = True
                sinks.say("stopping: the workers finish their step and save")
    sinks.take(ray.get(board.take.remote()))
    if not storage.is_s3(settings.output):
        shutil.rmtree(Path(settings.output) / RAY_FOLDER, ignore_errors=True)
    if "error" in outcome:
        raise _ours(outcome["error"]) from None
    if "result" not in outcome:
        raise TrainingError("Ray Train ended without a result", where="Ray", help="see Ray's logs, then --resume")
    returned = outcome["result"].return_value
    if isinstance(returned.get("error"), KblamError):
        raise returned["error"]
    return dict(returned)


def board_beside_driver() -> Any:
    """An actor of `BoardContent` on the driver's node, started again if it dies.

    On another node it would take the run along when that node dies, for which Ray Train itself has a remedy. What was
    posted and not taken yet when its process died is lost: figures of a fraction of a second.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(**options)(BoardContent).remote()


def run_phase(phase: Callable[..., Any], plan: RunPlan, sinks: Sinks) -> Any:
    """Run a phase in a Ray task with a worker's devices; what it says is heard here.

    Raises:
        KblamError: what the phase raised.
        TrainingError: the workers that ran it died more often than they are started again.
    """
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    board = board_beside_driver()
    gpus = plan.settings.gpus_per_worker if plan.device == "cuda" else 0
    task = ray.remote(num_cpus=LEAST_CPUS, num_gpus=gpus, max_retries=plan.settings.max_failures)(_phase)
    reference = task.remote(phase, plan, board)
    try:
        while not ray.wait([reference], timeout=POLL_S)[0]:
            sinks.take(ray.get(board.take.remote()))
        sinks.take(ray.get(board.take.remote()))
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, KblamError):
            raise error.cause from None
        raise
    except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
        raise TrainingError(
            f"a worker died once too often: {str(error).splitlines()[0]}",
            where="Ray",
            help="had it memory enough? Start it again with --resume",
        ) from None


def _phase(phase: Callable[..., Any], plan: RunPlan, actor: Any) -> Any:
    board = BoardFar(actor)
    return phase(plan, lambda text: board.post({"kind": "say", "text": text}))


def _train_function(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from kblam_ray.training.loop.ranks import AgreedError, Ranks
    from kblam_ray.training.loop.worker import train_rank

    plan: RunPlan = config["plan"]
    context = ray.train.get_context()
    if plan.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device(get_device())
    if device.type == "cuda":
        # Workers of one machine may see all of its GPUs.
        torch.cuda.set_device(device)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    has_trackers = plan.settings.mlflow_uri or plan.settings.wandb_project
    try:
        done = train_rank(plan, ranks, BoardFar(config["board"]), ray.train.report if has_trackers else None)
    except AgreedError as agreed:
        # Returned, not raised: started again, it would end the same way.
        return {"error": agreed.error}
    return {"step": done.step, "was_stopped": done.was_stopped}


def _ours(error: Any) -> KblamError:
    """What made Ray Train give up, as an error of ours."""
    failures = getattr(error, "worker_failures", {})
    for rank in sorted(failures):
        cause = failures[rank]
        while cause is not None:
            if isinstance(cause, KblamError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    first = next((f"rank {rank}: {failures[rank]}" for rank in sorted(failures)), str(error))
    lines = [line for line in first.splitlines() if line.strip()]
    return TrainingError(
        f"the workers failed once too often: {lines[0] if lines else type(error).__name__}"
        + (f" ... {lines[-1].strip()}" if len(lines) > 1 else ""),
        where="Ray Train",
        help="the newest checkpoint is whole: mend the cause and go on with --resume",
    )
