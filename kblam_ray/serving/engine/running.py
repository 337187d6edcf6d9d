"""One request in work: what the engine says of its answers, and how it is ended from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from transformers.generation.continuous_batching.requests import GenerationOutput

from kblam_ray.errors import GenerationError, KblamError
from kblam_ray.serving.engine.writing import Writer
from kblam_ray.serving.messages import TokenLogprob

T = TypeVar("T")


class Running:
    """A request from its first wait to its end; all of it happens on the event loop."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._news = asyncio.Event()
        # Outputs hold all tokens so far: only the last of each answer matters, however late it is looked at.
        self._outputs: dict[int, tuple[Sequence[int], bool]] = {}
        self._cancels: dict[int, Callable[[], None]] = {}
        self._releases: dict[int, Callable[[], None]] = {}
        self._error: KblamError | None = None
        self._waits_for: asyncio.Future | None = None

    def on_end(self, place: int, cancel: Callable[[], None], release: Callable[[], None]) -> None:
        """What to call when an answer in the engine is ended from here, and when it ended by itself."""
        self._cancels[place], self._releases[place] = cancel, release

    def take_output(self, place: int, output: GenerationOutput) -> None:
        """What the engine says of an answer."""
        if output.is_finished():
            self._cancels.pop(place, None)
            self._releases.pop(place, lambda: None)()
        if output.error is not None:
            self.fail(GenerationError(output.error, where=self.request_id, help="the log of the replica has the cause"))
            return
        self.take(place, output.generated_tokens, is_finished=output.is_finished())

    def take(self, place: int, tokens: Sequence[int], *, is_finished: bool) -> None:
        """All tokens of an answer so far."""
        self._outputs[place] = (tokens, is_finished)
        self._news.set()

    def fail(self, error: KblamError) -> None:
        """End with an error; the first one counts."""
        self._error = self._error or error
        self._news.set()
        if self._waits_for is not None:
            self._waits_for.cancel()

    def cancel(self) -> None:
        """End what is still in the engine."""
        for place in list(self._cancels):
            self._end(place)

    async def unless_failed(self, future: asyncio.Future[T]) -> T:
        """The future's result, or the error that the request failed with meanwhile."""
        if self._error is not None:
            future.cancel()
            raise self._error
        self._waits_for = future
        try:
            return await future
        except asyncio.CancelledError:
            if self._error is not None and future.cancelled():
                raise self._error from None
            raise
        finally:
            self._waits_for = None

    async def pieces(self, writers: Sequence[Writer]) -> AsyncIterator[tuple[int, str, tuple[TokenLogprob, ...]]]:
        """Place, text and log probabilities of each piece, until every answer is over.

        Raises:
            KblamError: what `fail` was given.
        """
        while any(writer.finish_reason is None for writer in writers):
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            outputs, self._outputs = self._outputs, {}
            for place, (tokens, is_finished) in outputs.items():
                text, logprobs = writers[place].take(tokens, is_finished=is_finished)
                if writers[place].finish_reason is not None:
                    self._end(place)
                if text or logprobs:
                    yield place, text, logprobs

    def _end(self, place: int) -> None:
        self._releases.pop(place, None)
        cancel = self._cancels.pop(place, None)
        if cancel is not None:
            cancel()
