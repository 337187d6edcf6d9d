"""Ends a text before the first of some stop texts, and never says the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes a text on in pieces until a stop text ends in it; blanks at the end are not said.

    Where several stop texts stand in the text, the one that ends first counts, so that it does not matter in which
    pieces the text came.

    Attributes:
        text: all that was passed on.
        is_stopped: a stop text came; nothing more is said.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def feed(self, piece: str) -> str:
        """Take a piece of the text; give what can be said now."""
        return self._next(piece, is_over=False)

    def finish(self, piece: str = "") -> str:
        """The rest of the text, which is over."""
        return self._next(piece, is_over=True)

    def _next(self, piece: str, *, is_over: bool) -> str:
        if self.is_stopped or not (piece or is_over):
            return ""
        held = self._held + piece
        found = [(held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in held]
        if found:
            end, length = min(found)
            self.is_stopped, held = True, held[: end + length]
        is_over = is_over or self.is_stopped
        said = held if is_over else held[: len(held) - self._num_possible(held)]
        said = said.rstrip()
        self._held = "" if is_over else held[len(said) :]
        self.text += said
        return said

    def _num_possible(self, held: str) -> int:
        """Letters at the end that a stop text may begin with."""
        for length in range(min(len(held), max(map(len, self._stops), default=1) - 1), 0, -1):
            end = held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
