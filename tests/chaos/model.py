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


def rows_of(group: str, generation: int) -> list[Row]:
    """The facts of one generation of a group."""
    return [(f"{group}#{number}", PROPERTY, f"{generation}:{number}") for number in range(size_of(group))]


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
        doubtful: of these, those that were neither acknowledged nor refused, and may stand in the table or not.
        acknowledged: the generations that were acknowledged, and the version that was named with each, if any.
    """

    issued: set[int] = field(default_factory=set)
    doubtful: set[int] = field(default_factory=set)
    acknowledged: dict[int, int | None] = field(default_factory=dict)

    def may_be(self, at_least: int) -> set[int]:
        """What may be seen once `at_least` was acknowledged: that, anything later, and what is in doubt."""
        return {generation for generation in self.issued if generation >= at_least} | self.doubtful


class Model:
    """Groups and what is known of them."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = defaultdict(Group)

    def issue(self, group: str, generation: int) -> None:
        """Its writing begins; it is in doubt until it is acknowledged."""
        self.groups[group].issued.add(generation)
        self.groups[group].doubtful.add(generation)

    def acknowledge(self, group: str, generation: int, version: int | None = None) -> None:
        """Its writer was told that it is durable, and in which version."""
        known = self.groups[group]
        known.acknowledged[generation] = version
        known.doubtful.discard(generation)

    @property
    def num_acknowledged(self) -> int:
        return sum(len(group.acknowledged) for group in self.groups.values())

    def newest(self, group: str) -> int:
        """The newest generation of a group whose writing began; 0: none."""
        return max(self.groups[group].issued, default=0) if group in self.groups else 0

    def check_end(self, rows: Iterable[Row]) -> list[str]:
        """What is wrong with the table when nobody writes any more."""
        shown, problems = generations_in(rows)
        for group, known in self.groups.items():
            newest = max(known.acknowledged, default=None)
            found = shown.pop(group, None)
            if newest is None:
                if found is not None and found not in known.doubtful:
                    problems.append(f"{group} shows {found}, which nobody wrote")
            elif found not in {newest} | known.doubtful:
                problems.append(f"{group} shows {found}; {newest} was acknowledged")
        return problems + [f"nobody wrote {group}" for group in shown]

    def check_read(self, version: int, shown: dict[str, int]) -> list[str]:
        """What is wrong with a version as it was read while others wrote."""
        problems = []
        for group, known in self.groups.items():
            before = [g for g, at in known.acknowledged.items() if at is not None and at <= version]
            found = shown.get(group)
            if found is None:
                if before:
                    problems.append(f"version {version} lacks {group}, acknowledged in version {max(before)}")
            elif found not in known.may_be(max(before, default=0)):
                problems.append(f"version {version} shows {group} in {found}; {max(before)} was acknowledged before it")
        strangers = set(shown) - set(self.groups)
        return problems + [f"version {version} shows {group}, which nobody wrote" for group in strangers]

    def check_reads(self, reads: Iterable[dict[str, Any]]) -> list[str]:
        """What a reader reported: versions that were wrong, or that were not the same when read again."""
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
        return list(dict.fromkeys(problems))
