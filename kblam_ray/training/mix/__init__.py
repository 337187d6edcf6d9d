"""The data mix: which questions and texts a training step sees, and beside which facts."""

from kblam_ray.training.mix.settings import LossSettings, MixSettings

__all__ = ["LossSettings", "MixSettings"]
