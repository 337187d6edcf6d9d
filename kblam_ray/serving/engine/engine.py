"""The engine of a replica: many questions at a time, one base model, each with its own facts.

Tokens come from continuous batching, in a thread of its own. What is done beside it for each request - the question
prior, the trace of the prompt, citations, the refusal - is short and runs in threads beside it, begun in the order in
which it was asked for. Coroutines only pass on what those say.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from transformers import ContinuousBatchingConfig, GenerationConfig

from kblam_ray.attention.continuous import CPU_MAX_BATCH_TOKENS, CPU_NUM_BLOCKS, KnowledgeBatching
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import GenerationError, InputError, UnavailableError
from kblam_ray.model.generation import stop_ids, trained_positions
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.serving.engine.request import Prepared, Preparing, conclude
from kblam_ray.serving.engine.running import Running
from kblam_ray.serving.engine.sampling import Sampler, TokenChoice
from kblam_ray.serving.engine.writing import VerbatimWriter, Writer
from kblam_ray.serving.messages import Choice, Event, Finished, Piece, Question, Started
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import EngineSettings

BLOCK_TOKENS = 256
"""What a block of the settings holds."""

GPU_MEMORY_SHARE = 0.6
"""Of what is free beside the base model: the rest is for knowledge bases and for the passes beside the engine."""

NUM_BESIDE = 2
"""Threads beside the engine. With one, requests come to the engine so slowly that its batches stay small: a quarter
more computation per verbatim answer, with 32 at a time on two cores. Four gain nothing more."""

T = TypeVar("T")


class Engine:
    """Answers questions, any number at a time. All methods belong to the event loop that called `start`.

    Args:
        model: whose base model no other engine uses.
        settings: size of the cache, and the longest answer by default.
        metrics: of the process.
    """

    def __init__(self, model: KnowledgeModel, settings: EngineSettings, metrics: Metrics) -> None:
        self._model, self._settings, self._metrics = model, settings, metrics
        self._sampler = Sampler()
        self._batching: KnowledgeBatching | None = None
        self._beside: ThreadPoolExecutor | None = None
        self._preparing: Preparing | None = None
        self._running: set[Running] = set()
        self._names = itertools.count()

    async def start(self) -> None:
        """Make the cache and start the threads.

        Raises:
            UnsupportedModelError: the base model's attention is not batched with knowledge.
        """
        if self._batching is not None:
            raise InputError("the engine was started before", where="engine", help="start it once")
        stops = stop_ids(self._model)
        generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._settings.max_tokens,
            eos_token_id=stops or -1,
            pad_token_id=stops[0] if stops else 0,
        )
        batching = KnowledgeBatching(self._model.attachment, generation, self._config(), choose=self._sampler)
        await asyncio.to_thread(batching.__enter__)
        self._batching = batching
        self._beside = ThreadPoolExecutor(NUM_BESIDE, thread_name_prefix="kblam-ray-beside")
        positions = trained_positions(self._model)
        # The last token of an answer is not read again: it needs no place in the cache.
        room = min(batching.capacity + 1, positions) if positions else batching.capacity + 1
        self._preparing = Preparing(self._model, room, self._settings.max_tokens)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(batching, loop), name="kblam-ray-watch", daemon=True).start()

    async def close(self) -> None:
        """Stop at once: requests that run fail with UnavailableError, new ones are refused. Closing twice is fine."""
        batching, self._batching = self._batching, None
        if batching is None:
            return
        for running in list(self._running):
            running.fail(_stopped())
        await asyncio.to_thread(batching.abort)
        await asyncio.to_thread(batching.__exit__, None, None, None)
        if self._beside is not None:
            self._beside.shutdown(wait=False, cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Whether it takes questions: it was started, not closed, and its thread has not died."""
        return self._batching is not None and self._batching.is_running

    @property
    def num_running(self) -> int:
        """Requests in work, those that wait in the engine included."""
        return len(self._running)

    def check(self) -> None:
        """Raises GenerationError if the engine's thread died, UnavailableError if it was not started or is closed."""
        if self._batching is None:
            raise _stopped()
        if not self._batching.is_running:
            raise _died()

    def stream(self, question: Question, memory: KnowledgeMemory | None, selection: str) -> AsyncIterator[Event]:
        """Answer event by event. Closing the iterator, or cancelling its task, ends the request at once.

        Args:
            memory: whole, without a prior; None asks the base model alone.
            selection: "all" or "similar:K".

        Raises:
            InputError: before the first event: a message, a setting or a conversation that cannot be; "verbatim"
                without a memory.
            ContextLengthError, UnsupportedParameterError: before the first event.
            EncoderError and its like: the question must be encoded and cannot be.
            GenerationError: the engine failed.
            UnavailableError: the engine is closed.
        """
        return self._events(question, memory, selection, is_streamed=True)

    async def complete(self, question: Question, memory: KnowledgeMemory | None, selection: str) -> Finished:
        """Answer as a whole, see `stream`; cancelling the task ends the request."""
        async with aclosing(self._events(question, memory, selection, is_streamed=False)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event
        raise _died()

    async def _events(
        self, question: Question, memory: KnowledgeMemory | None, selection: str, *, is_streamed: bool
    ) -> AsyncGenerator[Event, None]:
        self.check()
        assert self._preparing is not None
        began, is_waiting = time.perf_counter(), True
        running = Running(question.request_id)
        self._running.add(running)
        self._metrics.running_requests.inc()
        self._metrics.waiting_requests.inc()
        try:
            prepared = await self._aside(running, self._preparing.prepare, question, memory, selection)
            yield Started(prepared.asked.kb_version, prepared.num_prompt_tokens)
            self._metrics.prompt_tokens.inc(prepared.num_prompt_tokens)
            self._metrics.waiting_requests.dec()
            is_waiting = False
            writing_since = time.perf_counter()
            writers = self._write(running, question, prepared, is_streamed=is_streamed)
            is_first = True
            async for place, text, logprobs in running.pieces(writers):
                if is_first and is_streamed:
                    self._metrics.first_token_seconds.labels(grounding=question.grounding).observe(
                        time.perf_counter() - began
                    )
                is_first = False
                for number in prepared.choices_of(place):
                    yield Piece(number, text, logprobs)
            seconds = time.perf_counter() - writing_since
            choices = await self._aside(running, conclude, self._model, prepared, writers)
            self._count(choices, seconds)
            every = [choices[place] for place in range(len(writers)) for _ in prepared.choices_of(place)]
            yield Finished(tuple(every), prepared.asked.kb_version, prepared.num_prompt_tokens)
        finally:
            self._running.discard(running)
            running.cancel()
            self._metrics.running_requests.dec()
            if is_waiting:
                self._metrics.waiting_requests.dec()

    def _write(self, running: Running, question: Question, prepared: Prepared, *, is_streamed: bool) -> list[Writer]:
        """Queue the request's answers in the engine; their writers."""
        sampling, model = question.sampling, self._model
        tokenizer, ends = model.chat.tokenizer, stop_ids(model)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        prompt_ids, knowledge = prepared.to_write
        writers: list[Writer] = []
        for place in range(prepared.num_written):
            choice = TokenChoice(
                num_prompt_tokens=len(prompt_ids),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                choice=place,
                num_logprobs=sampling.num_logprobs,
            )
            options = (tokenizer, ends, sampling.stop, prepared.max_tokens, choice)
            if prepared.read is None:
                writers.append(Writer(*options))
            else:
                writers.append(VerbatimWriter(prepared.read, model.adapter.config.refusal_text, *options))
            if not prompt_ids:
                running.take(place, (), is_finished=True)
                continue
            # A text that may have to be ended before the model does is looked at token by token.
            is_watched = is_streamed or bool(sampling.stop) or prepared.read is not None
            self._add(running, place, prompt_ids, knowledge, choice, prepared.max_tokens, is_watched=is_watched)
        return writers

    def _add(
        self,
        running: Running,
        place: int,
        prompt_ids: list[int],
        knowledge: KnowledgeMemory | None,
        choice: TokenChoice,
        max_tokens: int,
        *,
        is_watched: bool,
    ) -> None:
        self.check()
        batching, sampler = self._batching, self._sampler
        assert batching is not None
        name = f"{next(self._names)} {running.request_id} {place}"

        def end() -> None:
            sampler.remove(name)
            batching.cancel(name)

        sampler.add(name, choice)
        running.on_end(place, end, lambda: sampler.remove(name))
        try:
            batching.add_request(
                prompt_ids,
                knowledge,
                request_id=name,
                on_output=lambda output: running.take_output(place, output),
                max_new_tokens=max_tokens,
                streaming=is_watched,
            )
        except InputError:
            self.check()  # between the check above and here it may have stopped
            raise

    async def _aside(self, running: Running, call: Callable[..., T], *args: object) -> T:
        """Call in a thread beside the engine; a request that is over before its turn is not called."""
        self.check()
        assert self._beside is not None
        try:
            return await running.unless_failed(asyncio.get_running_loop().run_in_executor(self._beside, call, *args))
        except RuntimeError as error:
            self.check()
            raise GenerationError(
                f"a pass beside the engine failed: {error}",
                where=running.request_id,
                help="see the log of the replica; a smaller budget for knowledge leaves more memory",
            ) from error

    def _count(self, choices: list[Choice], seconds: float) -> None:
        for choice in choices:
            self._metrics.answer_tokens.inc(choice.completion_tokens)
            if choice.completion_tokens and seconds > 0:
                self._metrics.tokens_per_second.observe(choice.completion_tokens / seconds)

    def _config(self) -> ContinuousBatchingConfig:
        num_blocks, max_batch_tokens = self._settings.num_blocks, self._settings.max_batch_tokens
        config = ContinuousBatchingConfig(page_size=BLOCK_TOKENS, max_memory_percent=GPU_MEMORY_SHARE)
        if self._model.device.type == "cpu":
            num_blocks, max_batch_tokens = num_blocks or CPU_NUM_BLOCKS, max_batch_tokens or CPU_MAX_BATCH_TOKENS
        config.num_blocks, config.max_batch_tokens = num_blocks, max_batch_tokens
        return config

    def _watch(self, batching: KnowledgeBatching, loop: asyncio.AbstractEventLoop) -> None:
        batching.join()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._on_thread_end)

    def _on_thread_end(self) -> None:
        for running in list(self._running):
            running.fail(_died() if self._batching is not None else _stopped())


def _died() -> GenerationError:
    return GenerationError("the engine stopped after an error", where="engine", help="its log says why; restart it")


def _stopped() -> UnavailableError:
    return UnavailableError("the engine is not running", where="engine", help="ask again: another replica may answer")
