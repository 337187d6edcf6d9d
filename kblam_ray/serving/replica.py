"""One replica: a model with its engine, the knowledge bases it serves, and its reports to the registry."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import GenerationError, InputError, KblamError, NotServedError, TableNotFoundError
from kblam_ray.model import KnowledgeModel
from kblam_ray.model.matching import require_encoder
from kblam_ray.serving.engine import Engine
from kblam_ray.serving.library import Library
from kblam_ray.serving.messages import Event, FactFilter, FactsPage, Finished, KbRef, Question
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import ServeSettings
from kblam_ray.serving.wanted import ProcessReport, RegistryLike, TableFound, Wanted
from kblam_ray.table.knowledge_base import KnowledgeBase

logger = logging.getLogger(__name__)

RETRY_S = 0.2
"""Pause before the registry is asked again when it did not answer."""

LOADING_LOOK_S = 0.02
"""How often it is looked whether everything is loaded at the start."""

KERNEL_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
"""oneDNN keeps a kernel for every length of a batch. With its own 1,024 of them a replica grows by hundreds of
megabytes over its first thousands of requests; 64 are as fast."""

T = TypeVar("T")


def load_model(settings: ServeSettings) -> KnowledgeModel:
    """The model that settings name, ready to answer.

    Raises:
        InputError: neither a bundle, nor base model and adapter.
        AdapterError, AdapterMismatchError, UnsupportedModelError: see `KnowledgeModel.from_pretrained`.
    """
    os.environ.setdefault(*KERNEL_CACHE)  # read when the first kernel is compiled
    named = settings.bundle or settings.base_model
    if named is None or (settings.bundle is None and settings.adapter is None):
        raise InputError(
            "no model is named", where="base_model, adapter", help="give a bundle, or a base model and an adapter"
        )
    return KnowledgeModel.from_pretrained(
        named,
        None if settings.bundle else settings.adapter,
        device=settings.device,
        dtype=settings.dtype,
    )


class Replica:
    """Answers questions from the knowledge bases that the registry wants.

    Args:
        registry: says what is wanted; told what is served.
        process_id: names this replica in reports, metrics and logs.
        model: a loaded one; by default the one that the settings name is loaded.
    """

    def __init__(
        self,
        settings: ServeSettings,
        registry: RegistryLike,
        process_id: str,
        model: KnowledgeModel | None = None,
    ) -> None:
        self.process_id = process_id
        self.metrics = Metrics(process_id, "answerer")
        self._settings, self._registry, self._model = settings, registry, model
        self._wanted = Wanted()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._engine: Engine | None = None
        self._library: Library | None = None

    async def start(self) -> None:
        """Load the model and every knowledge base that is wanted; one that cannot be had does not stop the others."""
        if self._model is None:
            self._model = await asyncio.to_thread(load_model, self._settings)
        self._engine = Engine(self._model, self._settings.engine, self.metrics)
        self._library = Library(self._model, self._settings.knowledge, self.metrics, self._changed.set)
        await self._engine.start()
        await self._library.start()
        # The lease comes first: who waits for a version counts this replica from before it reads any.
        await self._report()
        self._follow(await self._registry.wanted())
        self._tasks = [asyncio.create_task(self._keep_reporting()), asyncio.create_task(self._keep_following())]
        while any(report.status == "loading" for report in self._library.reports().values()):
            # Waiting for an event that is set and that others clear would let nobody run.
            await asyncio.sleep(LOADING_LOOK_S)

    async def close(self) -> None:
        """Give the lease back and stop; running requests are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(KblamError):
            await self._registry.leave(self.process_id)
        if self._library is not None:
            await self._library.close()
        if self._engine is not None:
            await self._engine.close()

    def check(self) -> None:
        """Raises GenerationError if this replica cannot answer any more and should be replaced."""
        self.engine.check()
        for task in self._tasks:
            if task.done():
                raise GenerationError(
                    f"the replica does not follow its tables any more: {task.exception()!r}",
                    where=self.process_id,
                    help="see the replica's log; it is replaced",
                )

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "start() comes first"
        return self._engine

    @property
    def library(self) -> Library:
        assert self._library is not None, "start() comes first"
        return self._library

    @property
    def num_running(self) -> int:
        """Requests in work."""
        return self.engine.num_running

    async def stream(self, question: Question) -> AsyncIterator[Event]:
        """See `Backend.stream`."""
        memory = await self._memory(question)
        events = self.engine.stream(question, memory, self._selection(question, memory))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def complete(self, question: Question) -> Finished:
        """See `Backend.complete`."""
        memory = await self._memory(question)
        return await self.engine.complete(question, memory, self._selection(question, memory))

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage:
        """See `Backend.find_facts`."""
        return await self._asking_twice(kb, lambda: self.library.find_facts(kb, which))

    async def inspect(self, uri: str, version: int | None) -> TableFound:
        """Whether a table can be served here: it is there, has the version, and its encoder is the adapter's.

        Raises:
            TableNotFoundError, TableError, StorageError: it cannot be read, or lacks the version.
            EncoderMismatchError: it was made with another encoder than the adapter.
        """
        assert self._model is not None
        config = self._model.adapter.config

        def look() -> TableFound:
            newest = KnowledgeBase.open(uri)
            require_encoder(config, newest.encoder, where=newest.uri)
            if newest.version is None:
                raise TableNotFoundError("the table has no facts yet", where=newest.uri, help="write the first facts")
            asked = newest if version is None else KnowledgeBase.open(uri, version)
            return TableFound(newest.uri, newest.encoder.name, asked.version or 0, newest.version)

        return await asyncio.to_thread(look)

    async def _memory(self, question: Question) -> KnowledgeMemory | None:
        if question.kb is None:
            if question.min_kb_version is not None:
                raise InputError(
                    "a version of no knowledge base",
                    where="min_kb_version",
                    help="name a knowledge base in `model`, as in base:kb",
                )
            return None
        kb, wait_s = question.kb, self._settings.limits.min_version_wait_s
        return await self._asking_twice(kb, lambda: self.library.memory(kb, question.min_kb_version, wait_s))

    async def _asking_twice(self, kb: KbRef, ask: Callable[[], Awaitable[T]]) -> T:
        """A knowledge base that was put a moment ago may be known to the registry only."""
        try:
            return await ask()
        except NotServedError:
            if kb.name in self._wanted.knowledge_bases:
                raise
            wanted = await self._registry.wanted()
            if kb.name not in wanted.knowledge_bases:
                raise
            self._follow(wanted)
            return await ask()

    def _selection(self, question: Question, memory: KnowledgeMemory | None) -> str:
        if question.selection is not None:
            return question.selection
        return "all" if memory is None else self.library.selection_for(memory)

    def _follow(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.library.follow(wanted)

    async def _report(self) -> None:
        self._changed.clear()
        await self._registry.report(
            ProcessReport(
                self.process_id, "answerer", self.library.reports(), self._wanted, metrics=self.metrics.text()
            )
        )

    async def _wait_for_change(self) -> None:
        # Not wait_for: on Python 3.11 it loses a cancellation that comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.replicas.lease_s / 3):
                await self._changed.wait()

    async def _keep_reporting(self) -> None:
        while True:
            try:
                await self._report()
            except KblamError as error:
                logger.warning("the registry does not take a report: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            await self._wait_for_change()

    async def _keep_following(self) -> None:
        while True:
            try:
                wanted = await self._registry.wanted(self._wanted.revision, self._settings.replicas.lease_s)
            except KblamError as error:
                logger.warning("the registry does not say what is wanted: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if wanted.revision != self._wanted.revision:
                self._follow(wanted)


def one_thread_per_core(settings: ServeSettings) -> None:
    """Threads of torch as a replica's share of the machine allows: one core each unless it was given more."""
    if settings.device in (None, "cpu") and not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(settings.replicas.num_cpus)))
