"""The processes of one training as a rank sees them: what they agree on, add up and tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kblam_ray.errors import KblamError


class AgreedError(Exception):
    """An error that every rank raises at the same point: the run ends, and trying again would end it the same way."""

    def __init__(self, error: KblamError) -> None:
        super().__init__(str(error))
        self.error = error

    def __reduce__(self) -> tuple:
        return AgreedError, (self.error,)


@dataclass(frozen=True)
class Ranks:
    """One rank of `world_size`; with one there is no process group and nothing to tell.

    Attributes:
        device: of this rank's model.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks: float64, on the device it came from."""
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers

    def tell(self, message: Any) -> Any:
        """What the first rank says, on every rank."""
        if self.world_size == 1:
            return message
        told = [message]
        dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]

    def gather(self, message: Any) -> list[Any]:
        """What each rank says, on every rank."""
        if self.world_size == 1:
            return [message]
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, message)
        return told

    def first_does(self, work: Any) -> Any:
        """Run a function on the first rank; every rank has its result, or raises its error.

        Without it, a disk that is full on the first rank would leave the others waiting for ever.

        Raises:
            AgreedError: the function raised an error of ours.
        """
        outcome: tuple[Any, KblamError | None] = (None, None)
        if self.is_first:
            try:
                outcome = (work(), None)
            except KblamError as error:
                outcome = (None, error)
        result, failure = self.tell(outcome)
        if failure is not None:
            raise AgreedError(failure)
        return result
