"""MLflow and Weights & Biases: told of every logged step, by a callback of Ray Train where it runs the workers."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from kblam_ray.errors import MissingDependencyError
from kblam_ray.training.settings import TrainSettings


class Tracker(Protocol):
    """A place where the figures of a run are kept."""

    def log(self, figures: dict[str, Any]) -> None:
        """The figures of one step, `step` among them."""

    def close(self) -> None:
        """The run has ended."""


class MlflowTracker:
    """Reports to an MLflow tracking server."""

    def __init__(self, uri: str, experiment: str, parameters: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
        mlflow.start_run()
        mlflow.log_params({name: str(value)[:500] for name, value in parameters.items()})

    def log(self, figures: dict[str, Any]) -> None:
        # MLflow takes no @ in names.
        named = {name.replace("@", "_at_"): float(value) for name, value in figures.items() if name != "step"}
        self._mlflow.log_metrics(named, step=int(figures["step"]))

    def close(self) -> None:
        self._mlflow.end_run()


class WandbTracker:
    """Reports to Weights & Biases."""

    def __init__(self, project: str, parameters: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, config=parameters)

    def log(self, figures: dict[str, Any]) -> None:
        named = {name: float(value) for name, value in figures.items() if name != "step"}
        self._run.log(named, step=int(figures["step"]))

    def close(self) -> None:
        self._run.finish()


def require_trackers(settings: TrainSettings) -> None:
    """Raises MissingDependencyError for a tracker that is asked for and not installed."""
    for package, flag, wanted in (
        ("mlflow", "--mlflow-uri", settings.mlflow_uri),
        ("wandb", "--wandb-project", settings.wandb_project),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"{package} is not installed", where=flag, help=f"pip install {package}, or leave {flag} out"
            )


def make_trackers(settings: TrainSettings) -> list[Tracker]:
    """The trackers that the settings name."""
    parameters = settings.model_dump(mode="json")
    found: list[Tracker] = []
    if settings.mlflow_uri:
        found.append(MlflowTracker(settings.mlflow_uri, settings.mlflow_experiment, parameters))
    if settings.wandb_project:
        found.append(WandbTracker(settings.wandb_project, parameters))
    return found


def ray_callbacks(settings: TrainSettings) -> list[Any]:
    """Callbacks of Ray Train, which its controller tells what the workers report; none where nobody listens."""
    if not (settings.mlflow_uri or settings.wandb_project):
        return []
    from ray.train import UserCallback

    class Tell(UserCallback):
        """Made here, pickled to the controller; the trackers are made there, at the first report."""

        def __init__(self) -> None:
            self._trackers: list[Tracker] | None = None

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if self._trackers is None:
                self._trackers = make_trackers(settings)
            for tracker in self._trackers:
                tracker.log(metrics[0])  # the figures are over all ranks: each reports the same

    return [Tell()]
