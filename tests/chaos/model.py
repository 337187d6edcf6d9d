"""What a table must hold, in plain Python: generations of groups of facts, issued, acknowledged or in doubt.

A group is a set of facts that one writer writes together, always all of them, each time in a new generation that every
value names. So a version that shows two generations of a group, or a part of it, was torn; one that shows less than
was acknowledged at or before it lost something; and a fact that stands in it twice appears twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Row = tuple[str, str, str]
"""entity, property, value."""

PROPERTY = "state"


def size_of(group: str) -> int:
    """Facts of a group, which its name ends with: `files 3/12`."""
    return int(group.rpartition("/")[2])


SWAPPED = "swapped-"
"""How the names of groups begin whose generations are other facts in turns: to write one deletes the one before."""


def rows_of(group: str, generation: int) -> list[Row]:
    """The facts of one generation of a group."""
    size = size_of(group)
    first = size * (generation % 2) if group.startswith(SWAPPED) else 0
    return [(f"{group}#{number}", PROPERTY, f"{generation}:{number}") for number in range(first, first + size)]


def generations_in(rows: Iterable[Row]) -> tuple[dict[str, int], list[str]]:
    """Which generation of each group the live facts of one version show, and what is wrong with them."""
    shown: dict[str, Counter[int]] = defaultdict(Counter)
    seen: set[tuple[str, str]] = set()
    problems = []
    for entity, name, value in rows:
        if (entity, name) in seen:
            problems.append(f"{entity} appears twice")
        seen.add((entity, name))
        group, _, number = entity.rpartition("#")
        generation, _, told = value.partition(":")
        if name != PROPERTY or told != number or not group:
            problems.append(f"a fact that nobody wrote: {entity}, {name}, {value}")
            continue
        shown[group][int(generation)] += 1
    for group, counts in shown.items():
        if len(counts) > 1 or counts.total() != size_of(group):
            problems.append(f"torn: {group} shows {dict(counts)}")
    return {group: max(counts) for group, counts in shown.items()}, problems


@dataclass
class Group:
    """What became of the writes of one group.

    Attributes:
        issued: generations whose writing began.
        absent: those of them that take the group away.
        acknowledged: the generations that were acknowledged, and the version that was named with each, if any.
    """

    issued: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    acknowledged: dict[int, int | None] = field(default_factory=dict)

    def may_show(self, at_least: int) -> set[int | None]:
        """What may be seen once `at_least` was acknowledged (0: nothing was): that, or anything later.

        An earlier one that is in doubt may not: it comes before, or not at all.
        """
        later = {
            None if generation in self.absent else generation for generation in self.issued if generation >= at_least
        }
        return later if at_least else later | {None}


class Model:
    """Groups and what is known of them."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = defaultdict(Group)

    def issue(self, group: str, generation: int, *, absent: bool = False) -> None:
        """Its writing begins, or its removal; it is in doubt until it is acknowledged."""
        self.groups[group].issued.add(generation)
        if absent:
            self.groups[group].absent.add(generation)

    def acknowledge(self, group: str, generation: int, version: int | None = None) -> None:
        """Its writer was told that it is durable, and in which version."""
        self.groups[group].acknowledged[generation] = version

    @property
    def num_acknowledged(self) -> int:
        return sum(len(group.acknowledged) for group in self.groups.values())

    @property
    def num_in_doubt(self) -> int:
        return sum(len(group.issued - group.acknowledged.keys()) for group in self.groups.values())

    def newest(self, group: str) -> int:
        """The newest generation of a group whose writing began; 0: none."""
        return max(self.groups[group].issued, default=0) if group in self.groups else 0

    def check_end(self, rows: Iterable[Row]) -> list[str]:
        """What is wrong with the table when nobody writes any more."""
        shown, problems = generations_in(rows)
        for group, known in self.groups.items():
            newest, found = max(known.acknowledged, default=0), shown.pop(group, None)
            if found not in known.may_show(newest):
                problems.append(f"{group} shows {found}; {newest} was acknowledged")
        return problems + [f"nobody wrote {group}" for group in shown]

    def check_read(self, version: int, shown: dict[str, int]) -> list[str]:
        """What is wrong with a version as it was read while others wrote."""
        problems = []
        for group, known in self.groups.items():
            before = max((g for g, at in known.acknowledged.items() if at is not None and at <= version), default=0)
            if (found := shown.get(group)) not in known.may_show(before):
                problems.append(f"version {version} shows {group} in {found}; {before} was acknowledged before it")
        strangers = set(shown) - set(self.groups)
        return problems + [f"version {version} shows {group}, which nobody wrote" for group in strangers]

    def check_order(self, versions: dict[int, dict[str, int]]) -> list[str]:
        """What is wrong with a row of versions: no group goes back, or goes where nobody took it away."""
        problems = []
        for group, known in self.groups.items():
            least = 0
            for version, shown in sorted(versions.items()):
                found = shown.get(group)
                if found is None and least:
                    found = min((generation for generation in known.absent if generation >= least), default=None)
                    if found is None:
                        problems.append(f"version {version} lacks {group}, which was in {least}")
                elif found is not None and found < least:
                    problems.append(f"version {version} shows {group} in {found} after {least}")
                least = max(least, found or 0)
        return problems

    def check_reads(self, reads: Iterable[dict[str, Any]]) -> list[str]:
        """What readers reported: versions that were wrong, that went back, or were not the same when read again."""
        problems: list[str] = []
        seen: dict[int, dict[str, int]] = {}
        for read in reads:
            problems += read["problems"]
            if "version" not in read:
                continue
            if seen.setdefault(read["version"], read["groups"]) != read["groups"]:
                problems.append(f"version {read['version']} was not the same when it was read again")
                continue
            problems += self.check_read(read["version"], read["groups"])
        return list(dict.fromkeys([*problems, *self.check_order(seen)]))
