"""Seeded random draws and permutations that give the same result in every process, platform and Python.

`random` promises equal results only within one Python version, and `hash` not even between two processes. These are a
few integer operations (the SplitMix64 finalizer), cheap enough to give each fact a stream of its own, which is what
lets fact i be computed without the facts before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 3


def _scramble(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=4096)
def number_of(text: str) -> int:
    """A 64-bit number that stands for `text` in a path of draws."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


class Draws:
    """An endless stream of random choices that depends on nothing but the path it was made with."""

    __slots__ = ("_state",)

    def __init__(self, *path: int) -> None:
        state = 0
        for step in path:
            state = _scramble((state + _GOLDEN + step) & _MASK)
        self._state = state

    def below(self, limit: int) -> int:
        """An integer in [0, limit), limit at most 2^32."""
        self._state = (self._state + _GOLDEN) & _MASK
        return ((_scramble(self._state) >> 32) * limit) >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def sample(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different elements of `choices`, in random order; all of them when there are fewer."""
        pool = list(choices)
        count = min(count, len(pool))
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


@lru_cache(maxsize=1024)
def _multipliers(size: int, key: int) -> tuple[tuple[int, int], ...]:
    keys = Draws(key, size)
    return tuple((keys.below(1 << 32) << 32 | keys.below(1 << 32) | 1, keys.below(1 << 32)) for _ in range(_ROUNDS))


def permute(number: int, size: int, key: int) -> int:
    """The image of `number` under a permutation of [0, size) chosen by `key`.

    Rounds of multiply-add and xor-shift permute the next power of two; images outside the range are permuted again
    (cycle walking), which keeps the map one-to-one on the range.
    """
    bits = max((size - 1).bit_length(), 2)
    mask, shift = (1 << bits) - 1, bits // 2
    rounds = _multipliers(size, key)
    while True:
        for factor, addend in rounds:
            number = (number * factor + addend) & mask
            number ^= number >> shift
        if number < size:
            return number
