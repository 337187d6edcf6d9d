"""Which facts stand in a training example's knowledge base beside the right ones: mistakable ones, and any others.

Mistakable are facts with the same entity, with the same property, of entities whose names look alike, and those whose
keys are nearest by embedding. Shape legend: M facts, P encoder dim, C numbers of a sketch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest

import numpy as np

from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic.draws import Draws

SKETCH_NUMBERS = 48
"""Principal components that the nearest keys are looked up by: a tenth of the work, and the same nearest keys."""

SKETCH_ROWS = 1 << 17
"""Most facts among which the nearest are looked up: of a larger table, every n-th one."""

_COVARIANCE_ROWS = 1 << 14
_NEAREST = 32
_NAMES_BESIDE = 2


class KeySketch:
    """Key embeddings cut down to what finds their neighbours."""

    def __init__(self, keys_MP: np.ndarray) -> None:
        self.step = max(1, -(-len(keys_MP) // SKETCH_ROWS))
        sample_mP = keys_MP[:: max(1, len(keys_MP) // _COVARIANCE_ROWS)].astype(np.float32)
        self._mean_P = sample_mP.mean(0)
        centred_mP = sample_mP - self._mean_P
        _, vectors_PP = np.linalg.eigh(centred_mP.T @ centred_mP)
        # Ascending by variance: the last ones matter.
        self._basis_PC = np.ascontiguousarray(vectors_PP[:, -SKETCH_NUMBERS:])
        self._sketch_mC = (keys_MP[:: self.step].astype(np.float32) - self._mean_P) @ self._basis_PC
        self._square_m = np.square(self._sketch_mC).sum(1)
        self._num_facts = len(keys_MP)
        # Of a table that is looked up in part, each fact's own sketch is needed all the same.
        self._own_MC = (
            self._sketch_mC if self.step == 1 else (keys_MP.astype(np.float32) - self._mean_P) @ self._basis_PC
        )

    def nearest(self, row: int, count: int = _NEAREST) -> list[int]:
        """The rows whose keys are nearest to that of `row`, nearest first; `row` itself is none of them."""
        distance_m = self._square_m - 2 * (self._sketch_mC @ self._own_MC[row])
        count = min(count + 1, len(distance_m))
        places = np.argpartition(distance_m, count - 1)[:count]
        # By row among equals, so that the order is the same everywhere.
        places = places[np.lexsort((places, distance_m[places]))]
        return [found for place in places.tolist() if (found := place * self.step) != row]


class Neighbours:
    """Finds facts that are easily mistaken for others, and fills knowledge bases with them."""

    def __init__(self, facts: Sequence[Fact], keys_MP: np.ndarray) -> None:
        self._facts = facts
        self._sketch = KeySketch(keys_MP)
        self._of_entity: dict[str, list[int]] = {}
        self._with_property: dict[str, list[int]] = {}
        for row, fact in enumerate(facts):
            self._of_entity.setdefault(fact.entity.casefold(), []).append(row)
            self._with_property.setdefault(fact.property.casefold(), []).append(row)
        self._names = sorted(self._of_entity)
        self._reversed_names = sorted(name[::-1] for name in self._of_entity)

    def of_entity(self, entity: str) -> list[int]:
        """The rows about an entity; letter case does not count."""
        return self._of_entity.get(entity.casefold(), [])

    def fill(
        self,
        wanted: Sequence[int],
        asked: Sequence[tuple[str, str]],
        forbidden: Collection[int],
        size: int,
        hard_share: float,
        draws: Draws,
    ) -> np.ndarray:
        """The rows of a knowledge base: the wanted ones first, then `hard_share` of the rest mistakable, then any.

        Args:
            wanted: rows that must be in it.
            asked: the (entity, property) pairs that others are to be mistaken for.
            forbidden: rows that must not be in it.
            size: how many rows; fewer where the table has no more that are allowed, more if more are wanted.

        Returns:
            int32, each row once.
        """
        chosen = dict.fromkeys(wanted)
        others = max(0, size - len(chosen))
        num_hard = round(hard_share * others)
        if num_hard:
            for row in self._mistakable(wanted, asked, num_hard, draws):
                if row not in chosen and row not in forbidden:
                    chosen[row] = None
                    if len(chosen) >= len(wanted) + num_hard:
                        break
        rows = np.fromiter(chosen, np.int32, len(chosen))
        banned = np.fromiter((*chosen, *forbidden), np.int64, len(chosen) + len(forbidden))
        any_others = _distinct_rows(len(self._facts), size - len(rows), banned, draws)
        return np.concatenate([rows, any_others])

    def _mistakable(
        self, wanted: Sequence[int], asked: Sequence[tuple[str, str]], count: int, draws: Draws
    ) -> Iterable[int]:
        """Rows of every sort in turn, perhaps more than once."""
        pools: list[Iterable[int]] = []
        for entity, property in draws.sample(list(asked), 2):
            same_entity = self.of_entity(entity)
            same_property = self._with_property.get(property.casefold(), [])
            pools.append(draws.sample(same_entity, count))
            pools.append(_some(same_property, count, draws))
            pools.append(self._with_alike_names(entity, property, draws))
            anchors = wanted or same_entity or same_property
            if anchors:
                pools.append(self._sketch.nearest(draws.pick(anchors)))
        for turn in zip_longest(*pools):
            yield from (row for row in turn if row is not None)

    def _with_alike_names(self, entity: str, property: str, draws: Draws) -> list[int]:
        """One fact each of the entities whose names stand beside this one's when sorted from either end."""
        name, found = entity.casefold(), []
        for names, place_of in ((self._names, name), (self._reversed_names, name[::-1])):
            at = bisect_left(names, place_of)
            for beside in names[max(0, at - _NAMES_BESIDE) : at + _NAMES_BESIDE + 1]:
                other = beside if names is self._names else beside[::-1]
                if other != name:
                    rows = self._of_entity[other]
                    same = [row for row in rows if self._facts[row].property.casefold() == property.casefold()]
                    found.append(draws.pick(same or rows))
        return found


