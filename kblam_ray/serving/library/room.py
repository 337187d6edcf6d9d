"""The memory budget: what is kept counts once however much of it is shared, and the least recently asked goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kblam_ray.attention.memory.held_bytes import HeldBytes
from kblam_ray.serving.library.kept import Kept


class Room:
    """Room for memories. What a request holds is never unloaded, nor is the only memory that is kept.

    Args:
        budget_bytes: most bytes of all memories kept.
        kept: all of them, each once.
        unload: lets go of one.
    """

    def __init__(self, budget_bytes: int, kept: Callable[[], Iterable[Kept]], unload: Callable[[Kept], None]) -> None:
        self._budget_bytes, self._kept, self._unload = budget_bytes, kept, unload

    def make(self, nbytes: int, asked: float) -> bool:
        """Room for a memory of about `nbytes` that was last asked for at `asked` (0: nobody asked for it).

        Only what was asked for longer ago makes room.

        Returns:
            Whether to load it: there is room, it was asked for, or nothing else is kept.
        """
        self._shrink(self._budget_bytes - nbytes, [kept for kept in self._kept() if kept.last_asked < asked])
        return asked > 0 or self._is_within(self._budget_bytes - nbytes) or not [*self._kept()]

    def trim(self, newest: Kept | None = None) -> None:
        """Get back into the budget, after `newest` came; it goes itself only if nobody ever asked for it."""
        victims = [kept for kept in self._kept() if kept is not newest or not kept.last_asked]
        self._shrink(self._budget_bytes, victims, leave=1)

    def _shrink(self, most_bytes: int, victims: list[Kept], leave: int = 0) -> None:
        # Of those that nobody asked for, what came last goes first: it is what there is no room for.
        victims = sorted(victims, key=lambda kept: (kept.last_asked, -kept.serial))
        for victim in victims:
            if self._is_within(most_bytes) or len([*self._kept()]) <= leave:
                return
            if not victim.is_in_use:
                self._unload(victim)

    def _is_within(self, most_bytes: int) -> bool:
        everything = [*self._kept()]
        if sum(kept.nbytes for kept in everything) <= most_bytes:
            return True
        shared, alone = HeldBytes(), 0
        for kept in everything:
            kept.memory.add_to(shared)
            alone += kept.nbytes - kept.memory.nbytes
        return shared.total() + alone <= most_bytes
