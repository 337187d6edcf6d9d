"""What facts cost a base model in time and memory, against no facts and against the published computation."""

from kblam_ray.attention.benchmark.run import benchmark_attention
from kblam_ray.attention.benchmark.settings import AttentionBenchmark

__all__ = ["AttentionBenchmark", "benchmark_attention"]
