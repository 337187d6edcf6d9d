"""Facts and identities as a Python caller may give them, made into `Fact`s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from kblam_ray.errors import BadRowError
from kblam_ray.facts import Fact, Identity, NotAFactError, fact_from_row, validate_fact

FactLike: TypeAlias = Fact | tuple[str, ...] | list[str] | Mapping[str, Any]
"""A Fact; (entity, property, value[, metadata]); or a mapping of an accepted shape, see `fact_from_row`."""


def facts_from(given: Iterable[FactLike]) -> list[Fact]:
    """The facts given, stripped and checked.

    Raises:
        BadRowError: one is not a fact; `where` has its number, counted from 1.
    """
    return [_checked(item, number) for number, item in enumerate(given, start=1)]


def identities_from(given: Iterable[FactLike], identity: Identity) -> list[Fact]:
    """Identities, each a tuple or a mapping of the fields that the table's identity rule names, or a Fact.

    Raises:
        BadRowError: one does not say which fact is meant.
    """
    num_fields = identity.count(",") + 1
    facts = []
    for number, item in enumerate(given, start=1):
        if isinstance(item, Mapping):
            item = tuple(item[name] for name in identity.split(",") if name in item)
        if isinstance(item, tuple | list):
            if len(item) != num_fields:
                raise _bad(number, f"an identity has {num_fields} texts ({identity}), this one {len(item)}")
            # Any value does where the value is not part of the identity.
            item = item if num_fields == 3 else (*item, "-")
        facts.append(_checked(item, number))
    return facts


def _checked(item: FactLike, number: int) -> Fact:
    try:
        if isinstance(item, Fact):
            return validate_fact(item)
        if isinstance(item, tuple | list):
            if len(item) not in (3, 4):
                raise NotAFactError(f"a sequence of {len(item)}, not (entity, property, value[, metadata])")
            return validate_fact(Fact(*item))
        return fact_from_row(item)
    except NotAFactError as error:
        raise _bad(number, str(error)) from None


def _bad(number: int, reason: str) -> BadRowError:
    return BadRowError(
        f"not a fact: {reason}",
        where=f"item {number}",
        help="give Fact(entity, property, value), a tuple or a mapping with texts that are not empty",
    )
