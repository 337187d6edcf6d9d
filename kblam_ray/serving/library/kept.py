"""A whole memory that the library keeps, and whether anybody uses it."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field, replace

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.model.nearest import index_nbytes
from kblam_ray.table.log import TableLog

_serials = itertools.count()


@dataclass(eq=False)
class Kept:
    """One version of one table in memory.

    Attributes:
        memory: never handed out itself, see `lend`.
        log: the version, to find changes from it without opening it again.
        history: of the table, see `TableFollower`.
        last_asked: when a request last asked for it, on the event loop's clock; 0: never.
        by_version: some request named this version; it stays when the knowledge base moves on.
        nbytes: of the memory and its indexes, when last measured.
        serial: grows with each one made.
    """

    memory: KnowledgeMemory
    log: TableLog
    history: int
    last_asked: float = 0.0
    by_version: bool = False
    nbytes: int = 0
    serial: int = field(default_factory=lambda: next(_serials))
    _lent: weakref.ref[KnowledgeMemory] | None = None

    def __post_init__(self) -> None:
        self.measure()

    @property
    def version(self) -> int:
        return self.log.version

    def lend(self, now: float) -> KnowledgeMemory:
        """The memory for a request: an object of its own, alive for as long as some request holds it."""
        self.last_asked = now
        lent = None if self._lent is None else self._lent()
        if lent is None:
            lent = replace(self.memory)
            self._lent = weakref.ref(lent)
        return lent

    def measure(self) -> None:
        """See how many bytes it takes by now."""
        self.nbytes = self.memory.nbytes + index_nbytes(self.memory)

    @property
    def is_in_use(self) -> bool:
        """Whether a request holds it: to unload it would free nothing."""
        return self._lent is not None and self._lent() is not None
