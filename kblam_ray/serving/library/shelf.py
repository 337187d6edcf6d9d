"""The versions of one table that are in memory, made of one another where that is cheaper than loading."""

from __future__ import annotations

import asyncio
import threading

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import DataFileGoneError, InputError, KblamError, UnavailableError
from kblam_ray.serving.library.fetcher import Fetcher, Sighting
from kblam_ray.serving.library.kept import Kept
from kblam_ray.serving.library.load_queue import LoadQueue
from kblam_ray.serving.library.room import Room
from kblam_ray.table.following import TableFollower
from kblam_ray.table.log import TableLog


class NoRoomError(KblamError):
    """Nobody asked for a knowledge base and the budget is used up: it is loaded when somebody asks."""

    code = "no_room"


class Shelf:
    """One table. Any number of names may serve it, each at its own version.

    Attributes:
        uri: normalised location.
        kept: by version; all of one history.
        last_asked: when a request last asked for any version; 0: never.

    Raises:
        InputError: a location that no table can have.
    """

    def __init__(self, uri: str, fetcher: Fetcher, queue: LoadQueue, room: Room) -> None:
        self._follower = TableFollower(uri)
        self.uri = self._follower.uri
        self.kept: dict[int, Kept] = {}
        self.last_asked = 0.0
        self._fetcher, self._queue, self._room = fetcher, queue, room
        self._looking = threading.Lock()
        self._history = 0
        self._being_made: dict[tuple[int, int], asyncio.Task[Kept]] = {}
        self._is_closed = False

    def ask(self, now: float) -> None:
        """A request asks for it: it is loaded before others and unloaded after them."""
        self.last_asked = max(self.last_asked, now)

    def keep(self, kept: Kept) -> None:
        """Keep a version, unless the table is another one by now."""
        if kept.history == self._history:
            self.kept.setdefault(kept.version, kept)

    async def look(self) -> Sighting:
        """The newest version now; see `TableFollower.look` for what it raises."""
        seen = await self._fetcher.look(self._follower, self._looking)
        if seen.history > self._history:
            # Who serves one of the old history goes on until he has the new one.
            self._history = seen.history
            self.kept.clear()
        return seen

    async def obtain(self, version: int, seen: Sighting) -> Kept:
        """A version in memory. Many may ask for it at a time, and it is made once, whoever of them gives up.

        Args:
            seen: the table as it was seen just now.

        Raises:
            NoRoomError: nobody asked for it, and there is no room.
            EncoderMismatchError: another encoder than the adapter's.
            TableNotFoundError, TableError, StorageError: the version cannot be read.
            UnavailableError: the last name of this table was removed meanwhile.
        """
        kept = self.kept.get(version)
        if kept is not None and kept.history == seen.history:
            return kept
        if self._is_closed:  # while whoever asks looked at the table
            raise self._gone()
        key = (seen.history, version)
        making = self._being_made.get(key)
        if making is None:
            making = self._being_made[key] = asyncio.create_task(self._make(version, seen))
            making.add_done_callback(lambda made: self._made(key, made))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise self._gone() from None

    def close(self) -> None:
        """Stop what is being made, and make nothing more."""
        self._is_closed = True
        for making in self._being_made.values():
            making.cancel()

    def _gone(self) -> UnavailableError:
        return UnavailableError("it is served no more", where=self.uri, help="ask for what is served")

    def _made(self, key: tuple[int, int], made: asyncio.Task[Kept]) -> None:
        del self._being_made[key]
        if not made.cancelled():
            made.exception()  # everybody who asked may have gone

    async def _make(self, version: int, seen: Sighting) -> Kept:
        log = await self._fetcher.open(seen, version)
        memory = await self._refreshed(log, seen.history)
        if memory is None:
            async with self._queue.turn(lambda: self.last_asked):
                if not self._room.make(log.size_bytes, self.last_asked):
                    raise NoRoomError(
                        "other knowledge bases use up the memory budget",
                        where=self.uri,
                        help="it is loaded when somebody asks for it; a larger knowledge.budget_bytes keeps more",
                    )
                memory = await self._fetcher.load(log)
        kept = Kept(memory, log, seen.history, self.last_asked)
        self.keep(kept)
        return kept

    async def _refreshed(self, log: TableLog, history: int) -> KnowledgeMemory | None:
        """The memory of a version made of the nearest one there is; None if it must be loaded."""
        others = [kept for kept in self.kept.values() if kept.history == history]
        if not others:
            return None
        nearest = min(others, key=lambda kept: abs(kept.version - log.version))
        try:
            return await self._fetcher.refresh(nearest.memory, nearest.log, log)
        except (InputError, DataFileGoneError):
            # The two cannot be compared any more: files of the older are gone, say. Loading tells what is wrong.
            return None
