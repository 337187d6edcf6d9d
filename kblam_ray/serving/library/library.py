"""The knowledge bases of one process by name: loaded, following their tables, unloaded when memory is short."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import (
    ConflictError,
    DataFileGoneError,
    InputError,
    NotServedError,
    StorageError,
    TableNotFoundError,
    UnavailableError,
)
from kblam_ray.model import KnowledgeModel
from kblam_ray.serving.library.fetcher import Fetcher
from kblam_ray.serving.library.finding import find_facts
from kblam_ray.serving.library.indexing import Indexer
from kblam_ray.serving.library.keeper import Keeper, until
from kblam_ray.serving.library.kept import Kept
from kblam_ray.serving.library.load_queue import LoadQueue
from kblam_ray.serving.library.room import Room
from kblam_ray.serving.library.served import Served
from kblam_ray.serving.library.shelf import Shelf
from kblam_ray.serving.messages import FactFilter, FactsPage, KbRef
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import KnowledgeSettings
from kblam_ray.serving.wanted import KbReport, KbSpec, Wanted

logger = logging.getLogger(__name__)


class Library:
    """Keeps in memory what is wanted, at the version that is wanted.

    Everything but the reading of tables happens on one event loop. A request that got a memory keeps it whatever
    changes; the next one gets the next version.

    Args:
        model: whose adapter attends to the facts.
        on_change: called on the event loop after each switch, failure and recovery.
    """

    def __init__(
        self,
        model: KnowledgeModel,
        settings: KnowledgeSettings,
        metrics: Metrics,
        on_change: Callable[[], None],
    ) -> None:
        self._settings, self._metrics, self._on_change = settings, metrics, on_change
        self._fetcher = Fetcher(model, settings.form)
        self._queue = LoadQueue()
        self._room = Room(settings.budget_bytes, self._kept, self._unload)
        self._indexer = Indexer(settings.index_above)
        self._keeper = Keeper(settings.poll_s, metrics, self._settle, self._announce)
        self._shelves: dict[str, Shelf] = {}
        self._served: dict[str, Served] = {}
        self._is_first = True
        self._is_closed = False

    async def start(self) -> None:
        """Ready to follow what is wanted."""
        self._is_closed = False

    async def close(self) -> None:
        """Follow nothing any more. A table that is being read is read to its end, by a thread that nobody waits for."""
        self._is_closed = True
        tasks = [served.task for served in self._served.values() if served.task is not None]
        for name in list(self._served):
            self._drop(name)
        self._fetcher.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._indexer.close()

    def follow(self, wanted: Wanted) -> None:
        """Serve what is wanted from now on; new ones are loaded in the background, and what is gone is dropped."""
        now = time.monotonic()
        for name in [name for name in self._served if name not in wanted.knowledge_bases]:
            self._drop(name)
            self._metrics.forget_kb(name)
        for name, spec in wanted.knowledge_bases.items():
            served = self._served.get(name)
            if served is not None and served.spec.uri == spec.uri:
                served.move(spec, now)
                continue
            # Versions of another table are other versions: nothing of the old one may answer for the new.
            self._drop(name)
            self._add(name, spec, 0.0 if self._is_first else now)
        self._is_first = False

    async def memory(self, ref: KbRef, min_version: int | None = None, wait_s: float = 5.0) -> KnowledgeMemory:
        """The memory that a request attends to: whole, without a prior. Its version is the one the answer names.

        Args:
            ref: with a version, that one, whatever is served.
            min_version: a newer one will do, an older one not; the table is asked at once.
            wait_s: longest wait for `min_version`.

        Raises:
            NotServedError: no knowledge base of that name, or it lacks the version.
            ConflictError: pinned below `min_version`, or not there in time.
            UnavailableError: it cannot be loaded.
        """
        if ref.version is not None:
            if min_version is not None and ref.version < min_version:
                raise _conflict(ref, ref.version, min_version, "asks for")
            return await self._at_version(ref.name, ref.version)
        deadline = None if min_version is None else time.monotonic() + wait_s
        has_poked: Served | None = None
        while True:
            served, now = self._find(ref.name), time.monotonic()
            if served.shelf is not None:
                served.shelf.ask(now)
            kept = served.kept
            if kept is not None and (min_version is None or kept.version >= min_version):
                return kept.lend(now)
            pinned = served.spec.version
            if min_version is not None and pinned is not None and pinned < min_version:
                raise _conflict(ref, pinned, min_version, "is pinned at")
            if kept is None and served.status == "failed":
                raise UnavailableError(
                    f"the knowledge base {ref.name!r} cannot be loaded: {served.error}",
                    where=served.spec.uri,
                    help="ask again when its table can be read",
                )
            if deadline is not None and now >= deadline:
                assert min_version is not None
                raise _conflict(ref, served.version, min_version, "serves")
            with _waiting(served):
                if has_poked is not served:
                    has_poked = served
                    served.poked.set()
                await until(served.changed, None if deadline is None else deadline - now)

    async def find_facts(self, ref: KbRef, which: FactFilter) -> FactsPage:
        """A page of the facts of the version that a request would be answered from, by ascending id.

        Raises:
            InputError: a limit or a place to begin at that cannot be.
            NotServedError, UnavailableError: see `memory`.
        """
        memory = await self.memory(ref)
        return await asyncio.to_thread(find_facts, memory, which)

    def reports(self) -> dict[str, KbReport]:
        """What is served, by name."""
        now = time.monotonic()
        reports = {name: served.report(now) for name, served in self._served.items()}
        for name, report in reports.items():
            self._metrics.kb_lag_seconds.labels(kb=name).set(report.lag_s)
        return reports

    def selection_for(self, memory: KnowledgeMemory) -> str:
        """The selection of a request that names none: by the size of the knowledge base."""
        is_large = memory.num_facts > self._settings.select_above
        return f"similar:{self._settings.selected_facts}" if is_large else "all"

    def _find(self, name: str) -> Served:
        served = self._served.get(name)
        if served is None and self._is_closed:
            raise UnavailableError("this process is stopping", where=name, help="ask again")
        if served is None:
            raise NotServedError(
                f"there is no knowledge base {name!r}", where="model", help="GET /v1/models lists what can be asked"
            )
        return served

    def _add(self, name: str, spec: KbSpec, asked: float) -> None:
        served = self._served[name] = Served(name, spec, None)
        try:
            served.shelf = self._shelf(spec.uri)
        except InputError as error:
            self._keeper.failed(served, error)
            return
        served.shelf.ask(asked)
        served.task = asyncio.get_running_loop().create_task(self._keeper.keep(served, served.shelf))

    def _shelf(self, uri: str) -> Shelf:
        shelf = Shelf(uri, self._fetcher, self._queue, self._room)
        return self._shelves.setdefault(shelf.uri, shelf)

    def _drop(self, name: str) -> None:
        served = self._served.pop(name, None)
        if served is None:
            return
        if served.task is not None:
            served.task.cancel()
        served.kept = None
        self._indexer.forget(name)
        shelf = served.shelf
        if shelf is not None:
            if any(other.shelf is shelf for other in self._served.values()):
                self._tidy(shelf)
            else:
                shelf.close()
                del self._shelves[shelf.uri]
        self._announce(served)

    def _settle(self, served: Served, newest: Kept | None) -> None:
        """What a switch or a failure leaves to do: let go of what is not needed, and have the new memory indexed."""
        if served.shelf is not None:
            self._tidy(served.shelf)
        self._room.trim(newest)
        if newest is not None and served.kept is newest:
            self._indexer.put(served.name, newest.memory)

    def _unload(self, kept: Kept) -> None:
        for served in self._served.values():
            if served.kept is kept:
                served.unload()
                self._metrics.kb_memory_bytes.labels(kb=served.name).set(0)
                self._indexer.forget(served.name)
                logger.info("knowledge base %s is unloaded: others need the memory", served.name)
                self._announce(served)
        for shelf in self._shelves.values():
            if shelf.kept.get(kept.version) is kept:
                del shelf.kept[kept.version]

    def _kept(self) -> list[Kept]:
        found = [served.kept for served in self._served.values() if served.kept is not None]
        found += [kept for shelf in self._shelves.values() for kept in shelf.kept.values()]
        return list({id(kept): kept for kept in found}.values())

    def _tidy(self, shelf: Shelf) -> None:
        """Let go of versions that no name serves any more and nobody asked for by number."""
        serving = [served.kept for served in self._served.values()]
        for version, kept in list(shelf.kept.items()):
            if not kept.by_version and not any(kept is one for one in serving):
                del shelf.kept[version]

    def _announce(self, served: Served) -> None:
        changed, served.changed = served.changed, asyncio.Event()
        changed.set()
        self._on_change()

    async def _at_version(self, name: str, version: int) -> KnowledgeMemory:
        served, now = self._find(name), time.monotonic()
        shelf = served.shelf
        if shelf is None:
            raise UnavailableError(
                f"the knowledge base {name!r} cannot be loaded: {served.error}",
                where=served.spec.uri,
                help="PUT it with another URI",
            )
        shelf.ask(now)
        kept = shelf.kept.get(version)
        if kept is None:
            try:
                kept = await shelf.obtain(version, await shelf.look())
            except (TableNotFoundError, DataFileGoneError) as error:
                raise NotServedError(
                    f"the knowledge base {name!r} has no version {version} (any more): {error.what}",
                    where=shelf.uri,
                    help="ask for the version served: leave @VERSION away",
                ) from error
            except (StorageError, InputError) as error:
                raise UnavailableError(
                    f"version {version} of the knowledge base {name!r} cannot be loaded: {error}",
                    where=shelf.uri,
                    help="ask again when its table can be read",
                ) from error
            kept.by_version = True
            shelf.keep(kept)
            memory = kept.lend(time.monotonic())
            self._room.trim(kept)
            return memory
        kept.by_version = True
        return kept.lend(now)


def _conflict(ref: KbRef, version: int | None, min_version: int, says: str) -> ConflictError:
    named = "no version yet" if version is None else f"version {version}"
    return ConflictError(
        f"the knowledge base {ref.name!r} {says} {named}, not {min_version} or newer",
        where="min_kb_version",
        help="ask again, or for an older version",
    )


@contextmanager
def _waiting(served: Served) -> Iterator[None]:
    served.num_waiting += 1
    try:
        yield
    finally:
        served.num_waiting -= 1
