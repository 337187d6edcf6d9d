"""Train an adapter, from tables of facts to a folder with its card: what `jobs/train_adapter.py` runs.

begin (fit, or random, or a given adapter) -> checkpoint of step 0 -> steps on the workers -> finish (calibrate,
evaluate) -> adapter, card, curves. Every part takes up the newest checkpoint: a run that is interrupted anywhere goes
on with `--resume`.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from kblam_ray import storage
from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.errors import InputError
from kblam_ray.model.base_model import read_base_config
from kblam_ray.model.matching import require_encoder
from kblam_ray.table import KnowledgeBase
from kblam_ray.training import card
from kblam_ray.training.checkpoints import CheckpointStore, put_file, require_same
from kblam_ray.training.loop import phases
from kblam_ray.training.loop.deepspeed_config import read_deepspeed_config, require_deepspeed
from kblam_ray.training.loop.plan import CHECKPOINTS, RunPlan, fix_tables, with_absolute_paths
from kblam_ray.training.loop.ranks import AgreedError, Ranks
from kblam_ray.training.loop.reports import METRICS_FILE, BoardHere, Sinks, read_curve
from kblam_ray.training.loop.state import read_notes
from kblam_ray.training.loop.trackers import make_trackers, require_trackers
from kblam_ray.training.loop.worker import train_rank
from kblam_ray.training.settings import CLOSED_FORM, RANDOM, TrainSettings

SETTINGS_FILE = "settings.yaml"


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train and write an adapter; the job's summary.

    Raises:
        InputError and its kinds: settings, tables, base model or adapter that do not go together; an output folder that
            has a run in it, without `resume`.
        TrainingError: the loss is not a number, the run to resume is another one, the workers died too often.
        StorageError: something cannot be written; the last checkpoint is whole.
        KeyboardInterrupt: asked to stop by SIGTERM or Ctrl-C; there is a checkpoint of the last step done.
    """
    started = time.monotonic()
    settings = with_absolute_paths(settings)
    _check_early(settings)
    on_ray = settings.num_workers > 0
    if on_ray:
        from kblam_ray.ray_session import start_ray

        start_ray()
    store = CheckpointStore(storage.join(settings.output, CHECKPOINTS), settings.keep)
    plan, step = _plan(settings, store)
    with _local_folder(settings.output) as folder:
        mirror = settings.output if storage.is_s3(settings.output) else None
        sinks = Sinks(folder, step, tensorboard=settings.tensorboard, mirror=mirror)
        try:
            resumed_from = None if step < 0 else step
            if resumed_from is None:
                _phase(phases.begin, plan, sinks)
                step = 0
                sinks.say(f"the adapter to begin with is in {store.uri}")
            else:
                sinks.say(f"going on from step {step} in {store.uri}")
            trained_at = time.monotonic()
            if settings.method == "train" and step < settings.steps:
                _train(plan, sinks)
            training_s = round(time.monotonic() - trained_at, 2)
            adapter, found = _phase(phases.finish, plan, sinks)
        finally:
            sinks.close()
        found["seconds"] = {
            **found.get("seconds", {}),
            "training": training_s,
            "this_run": round(time.monotonic() - started, 2),
        }
        _write_result(plan, folder, adapter, found)
    return _summary(plan, adapter, found, resumed_from)


def _check_early(settings: TrainSettings) -> None:
    """What can be known to be wrong before anything heavy is loaded."""
    require_trackers(settings)
    if settings.strategy != "ddp":
        read_deepspeed_config(settings.strategy)
        require_deepspeed()
    assert settings.base_model is not None
    base_config = read_base_config(settings.base_model)
    if settings.start in (CLOSED_FORM, RANDOM) or not Path(settings.start).is_dir():
        return
    given = AdapterConfig.read(settings.start)
    given.check_base(base_config)
    for name in ("kind", "kb_layers", "kb_layer_frequency", "kb_scale"):
        wanted = getattr(settings, name)
        if name in settings.model_fields_set and wanted is not None and wanted != getattr(given, name):
            raise InputError(
                f"the adapter to begin with has {name} {getattr(given, name)}, asked for is {name} {wanted}",
                where="--start",
                help="leave that setting out, or begin with another adapter",
            )
    for uri in settings.kb:
        require_encoder(given, KnowledgeBase.open(uri).encoder, where=uri)


def _plan(settings: TrainSettings, store: CheckpointStore) -> tuple[RunPlan, int]:
    """The run to do and the steps of it that are done; -1: not even begun.

    Raises:
        InputError: a run is there and is not to be resumed.
        TrainingError: the run to be resumed is another one.
    """
    newest = store.newest()
    device = _device(settings)
    if newest is not None and not settings.resume:
        raise InputError(
            f"a run is there already, with {newest.step} steps done",
            where=settings.output,
            help="go on with it: --resume; or give another --output",
        )
    if newest is None:
        return RunPlan(settings, fix_tables(settings), device), -1
    with newest.folder() as folder:
        saved = read_notes(folder)["run"]
    tables = tuple((uri, version) for uri, version in saved["tables"])
    # The tables as they were when the run began, whatever has been written to them since.
    plan = RunPlan(settings, tables, device)
    require_same(saved, plan.record(), where=newest.uri)
    return plan, newest.step


