"""A sweep in a few numbers: ours at the largest knowledge base, and the best of the others beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kblam_ray.evaluation.report.naming import digits, number, short_name
from kblam_ray.evaluation.report.question_charts import ANSWERS, REFUSAL, RETRIEVAL, Metric
from kblam_ray.evaluation.report.sweeps import Context, Sweep, figure_of, results_of


@dataclass(frozen=True)
class Tile:
    """One number, large.

    Attributes:
        title: what it is a number of.
        value: with its unit.
        about: of what, and at which size.
        beside: what it is to be compared with; may be empty.
        also: the same of the other knowledge bases; may be empty.
        share: of a whole, 0 to 1, where it is one; low and high, the ends of its interval, likewise.
    """

    title: str
    value: str
    about: str
    beside: str = ""
    share: float | None = None
    low: float | None = None
    high: float | None = None
    also: str = ""


def tiles_of(summary: Mapping[str, Any]) -> list[Tile]:
    """The tiles of a sweep: what of retrieval, answers, refusal, interference and cost was measured."""
    sweep = Sweep(summary)
    found = [_asked(sweep, metric) for metric in (RETRIEVAL[0], ANSWERS[0], REFUSAL[0])]
    found += [_interference(sweep), _cost(sweep)]
    return [tile for tile in found if tile is not None]


def _asked(sweep: Sweep, metric: Metric) -> Tile | None:
    candidates = []
    for context, sizes in sweep.contexts.items():
        for size in sizes:
            results = [one for one in results_of(size) if figure_of(one, metric.part, metric.figure)]
            ours = [one for one in results if one["system"] == "attention"]
            if ours:
                candidates.append((size["num_facts"], context, results, ours))
    if not candidates:
        return None
    # The first of the largest; with the prior and verbatim where there is such a result, never the best one found.
    num_facts, context, results, ours = max(candidates, key=lambda one: one[0])
    answered = [one for one in ours if one["grounding"]] or ours
    chosen = answered[0]
    figure = figure_of(chosen, metric.part, metric.figure)
    assert figure is not None, "results without the figure were left out"
    rivals = [one for one in results if one["system"] != "attention"]
    best = max(rivals, key=lambda one: figure_of(one, metric.part, metric.figure)["value"], default=None)  # type: ignore[index]
    beside = ""
    if best is not None:
        share = figure_of(best, metric.part, metric.figure)["value"]  # type: ignore[index]
        beside = f"best of the others: {100 * share:.1f} % ({short_name(best, metric.part)})"
    where = f"{context.source}, " if context.source else ""
    return Tile(
        metric.title,
        f"{100 * figure['value']:.1f} %",
        f"{short_name(chosen, metric.part)}; {where}{number(num_facts)} facts",
        beside,
        figure["value"],
        figure.get("low"),
        figure.get("high"),
        _others(sweep, metric, context, chosen),
    )


def _others(sweep: Sweep, metric: Metric, context: Context, chosen: Mapping[str, Any]) -> str:
    """The same way of answering on the other knowledge bases, at the largest size of each."""
    found = []
    for other, sizes in sweep.contexts.items():
        if other.source == context.source or replace(other, source=context.source) != context:
            continue
        for one in sizes[-1]["results"]:
            is_same = all(one[name] == chosen[name] for name in ("system", "prior", "grounding"))
            figure = figure_of(one, metric.part, metric.figure)
            if is_same and figure is not None:
                found.append(f"{other.source}: {100 * figure['value']:.1f} %")
    return ", ".join(found)


def _interference(sweep: Sweep) -> Tile | None:
    points = [point for unit in sweep.interference for point in unit["interference"]["points"]]
    known = [point for point in points if _value(point.get("perplexity_ratio")) is not None and point["num_facts"]]
    if not known:
        return None
    chosen = max(known, key=lambda point: (point["num_facts"], point["prior"]))
    name = short_name({"system": "attention", "prior": chosen["prior"], "grounding": None})
    mass = _value(chosen.get("kb_mass"))
    return Tile(
        "Perplexity of text that needs no fact",
        f"× {_value(chosen['perplexity_ratio']):.3f}",
        f"{name}; {number(chosen['num_facts'])} facts attached",
        "" if mass is None else f"facts get {100 * mass:.1f} % of the attention",
    )


def _cost(sweep: Sweep) -> Tile | None:
    points: Sequence[Mapping[str, Any]] = [point for unit in sweep.cost[:1] for point in unit["cost"]["points"]]
    timed = [
        point for point in points if point.get("fits", True) and _value(point.get("first_token_ratio")) is not None
    ]
    ours = [point for point in timed if point["way"] == "attention" and point["num_facts"]]
    if not ours:
        return None
    chosen = max(ours, key=lambda point: (point["num_facts"], point.get("selection") in (None, "all")))
    in_context = [point for point in timed if point["way"] == "in_context"]
    beside = ""
    if in_context:
        last = max(in_context, key=lambda point: point["num_facts"])
        is_full = any(point["way"] == "in_context" and not point.get("fits", True) for point in points)
        beside = f"all in the prompt: × {digits(_value(last['first_token_ratio']) or 0)} at {number(last['num_facts'])}"
        beside += " facts, then the prompt is full" if is_full else " facts"
    return Tile(
        "Time to the first token, beside no facts",
        f"× {digits(_value(chosen['first_token_ratio']) or 0)}",
        f"attention; {number(chosen['num_facts'])} facts",
        beside,
    )


def _value(figure: Any) -> float | None:
    return figure.get("value") if isinstance(figure, Mapping) else figure
