"""What a training step costs, against the published computation in the same run."""

from kblam_ray.training.benchmark.run import benchmark_training_step
from kblam_ray.training.benchmark.settings import TrainingStepBenchmark

__all__ = ["TrainingStepBenchmark", "benchmark_training_step"]