def _device(settings: TrainSettings) -> str:
    if settings.device != "auto":
        if settings.device == "cuda" and not settings.num_workers and not torch.cuda.is_available():
            raise InputError("there is no CUDA device here", where="--device", help="give --device cpu")
        return settings.device
    if settings.num_workers:
        import ray

        return "cuda" if ray.cluster_resources().get("GPU", 0) >= settings.gpus_per_worker else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _phase(phase: Callable[..., Any], plan: RunPlan, sinks: Sinks) -> Any:
    if plan.settings.num_workers:
        from kblam_ray.training.loop.ray_workers import run_phase

        return run_phase(phase, plan, sinks)
    return phase(plan, sinks.say)


def _train(plan: RunPlan, sinks: Sinks) -> None:
    """Do the steps that are left; where a signal stops them, that signal's handler is called when all is saved."""
    with _listening() as should_stop:
        if plan.settings.num_workers:
            from kblam_ray.training.loop.ray_workers import require_gpus, train_on_ray

            if plan.device == "cuda":
                import ray

                require_gpus(plan.settings, ray.cluster_resources())
            done = train_on_ray(plan, sinks, should_stop)
        else:
            done = _train_here(plan, sinks, should_stop)
        if done["was_stopped"]:
            sinks.say(f"stopped after step {done['step']}: go on with --resume")


def _train_here(plan: RunPlan, sinks: Sinks, should_stop: Callable[[], bool]) -> dict[str, Any]:
    settings = plan.settings
    trackers = make_trackers(settings)
    needs_group = settings.strategy != "ddp" and not dist.is_initialized()
    if needs_group:
        # DeepSpeed wants a process group, be it of one.
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if plan.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def report(figures: dict[str, Any]) -> None:
        for tracker in trackers:
            tracker.log(figures)

    try:
        done = train_rank(plan, Ranks(0, 1, torch.device(plan.device)), BoardHere(sinks, should_stop), report)
    except AgreedError as agreed:
        raise agreed.error from None
    finally:
        for tracker in trackers:
            tracker.close()
        if needs_group:
            dist.destroy_process_group()
    return {"step": done.step, "was_stopped": done.was_stopped}


@contextmanager
def _listening() -> Iterator[Callable[[], bool]]:
    """While steps are done, the first SIGTERM or Ctrl-C asks to save and stop; it is obeyed when that is done.

    The second one is obeyed at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            _obey(before[signal.Signals(number)], number, frame)

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            _obey(before[signal.Signals(asked[0])], asked[0], None)


def _obey(handler: Any, number: int, frame: Any) -> None:
    if callable(handler):
        handler(number, frame)
    raise KeyboardInterrupt


@contextmanager
def _local_folder(output: str) -> Iterator[Path]:
    """A local folder for what the driver writes: the output itself, or one whose content goes there in the end."""
    if not storage.is_s3(output):
        with storage.storage_errors(output):
            Path(output).mkdir(parents=True, exist_ok=True)
        yield Path(output)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files, path = storage.filesystem(output)
        with storage.storage_errors(output):
            if files.get_file_info(f"{path}/{METRICS_FILE}").is_file:
                with files.open_input_stream(f"{path}/{METRICS_FILE}") as source:
                    (folder / METRICS_FILE).write_bytes(source.read())
        try:
            yield folder
        finally:
            with storage.storage_errors(output):
                for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                    put_file(file, storage.join(output, file.relative_to(folder).as_posix()))


def _write_result(plan: RunPlan, folder: Path, adapter: KnowledgeAdapter, found: dict[str, Any]) -> None:
    """The adapter with its card, the settings and the curves."""
    settings = plan.settings
    written = adapter.to(dtype=getattr(torch, settings.adapter_dtype))
    tables = [
        {"uri": uri, "version": version, "num_facts": KnowledgeBase.open(uri, version).num_facts}
        for uri, version in plan.tables
    ]
    curve = read_curve(folder / METRICS_FILE)
    with storage.storage_errors(settings.output):
        # A card of an earlier end of this run would be kept as somebody's own.
        (folder / card.FILE).unlink(missing_ok=True)
        written.save_pretrained(folder)
        picture = card.draw_curves(curve, folder / card.CURVES_FILE)
        shown = settings.model_dump(mode="json", exclude_defaults=True)
        (folder / SETTINGS_FILE).write_text(yaml.safe_dump(shown, sort_keys=False), encoding="utf-8")
        text = card.text(adapter.config, shown, tables, found, curve, has_picture=picture)
        (folder / card.FILE).write_text(text, encoding="utf-8")
        for name in (card.FILE, SETTINGS_FILE):
            storage.sync(str(folder / name))


def _summary(
    plan: RunPlan, adapter: KnowledgeAdapter, found: dict[str, Any], resumed_from: int | None
) -> dict[str, Any]:
    config = adapter.config
    summary: dict[str, Any] = {
        "adapter": plan.settings.output,
        "kind": config.kind,
        "method": plan.settings.method,
        "base_model": config.base_model,
        "kb_layers": list(config.layers),
        "retrieval_layers": list(config.retrieval_layers),
        "steps": found["step"],
        "resumed_from": resumed_from,
        "num_facts": found.get("num_facts"),
        "tables": [{"uri": uri, "version": version} for uri, version in plan.tables],
        "num_workers": plan.settings.num_workers,
        "strategy": plan.settings.strategy,
        "device": plan.device,
        "parts_s": found["seconds"],
        "calibration": found.get("calibration", {}).get("settings"),
        "evaluation": card.headline(found.get("evaluation")),
    }
    return summary
