"""What is wanted and who serves it: leases of processes, and the one small object that outlives them."""

from kblam_ray.serving.registry.registry import Registry
from kblam_ray.serving.registry.state import State, StateStore

__all__ = ["Registry", "State", "StateStore"]
