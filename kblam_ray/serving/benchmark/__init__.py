"""What a server adds to the engine's own cost, and what a refresh under load costs; see `load` and `refresh`."""

from kblam_ray.serving.benchmark.load import benchmark_load
from kblam_ray.serving.benchmark.refresh import benchmark_refresh
from kblam_ray.serving.benchmark.settings import RefreshBenchmark, ServeBenchmark

__all__ = ["RefreshBenchmark", "ServeBenchmark", "benchmark_load", "benchmark_refresh"]
