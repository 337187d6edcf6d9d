"""What the ranks say while they train, and who listens: the screen, a file of JSON lines, TensorBoard, trackers.

The first rank tells a `Board`; with Ray that is an actor, which also carries the wish to stop the other way. The driver
hands what it hears to its `Sinks`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from kblam_ray import storage
from kblam_ray.errors import MissingDependencyError, StorageError
from kblam_ray.training.checkpoints import put_file

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Event = dict[str, Any]
"""`kind`: "step" (with `step` and figures), "evaluation" (with `step` and figures), "checkpoint" or "say" (a text)."""


class Board(Protocol):
    """Between the driver and the ranks."""

    def post(self, event: Event) -> None:
        """Tell the driver."""

    def wants_stop(self) -> bool:
        """Whether the driver asks the ranks to save and stop."""


class BoardHere:
    """For a rank that is in the driver's process: what is told is heard at once."""

    def __init__(self, sinks: Sinks, should_stop: Callable[[], bool]) -> None:
        self._sinks, self._should_stop = sinks, should_stop

    def post(self, event: Event) -> None:
        self._sinks.take([event])

    def wants_stop(self) -> bool:
        return self._should_stop()


class BoardContent:
    """The actor behind `BoardFar`."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False

    def post(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken

    def stop(self) -> None:
        self._stop = True

    def wants_stop(self) -> bool:
        return self._stop


class BoardFar:
    """A handle to the actor, for a rank in another process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def post(self, event: Event) -> None:
        import ray

        # Waits: what was told before a worker died was heard.
        ray.get(self._actor.post.remote(event))

    def wants_stop(self) -> bool:
        import ray

        return bool(ray.get(self._actor.wants_stop.remote()))


class Curve:
    """The figures of each step that was logged, as JSON lines in a local file; a step that is done again replaces."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Go on with a curve.

        Args:
            path: of the file, there or not.
            first_step: steps that come after it are forgotten: they will be done again.
        """
        self._path = path
        kept = [event for event in read_curve(path) if event["step"] <= first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_line(event) for event in kept), encoding="utf-8")

    def add(self, event: Event) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(event))
        except OSError as error:
            raise StorageError(
                f"the curve cannot be written: {error.strerror}",
                where=str(self._path),
                help="free some space, then go on with --resume",
            ) from None


def read_curve(path: Path) -> list[Event]:
    """The events of a curve, the last one of each step and kind; a line that was cut off is left out."""
    found: dict[tuple[str, int], Event] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # written by a process that was killed meanwhile
            found[event["kind"], event["step"]] = event
    return sorted(found.values(), key=lambda event: (event["step"], event["kind"]))


def _line(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


class Sinks:
    """The driver's ears: stderr, the curve, TensorBoard.

    Args:
        folder: local folder of the curve and the event files.
        first_step: steps done before.
        tensorboard: write event files.
        mirror: `s3://` folder to which the curve is copied at every checkpoint.

    Raises:
        MissingDependencyError: TensorBoard is asked for and its writer is not installed.
    """

    def __init__(self, folder: Path, first_step: int, *, tensorboard: bool, mirror: str | None = None) -> None:
        self._file, self._mirror = folder / METRICS_FILE, mirror
        self._curve = Curve(folder / METRICS_FILE, first_step)
        self._writer = _tensorboard(folder / TENSORBOARD_FOLDER, first_step) if tensorboard else None
        self._started = time.monotonic()

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        if event["kind"] in ("step", "evaluation"):
            self._curve.add(event)
            for name, value in event.items():
                if self._writer is not None and isinstance(value, float):
                    place = name if "/" in name else f"{'train' if event['kind'] == 'step' else 'held_out'}/{name}"
                    # Of an @ it makes an underscore, with a warning each time.
                    self._writer.add_scalar(place.replace("@", "_at_"), value, event["step"])
        elif event["kind"] == "checkpoint" and self._mirror is not None:
            with storage.storage_errors(self._mirror):
                put_file(self._file, storage.join(self._mirror, METRICS_FILE))
        self.say(_human(event))

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        print(f"train_adapter: {minutes:d}:{seconds:02d} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _human(event: Event) -> str:
    if event["kind"] == "say":
        return str(event["text"])
    if event["kind"] == "checkpoint":
        return f"step {event['step']}: checkpoint {event['uri']}"
    figures = ", ".join(f"{name} {_number(value)}" for name, value in event.items() if isinstance(value, float))
    return f"step {event['step']}: {'held out: ' if event['kind'] == 'evaluation' else ''}{figures}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"TensorBoard's files need the package {error.name}",
            where="--tensorboard",
            help="pip install 'kblam-ray[train]', or give --no-tensorboard",
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step > 0 else None, flush_secs=30)
