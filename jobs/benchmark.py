"""Measure one part of the system: `python jobs/benchmark.py NAME [flags]`, and `NAME --help` for its flags.

encode:    sentences per second of the local encoder against SentenceTransformer.encode, on one core
embed:     the whole embedding job: facts per second by number of workers, peak memory of every process
load:      a table's embeddings into memory, against lists of float32 in Parquet and against .npy files
attention: what facts cost a base model in time and memory, against no facts and against the published computation
nearest:   finding the facts nearest to a question through an index, against comparing all of them
training-step: tokens per second of a training step, against the published computation
serve:     requests per second and time to first token over HTTP, against the engine in one process and one at a time
refresh:   facts that change under load: errors, contradictions, p99, seconds from commit to served
follow:    files that come and change: seconds from file to commit and to every replica, exactness, answers meanwhile
"""

import sys
from importlib import import_module
from typing import Any, NoReturn

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.job import JobConfig, main

BENCHMARKS = {
    "encode": ("kblam_ray.encoders.benchmark", "EncodeBenchmark", "benchmark_encode"),
    "embed": ("kblam_ray.table.pipeline.benchmark", "EmbedBenchmark", "benchmark_embed"),
    "load": ("kblam_ray.table.benchmark", "LoadBenchmark", "benchmark_load"),
    "attention": ("kblam_ray.attention.benchmark", "AttentionBenchmark", "benchmark_attention"),
    "nearest": ("kblam_ray.model.benchmark", "NearestBenchmark", "benchmark_nearest"),
    "training-step": ("kblam_ray.training.benchmark", "TrainingStepBenchmark", "benchmark_training_step"),
    "serve": ("kblam_ray.serving.benchmark", "ServeBenchmark", "benchmark_load"),
    "refresh": ("kblam_ray.serving.benchmark", "RefreshBenchmark", "benchmark_refresh"),
    "follow": ("kblam_ray.serving.benchmark", "FollowBenchmark", "benchmark_follow"),
}
"""Module, settings and function of each: only the one asked for is imported, so that it needs only its own packages."""

EXTRAS = {
    "attention": "model",
    "nearest": "serve",
    "training-step": "model",
    "serve": "serve",
    "refresh": "serve",
    "follow": "serve",
}
"""What to install where a package is missing; `local` for the others."""


class NoBenchmark(JobConfig):
    """Stands in where no benchmark is named, so that `--help` lists them."""


def refuse(_: NoBenchmark) -> dict[str, object]:
    raise InputError("no such benchmark", where="command line", help=f"choose one: {', '.join(BENCHMARKS)}")


def with_demo_model(settings: Any) -> Any:
    """The settings with the demo's base model and adapter where they have these fields and name neither."""
    fields = type(settings).model_fields
    if not {"base_model", "adapter"} <= fields.keys() or settings.base_model or settings.adapter:
        return settings
    from kblam_ray.demo.shipped import ADAPTER, BASE_MODEL

    return settings.model_copy(update={"base_model": str(BASE_MODEL), "adapter": str(ADAPTER)})


def run(name: str) -> NoReturn:
    module, settings, function = BENCHMARKS[name]
    try:
        part = import_module(module)
    except ModuleNotFoundError as error:
        missing, extra = error.name, EXTRAS.get(name, "local")
        if missing is None or missing.partition(".")[0] == "kblam_ray":
            raise

        def refuse_without(_: NoBenchmark) -> dict[str, Any]:
            raise MissingDependencyError(
                f"{missing} is not installed", where=f"benchmark {name}", help=f"pip install 'kblam-ray[{extra}]'"
            )

        del sys.argv[1:]
        main("benchmark", NoBenchmark, refuse_without)
    measure = getattr(part, function)
    main("benchmark", getattr(part, settings), lambda given: measure(with_demo_model(given)))


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in BENCHMARKS:
        del sys.argv[1]
        run(name)
    if not name.startswith("-"):
        del sys.argv[1:]
    main("benchmark", NoBenchmark, refuse)
