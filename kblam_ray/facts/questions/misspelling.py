"""Misspell a name the way people do: swap two letters, drop or double one, or strike the key beside the right one."""

from __future__ import annotations

from kblam_ray.facts.synthetic.draws import Draws

_NEIGHBOURS = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "j": "hk",
    "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "wa", "r": "et", "s": "ad", "t": "ry",
    "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip

MIN_LETTERS = 4
"""Shorter names cannot be misspelt and still be told apart."""


def misspell(name: str, draws: Draws) -> str | None:
    """`name` with one mistake among its letters; None if it has fewer than four."""
    letters = [i for i, character in enumerate(name) if character.isalpha()]
    if len(letters) < MIN_LETTERS:
        return None
    # The first letter is the one that people get right.
    for _ in range(20):
        at = letters[1 + draws.below(len(letters) - 1)]
        wrong = _mistake(name, at, draws)
        if wrong != name:
            return wrong
    return None


def _mistake(name: str, at: int, draws: Draws) -> str:
    how = draws.below(4)
    if how == 0 and at + 1 < len(name) and name[at + 1].isalpha():
        return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    if how == 1:
        return name[:at] + name[at] + name[at:]
    if how == 2 and name[at] in _NEIGHBOURS:
        return name[:at] + draws.pick(_NEIGHBOURS[name[at]]) + name[at + 1 :]
    return name[:at] + name[at + 1 :]
