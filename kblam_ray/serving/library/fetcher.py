"""The work of reading tables, in threads: look for new versions, load whole ones, fetch what changed between two."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import StorageError, UnavailableError
from kblam_ray.model import KnowledgeModel
from kblam_ray.model.mentions import named_facts
from kblam_ray.serving.library.load_queue import LOADS_AT_A_TIME
from kblam_ray.table.following import TableFollower
from kblam_ray.table.knowledge_base import KnowledgeBase
from kblam_ray.table.log import TableLog

LOOKS_AT_A_TIME = 32
"""A look waits for the store and computes nothing; those that wait for a dead store must not hold up the others."""

FETCHES_AT_A_TIME = 4

T = TypeVar("T")


class Sighting(NamedTuple):
    """The newest version that a look found, and the table's history that it belongs to."""

    log: TableLog
    history: int


class Fetcher:
    """Reads tables for one model. All methods may be called by any number of tasks of one event loop.

    Raises:
        Each method: TableNotFoundError, TableError, StorageError, see `TableLog.open`.
    """

    def __init__(self, model: KnowledgeModel, form: str) -> None:
        self._model, self._form = model, form
        self._is_closed = False
        self._looks = ThreadPoolExecutor(LOOKS_AT_A_TIME, thread_name_prefix="kb-look")
        self._fetches = ThreadPoolExecutor(FETCHES_AT_A_TIME, thread_name_prefix="kb-fetch")
        self._loads = ThreadPoolExecutor(LOADS_AT_A_TIME, thread_name_prefix="kb-load")

    async def look(self, follower: TableFollower, one_at_a_time: threading.Lock) -> Sighting:
        """The newest version of a table now. Whoever cancels this leaves the thread to finish, so it has the lock."""

        def look() -> Sighting:
            with one_at_a_time:
                return Sighting(follower.look(), follower.history)

        return await self._run(self._looks, look)

    async def open(self, sighting: Sighting, version: int) -> TableLog:
        """Another version of a table that was seen."""

        def open_log() -> TableLog:
            log = TableLog.open(sighting.log.uri, version)
            if log.table_id != sighting.log.table_id:
                raise StorageError("the table was exchanged while it was read", where=log.uri, help="ask again")
            log.files  # noqa: B018 - read here and not on the event loop
            return log

        return sighting.log if version == sighting.log.version else await self._run(self._looks, open_log)

    async def load(self, log: TableLog) -> KnowledgeMemory:
        """All facts of a version.

        Raises:
            EncoderMismatchError: the table was made with another encoder than the adapter.
        """

        def load() -> KnowledgeMemory:
            return _warmed(self._model.load(KnowledgeBase.at(log), form=self._form))

        return await self._run(self._loads, load)

    async def refresh(self, memory: KnowledgeMemory, of: TableLog, to: TableLog) -> KnowledgeMemory:
        """The memory of another version, older or newer, from what changed between the two.

        Args:
            of: the version of `memory`.

        Raises:
            InputError: the two cannot be compared.
            EncoderMismatchError: as for `load`.
        """

        def refresh() -> KnowledgeMemory:
            return _warmed(self._model.refresh(memory, KnowledgeBase.at(to, [of])))

        return await self._run(self._fetches, refresh)

    def close(self) -> None:
        """Begin nothing more. What runs ends by itself, and nobody gets its result."""
        self._is_closed = True
        for threads in (self._looks, self._fetches, self._loads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise UnavailableError("this process is stopping", help="ask again")
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def _warmed(memory: KnowledgeMemory) -> KnowledgeMemory:
    """The memory, with what is made of a chunk once made now and not by the first question."""
    with torch.no_grad():
        for view in memory.views:
            view.chunk.fact_scale_M(memory.adapter)
    named_facts(memory, "")
    return memory
