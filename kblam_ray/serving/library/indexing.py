"""Builds approximate indexes of large knowledge bases in the background; until then they are searched exactly."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import KblamError
from kblam_ray.model.nearest import index_memory

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 8
"""Chunks with fewer facts than `index_above` over this are searched exactly: that costs little beside the rest."""


class Indexer:
    """One index at a time; of a knowledge base that changes meanwhile, the newest version is next.

    Args:
        index_above: memories with more facts get an index.
    """

    def __init__(self, index_above: int) -> None:
        self._index_above = index_above
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kb-index")
        self._next: dict[str, KnowledgeMemory] = {}
        self._task: asyncio.Task[None] | None = None

    def put(self, name: str, memory: KnowledgeMemory) -> None:
        """Have a memory indexed if it is large. What it has already is not made again."""
        self._next.pop(name, None)
        if memory.num_facts <= self._index_above:
            return
        self._next[name] = memory
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    def forget(self, name: str) -> None:
        """Index it no more, if its turn has not come yet."""
        self._next.pop(name, None)

    async def close(self) -> None:
        """Begin nothing more; what runs ends by itself."""
        self._next.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        min_rows = max(1, self._index_above // SMALLEST_SHARE)
        loop = asyncio.get_running_loop()
        while self._next:
            name, memory = self._next.popitem()
            try:
                await loop.run_in_executor(self._thread, partial(index_memory, memory, min_rows=min_rows))
            except KblamError as error:
                logger.warning("knowledge base %s has no index and is searched exactly: %s", name, error)
