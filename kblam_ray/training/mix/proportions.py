"""Which kind each example of a training step is: stated shares, exact in every step and even over workers.

The examples of a step are sorted by kind and turned by an offset of the step's own. A worker takes every W-th of them,
so that each has every kind in its proportion whatever the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kblam_ray.errors import InputError
from kblam_ray.facts.synthetic.draws import Draws, number_of

_GOLDEN = (math.sqrt(5) - 1) / 2
_OFFSET = number_of("offset of a step")


def counts(shares: Mapping[str, float], batch_size: int, step: int, seed: int) -> dict[str, int]:
    """How many examples of each kind a step has: each share of `batch_size` rounded up or down, `batch_size` in all.

    What is left by rounding down goes to kinds at even spaces (systematic sampling, so that the mean over many steps
    is the share itself) from a start that moves by the golden ratio from step to step.

    Args:
        shares: of each kind, in any unit, 0 or more.
    """
    total = math.fsum(shares.values())
    exact = {kind: share * batch_size / total for kind, share in shares.items()}
    # A share that is meant to be whole, such as 0.1 of 30, must not lose its last example to rounding of floats.
    found = {kind: math.floor(value + 1e-9) for kind, value in exact.items()}
    left = batch_size - sum(found.values())
    start = (Draws(seed, _OFFSET).below(1 << 32) / (1 << 32) + step * _GOLDEN) % 1.0
    reached, taken = 0.0, 0
    for kind, value in exact.items():
        reached += max(0.0, value - found[kind])
        if taken < left and reached > taken + start:
            found[kind] += 1
            taken += 1
    for kind in sorted(exact, key=lambda kind: found[kind] - exact[kind]):
        # The last space may begin behind the last kind.
        if taken == left:
            break
        found[kind] += 1
        taken += 1
    return found


def kinds(shares: Mapping[str, float], batch_size: int, step: int, seed: int) -> list[str]:
    """The kind of each of a step's examples."""
    ordered = [kind for kind, count in counts(shares, batch_size, step, seed).items() for _ in range(count)]
    turned = Draws(seed, _OFFSET, step).below(batch_size)
    return ordered[turned:] + ordered[:turned]


@dataclass(frozen=True)
class Share:
    """Which part of every step a worker does.

    Attributes:
        rank: of the worker, from 0.
        world_size: number of workers.
        accumulation: micro-batches per step and worker.
    """

    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def numbers(self, step: int, batch_size: int) -> list[int]:
        """The numbers of this worker's examples in a step.

        Those of all workers are `step * batch_size` to `(step + 1) * batch_size - 1`, each once.

        Raises:
            InputError: the batch cannot be dealt out evenly over workers and micro-batches.
        """
        if not 0 <= self.rank < self.world_size or self.accumulation < 1:
            raise InputError(
                f"rank {self.rank} of {self.world_size} workers with {self.accumulation} micro-batches",
                where="training",
                help="give ranks from 0, and at least one micro-batch",
            )
        if batch_size % (self.world_size * self.accumulation):
            raise InputError(
                f"a batch of {batch_size} examples for {self.world_size} workers with {self.accumulation}"
                " micro-batches each",
                where="batch_size",
                help="choose a batch size that is a multiple of workers times micro-batches",
            )
        return list(range(step * batch_size + self.rank, (step + 1) * batch_size, self.world_size))
