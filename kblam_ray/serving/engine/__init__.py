"""Answers to many questions at a time from one base model, each with its own facts."""

from kblam_ray.serving.engine.engine import Engine

__all__ = ["Engine"]
