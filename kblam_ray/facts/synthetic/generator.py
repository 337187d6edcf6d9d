"""Synthetic facts by number: fact i of a seed is a pure function of (seed, i), so that shards make disjoint ranges.

Entities come in blocks of eight that share 32 facts, between one and seven each, in an order of the block's own; every
fact of an entity has another property. Nothing is remembered between facts: a million take no more memory than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.facts.synthetic.kinds import KINDS, Kind
from kblam_ray.facts.synthetic.names import Names
from kblam_ray.facts.synthetic.properties import PROPERTY_TYPES

FACTS_PER_ENTITY = (1, 2, 3, 4, 4, 5, 6, 7)
"""How many facts the eight entities of a block have, before the block shuffles them."""

BLOCK_FACTS = sum(FACTS_PER_ENTITY)
BLOCK_ENTITIES = len(FACTS_PER_ENTITY)

MAX_FACTS = 1 << 33
"""Facts that one seed can make: as many as names stay short for and draws stay 32 bit."""

_KIND, _BLOCK, _PROPERTY, _VALUE, _SPLIT = map(number_of, ("kind", "block", "properties", "value", "split"))
_KINDS = tuple(KINDS.values())


class SyntheticFacts:
    """All the facts of one seed, by number. Cheap to make and to pickle; every method is a pure function."""

    def __init__(self, seed: int = 0) -> None:
        if not 0 <= seed < 1 << 63:
            raise InputError(f"seed {seed}", where="--seed", help="give an integer from 0 to 2^63 - 1")
        self.seed = seed
        self._names = Names(seed, {kind.name: kind.patterns for kind in _KINDS})

    def fact(self, index: int) -> Fact:
        """Fact number `index`, 0 <= index < MAX_FACTS.

        Raises:
            InputError: an index outside that range.
        """
        return next(self.facts(index, index + 1))

    def facts(self, start: int, stop: int) -> Iterator[Fact]:
        """The facts numbered start to stop - 1, in order.

        Raises:
            InputError: a range outside [0, MAX_FACTS].
        """
        if not 0 <= start <= stop <= MAX_FACTS:
            raise InputError(f"facts {start} to {stop}", help=f"give a range within 0 to {MAX_FACTS}")
        while start < stop:
            entity, slot, count = self._place(start)
            name = self.entity_name(entity)
            for property_name in self._properties(entity, count)[slot : slot + stop - start]:
                yield Fact(name, property_name, self._value(entity, property_name))
                start += 1

    def entity_of(self, index: int) -> int:
        """The number of the entity that fact `index` is about."""
        return self._place(index)[0]

    def num_entities(self, num_facts: int) -> int:
        """How many entities the first `num_facts` facts are about."""
        return self.entity_of(num_facts - 1) + 1 if num_facts else 0

    def entity_name(self, entity: int) -> str:
        return self._names.name(self.kind(entity).name, entity)

    def kind(self, entity: int) -> Kind:
        """What kind of thing the entity is; the same for a near-duplicate and what it resembles."""
        return Draws(self.seed, _KIND, self._names.base_of(entity)).pick(_KINDS)

    def is_held_out(self, entity: int, fraction: float = 0.1) -> bool:
        """Whether the entity belongs to the held-out share; a near-duplicate goes with what it resembles."""
        return Draws(self.seed, _SPLIT, self._names.base_of(entity)).below(1 << 32) < fraction * (1 << 32)

    def _place(self, index: int) -> tuple[int, int, int]:
        """The entity of a fact, which of the entity's facts it is, and how many the entity has."""
        block, rest = divmod(index, BLOCK_FACTS)
        for position, count in enumerate(_counts(self.seed, block)):
            if rest < count:
                return block * BLOCK_ENTITIES + position, rest, count
            rest -= count
        raise AssertionError("a block's counts add up to BLOCK_FACTS")

    def _properties(self, entity: int, count: int) -> list[str]:
        return Draws(self.seed, _PROPERTY, entity).sample(self.kind(entity).properties, count)

    def _value(self, entity: int, property_name: str) -> str:
        make = PROPERTY_TYPES[property_name].value
        assert make is not None, f"{property_name} belongs to real tables and stands in no kind"
        return make(Draws(self.seed, _VALUE, entity, number_of(property_name)), self._names)


@lru_cache(maxsize=1024)
def _counts(seed: int, block: int) -> tuple[int, ...]:
    return tuple(Draws(seed, _BLOCK, block).sample(FACTS_PER_ENTITY, BLOCK_ENTITIES))
