"""What `KnowledgeBatching` puts into the library's engine: who chooses tokens, and which outputs are kept."""

from __future__ import annotations

import queue
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

Choose = Callable[[torch.Tensor, Sequence[RequestState]], torch.Tensor]
"""Changes the logits [rows, vocabulary], float32, before the engine takes the largest of each of the first rows: those
of the requests given, in their order; further rows mean nothing. Called in the engine's thread."""


class Chooser:
    """Stands among the library's logits processors and says whose the rows are."""

    supports_continuous_batching = True

    def __init__(self, manager: Any, choose: Choose) -> None:
        self._manager, self._choose = manager, choose

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scheduled = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return self._choose(logits, [request.state for request in scheduled if request.has_new_token])


class Outputs(queue.Queue[GenerationOutput]):
    """The library's queue of outputs, without those that nobody will fetch: they would stay for ever.

    Args:
        is_fetched: whether somebody may still ask for outputs of the request of that id.
    """

    def __init__(self, is_fetched: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_fetched = is_fetched

    def put(self, item: GenerationOutput, block: bool = True, timeout: float | None = None) -> None:
        if self._is_fetched(item.request_id):
            super().put(item, block, timeout)


def tokens_that_fit(cache: Any) -> int:
    """Tokens of the longest request that an empty cache holds."""
    empty = RequestState(request_id="", initial_tokens=[])
    fits = partial(cache.can_store_request_tokens, empty, dry_run=True)
    return bisect_left(range(1, cache.max_tokens_read + 1), True, key=lambda length: not fits(length))
