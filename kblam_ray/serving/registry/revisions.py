"""Numbers for what is wanted, told apart from those of a registry that was there before."""

from __future__ import annotations

import secrets
import time

_TAG_BITS = 20


class Revisions:
    """Numbers that grow, over restarts too unless the clock is set back, and show who gave them.

    The upper bits are milliseconds of the clock on the wall, or one more than the last; the lower ones a random tag.
    """

    def __init__(self) -> None:
        self._tag = secrets.randbits(_TAG_BITS)
        self._count = 0

    def next(self) -> int:
        """A number larger than any given or passed by."""
        self._count = max(self._count + 1, time.time_ns() // 1_000_000)
        return self._count << _TAG_BITS | self._tag

    def is_own(self, revision: int) -> bool:
        """Whether this object gave the number. Nobody gave 0: it stands for having been told nothing."""
        return revision > 0 and revision & ((1 << _TAG_BITS) - 1) == self._tag

    def pass_by(self, revision: int) -> None:
        """Take note of another's number: the next ones will be larger."""
        self._count = max(self._count, revision >> _TAG_BITS)
