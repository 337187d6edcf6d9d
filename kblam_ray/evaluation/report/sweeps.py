"""A sweep's summary, read for tables and charts: what was measured where, and which settings vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kblam_ray.evaluation.report.naming import place_of

DIMENSIONS = ("source", "candidate", "entities", "selection", "kb_scale")

_ENTITIES = {"held_out": "entities held out", "trained": "entities trained on", None: "all entities"}


@dataclass(frozen=True)
class Context:
    """The settings of a sweep beside the number of facts: what one line of a chart has in common."""

    source: str | None
    candidate: str | None
    entities: str | None = None
    selection: str | None = None
    kb_scale: float | None = None

    @classmethod
    def of(cls, unit: Mapping[str, Any]) -> Context:
        return cls(**{name: unit.get(name) for name in DIMENSIONS})

    def word(self, name: str) -> str:
        """One setting in words."""
        value = getattr(self, name)
        if name == "entities":
            return _ENTITIES.get(value, str(value))
        if name == "selection":
            return "all facts" if value in (None, "all") else f"nearest {value.partition(':')[2]}"
        if name == "kb_scale":
            return "the adapter's C" if value is None else f"C = {value:g}"
        return str(value)


class Sweep:
    """What a sweep's `summary.json` says, in the order of its units.

    Args:
        summary: `units`, each of part `questions`, `interference` or `cost`.
    """

    def __init__(self, summary: Mapping[str, Any]) -> None:
        self.summary = summary
        units = summary.get("units", ())
        self.questions = [unit for unit in units if unit["part"] == "questions"]
        self.interference = [unit for unit in units if unit["part"] == "interference"]
        self.cost = [unit for unit in units if unit["part"] == "cost"]

    @cached_property
    def contexts(self) -> dict[Context, list[Mapping[str, Any]]]:
        """The sizes of each context, from small to large: `SizeEvaluation.summary()`."""
        found: dict[Context, list[Mapping[str, Any]]] = {}
        for unit in self.questions:
            found.setdefault(Context.of(unit), []).append(unit["size"])
        return {context: sorted(sizes, key=lambda size: size["num_facts"]) for context, sizes in found.items()}

    def largest(self) -> dict[Context, Mapping[str, Any]]:
        """One size of each context to compare them at: the largest that all have, else the largest of each."""
        common = set.intersection(*({size["num_facts"] for size in sizes} for sizes in self.contexts.values()))
        chosen = max(common, default=None)
        return {
            context: next((size for size in sizes if size["num_facts"] == chosen), sizes[-1])
            for context, sizes in self.contexts.items()
        }

    def varying(self, units: list[Mapping[str, Any]]) -> tuple[str, ...]:
        """The settings that differ between units."""
        contexts = [Context.of(unit) for unit in units]
        return tuple(name for name in DIMENSIONS if len({getattr(context, name) for context in contexts}) > 1)

    def label(self, context: Context, *, without: tuple[str, ...] = ()) -> str:
        """A context among those of the questions: its settings that vary, in words."""
        names = [name for name in self.varying(self.questions) if name not in without]
        return ", ".join(context.word(name) for name in names)


def results_of(size: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The results of a size, attention first."""
    return sorted(size["results"], key=place_of)


def figure_of(result: Mapping[str, Any], part: str, name: str, group: str = "all") -> Mapping[str, Any] | None:
    """A figure of a result; None where it was not measured."""
    figure = result.get(part, {}).get(group, {}).get(name)
    return figure if figure is not None and figure.get("value") is not None else None


def kinds_of(size: Mapping[str, Any]) -> list[str]:
    """The kinds of question with an answer that were asked."""
    return [kind for kind, asked in size["num_questions"].items() if kind != "unanswerable" and asked]