def _some(rows: Sequence[int], count: int, draws: Draws) -> Sequence[int]:
    """At most `count` of many rows, without a copy of all of them."""
    if len(rows) <= 2 * count:
        return draws.sample(rows, count)
    return list(dict.fromkeys(draws.pick(rows) for _ in range(count)))


def _distinct_rows(num_rows: int, count: int, banned: np.ndarray, draws: Draws) -> np.ndarray:
    """`count` different rows out of `num_rows`, none of them banned: int32; all that there are where they are fewer."""
    if count <= 0:
        return np.empty(0, np.int32)
    is_banned = np.zeros(num_rows, bool)
    is_banned[banned] = True
    allowed = num_rows - int(is_banned.sum())
    seed = np.uint64(draws.below(1 << 32) << 32 | draws.below(1 << 32))
    if 3 * count >= allowed:
        rows = np.flatnonzero(~is_banned)
        return rows[np.argsort(_scrambled(rows, seed), kind="stable")[:count]].astype(np.int32)
    found = np.empty(0, np.int64)
    drawn = 0
    while len(found) < count:
        more = 2 * count + 16
        places = _scrambled(np.arange(drawn, drawn + more), seed)
        drawn += more
        candidates = ((places >> np.uint64(32)) * np.uint64(num_rows) >> np.uint64(32)).astype(np.int64)
        candidates = np.concatenate([found, candidates[~is_banned[candidates]]])
        found = candidates[np.sort(np.unique(candidates, return_index=True)[1])][:count]
    return found.astype(np.int32)


def _scrambled(numbers: np.ndarray, seed: np.uint64) -> np.ndarray:
    """64 random bits for each number: the SplitMix64 finalizer, as in `Draws`, for many at once."""
    with np.errstate(over="ignore"):
        x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + seed
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
