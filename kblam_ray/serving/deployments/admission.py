"""How many requests a gateway lets in: as many as the answerers work on, as many more as may wait, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kblam_ray.errors import OverloadedError
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import LimitSettings


class Admission:
    """Counts the requests of one gateway. Serve's own queues are bounded, too, but count a burst as all waiting.

    Args:
        num_gateways: that share the answerers.

    Attributes:
        num_answerers: that live; whoever knows sets it.
    """

    def __init__(self, limits: LimitSettings, metrics: Metrics, num_gateways: int = 1) -> None:
        self.num_answerers = 1
        self._limits, self._metrics, self._num_gateways = limits, metrics, num_gateways
        self._num_inside = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request for as long as the block lasts.

        Raises:
            OverloadedError: as many wait already as may.
        """
        num_waiting = self._num_inside - self._num_places()
        if num_waiting >= self._limits.max_queued_requests:
            raise OverloadedError(
                f"{num_waiting} requests wait, and no more may",
                where="max_queued_requests",
                help="ask again in a moment, or let the server have more replicas",
            )
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _num_places(self) -> int:
        """Requests that are worked on at a time, this gateway's share of them."""
        # While none lives, one is on its way.
        places = max(1, self.num_answerers) * self._limits.max_ongoing_requests
        return -(-places // self._num_gateways)

    def _count(self, change: int) -> None:
        self._num_inside += change
        self._metrics.waiting_requests.set(max(0, self._num_inside - self._num_places()))
