"""The knowledge bases that one process holds in memory, each following its table."""

from kblam_ray.serving.library.library import Library

__all__ = ["Library"]
