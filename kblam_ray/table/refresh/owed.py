"""What a run with `--once` owes: the files that its first look found; and when it must give up on one of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from kblam_ray.table.refresh.sources import SourceFile
from kblam_ray.table.refresh.watching import Pending

MAX_IDLE_PASSES = 30
"""How often files are found changed, so that they cannot be taken up, before the run gives up."""


class Owed:
    """The files that are left of the first look's; beside whoever writes new ones, a run ends when none is.

    Args:
        settle_s: how long a local file must have stood still.

    Attributes:
        has_synced: whether the table was made equal to all sources in this run.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._there: frozenset[str] | None = None
        self._left: set[str] = set()
        self.has_synced = False
        self._idle_passes = 0
        self._counted: tuple[tuple[tuple[str, str], ...], int] = (), 0
        self._counted_at = 0.0

    def looked(self, uris: Collection[str]) -> None:
        """A look found these files; the first one counts."""
        if self._there is None:
            self._there = frozenset(uris)
            self._left = set(uris)

    def settle(self, files: Iterable[SourceFile]) -> None:
        """These are taken up, or refused."""
        self._left.difference_update(file.uri for file in files)

    def is_any_left(self, pending: Pending) -> bool:
        """Whether something must still be done. A sync is owed once."""
        if pending.all_files is not None and not self.has_synced:
            return True
        uris = {file.uri for file in [*pending.files, *pending.unsettled]}
        return not self._left.isdisjoint(uris) or not pending.disputed.isdisjoint(self._there or ())

    def is_in_vain(self, pending: Pending, has_progressed: bool) -> bool:
        """Whether files have changed so often, pass after pass, that they will go on to.

        That a file is waited for until it has stood still is no change, and it must have had the time for it.
        """
        unsettled = tuple((file.uri, file.tag) for file in pending.unsettled if file.uri in self._left)
        state = unsettled, len(self._left)
        now = time.monotonic()
        moved_while_read = not has_progressed and not pending.is_empty
        if state[1] < self._counted[1] or (has_progressed and not unsettled):
            self._idle_passes, self._counted = 0, state
        elif moved_while_read or (state != self._counted and now - self._counted_at >= self._settle_s):
            self._idle_passes, self._counted, self._counted_at = self._idle_passes + 1, state, now
        return self._idle_passes > MAX_IDLE_PASSES
