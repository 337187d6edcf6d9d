"""Measure one part of the system: `python jobs/benchmark.py NAME [flags]`, and `NAME --help` for its flags.

encode: sentences per second of the local encoder against SentenceTransformer.encode, on one core
embed:  the whole embedding job: facts per second by number of workers, peak memory of every process
load:   a table's embeddings into memory, against lists of float32 in Parquet and against .npy files
"""

import sys
from collections.abc import Callable
from typing import Any

from kblam_ray.encoders.benchmark import EncodeBenchmark, benchmark_encode
from kblam_ray.errors import InputError
from kblam_ray.job import JobConfig, main
from kblam_ray.table.benchmark import LoadBenchmark, benchmark_load
from kblam_ray.table.pipeline.benchmark import EmbedBenchmark, benchmark_embed

BENCHMARKS: dict[str, tuple[type[JobConfig], Callable[[Any], dict[str, Any]]]] = {
    "encode": (EncodeBenchmark, benchmark_encode),
    "embed": (EmbedBenchmark, benchmark_embed),
    "load": (LoadBenchmark, benchmark_load),
}


class NoBenchmark(JobConfig):
    """Stands in where no benchmark is named, so that `--help` lists them."""


def refuse(_: NoBenchmark) -> dict[str, object]:
    raise InputError("no such benchmark", where="command line", help=f"choose one: {', '.join(BENCHMARKS)}")


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in BENCHMARKS:
        del sys.argv[1]
        main("benchmark", *BENCHMARKS[name])
    if not name.startswith("-"):
        del sys.argv[1:]
    main("benchmark", NoBenchmark, refuse)
