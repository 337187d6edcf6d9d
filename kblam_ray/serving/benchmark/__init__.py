"""What a server adds to the engine's own cost, what a refresh costs under load, and how soon files are served."""

from kblam_ray.serving.benchmark.follow import benchmark_follow
from kblam_ray.serving.benchmark.load import benchmark_load
from kblam_ray.serving.benchmark.refresh import benchmark_refresh
from kblam_ray.serving.benchmark.settings import FollowBenchmark, RefreshBenchmark, ServeBenchmark

__all__ = [
    "FollowBenchmark",
    "RefreshBenchmark",
    "ServeBenchmark",
    "benchmark_follow",
    "benchmark_load",
    "benchmark_refresh",
]
