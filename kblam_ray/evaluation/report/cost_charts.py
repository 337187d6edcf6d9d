"""Charts of what facts cost: what they do to text that needs none, and the time and memory of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kblam_ray.evaluation.report.chart import Chart, Line, LinePanel, Mark, Point, Series
from kblam_ray.evaluation.report.naming import number, plain, role_of, short_name, size_of
from kblam_ray.evaluation.report.sweeps import Context, Sweep

_ATTACHED = "facts attached"

_INTERFERENCE = (
    ("perplexity_ratio", "perplexity, times that without facts", 1.0, 1.0),
    ("divergence", "next-token divergence, nats", 1.0, None),
    ("kb_mass", "attention given to facts, %", 100.0, None),
    ("agreement", "same most likely next token, %", 100.0, None),
)
"""Figure, axis, scale, and the height that is none."""

_TIMES = (
    ("first_token_s", "first token, ms", 1000.0, True),
    ("per_token_s", "each further token, ms", 1000.0, True),
    ("first_token_ratio", "first token, times no facts", 1.0, True),
    ("per_token_ratio", "each further token, times no facts", 1.0, True),
)


_INTERFERENCE_OF_ANSWERS = (
    ("answer_divergence", "next-token divergence, nats", 1.0, None),
    ("answer_kb_mass", "attention given to facts, %", 100.0, None),
    ("answer_agreement", "same most likely token, %", 100.0, None),
)


def interference_charts(sweep: Sweep) -> list[Chart]:
    """Per context: what the facts attached do to every token of texts, and to the first token of an answer to them."""
    varying = sweep.varying(sweep.interference)
    charts = []
    for place, unit in enumerate(sweep.interference, 1):
        found = unit["interference"]
        if len({point["num_facts"] for point in found["points"]}) < 2:
            continue
        label = ", ".join(Context.of(unit).word(name) for name in varying)
        titled = f": {label}" if label else ""
        ending = f"-{place}" if len(sweep.interference) > 1 else ""
        panels = _attached_panels(found["points"], _INTERFERENCE)
        if panels:
            about = (
                f"{number(found['num_texts'])} texts that need no fact, read with more and more facts attached. Left: "
                "none, the base model. Nothing should change: a ratio of 1, a divergence of 0."
            )
            title = f"What facts do to text that needs none{titled}"
            charts.append(Chart(f"interference{ending}", title, about, panels, place > 1))
        panels = _attached_panels(found["points"], _INTERFERENCE_OF_ANSWERS)
        if panels:
            about = "The first token of an answer to each of these texts is where facts are looked for."
            title = f"What facts do to the beginning of an answer that needs none{titled}"
            charts.append(Chart(f"interference-of-answers{ending}", title, about, panels, True))
    return charts


def _attached_panels(
    points: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, str, float, float | None]]
) -> tuple[LinePanel, ...]:
    panels = []
    for figure, axis, scale, reference in figures:
        series = tuple(
            one
            for prior in (True, False)
            if (one := _attached([point for point in points if point["prior"] == prior], figure, scale, prior))
        )
        if series:
            panels.append(LinePanel(axis, _ATTACHED, axis, series, log_x=True, reference=reference))
    return tuple(panels)


def _attached(points: Sequence[Mapping[str, Any]], figure: str, scale: float, prior: bool) -> Series | None:
    name = short_name({"system": "attention", "prior": prior, "grounding": None})
    drawn = _points(points, figure, scale, name)
    return Series(name, role_of("attention", prior), "solid", drawn) if drawn else None


def cost_charts(sweep: Sweep) -> list[Chart]:
    """Per context: times over facts, and memory over facts, with the place from which facts do not fit the prompt."""
    varying = sweep.varying(sweep.cost)
    charts = []
    for place, unit in enumerate(sweep.cost, 1):
        cost = unit["cost"]
        points = cost["points"]
        if len({point["num_facts"] for point in points}) < 2:
            continue
        label = ", ".join(Context.of(unit).word(name) for name in varying)
        titled = f": {label}" if label else ""
        ending = f"-{place}" if len(sweep.cost) > 1 else ""
        marks = _full(points, cost.get("limit_tokens"))
        beside = (
            f" On {cost['device']}, {cost['threads']} thread{'s' * (cost['threads'] != 1)}; "
            if "device" in cost
            else " "
        )
        beside += "the ways take turns, so that a busy machine slows all of them."
        times = tuple(
            LinePanel(axis, "facts", axis, series, log_x=True, log_y=log_y, marks=marks,
                      reference=1.0 if "ratio" in figure else None)
            for figure, axis, scale, log_y in _TIMES
            if (series := _ways(points, figure, scale))
        )  # fmt: skip
        if times:
            about = f"Time until the first token of an answer, and for each one after it.{beside}"
            charts.append(Chart(f"time{ending}", f"How long an answer takes{titled}", about, times, place > 1))
        memory = tuple(
            LinePanel(axis, "facts", axis, series, log_x=True, log_y=True, marks=marks)
            for axis, series in (
                ("facts and the prompt's cache, megabytes", _memory(points)),
                ("until the facts are ready, seconds", _ways(points, "load_s", 1.0)),
            )
            if series
        )
        if memory:
            about = "What the facts take in memory, and what the prompt leaves in the model's key-value cache."
            charts.append(Chart(f"memory{ending}", f"How much memory facts take{titled}", about, memory, place > 1))
    return charts


def _ways(points: Sequence[Mapping[str, Any]], figure: str, scale: float) -> tuple[Series, ...]:
    return _by_way(points, lambda own, name: _points(own, figure, scale, name))


def _memory(points: Sequence[Mapping[str, Any]]) -> tuple[Series, ...]:
    def drawn(own: Sequence[Mapping[str, Any]], name: str) -> tuple[Point, ...]:
        totals = [(point["num_facts"], _bytes(point)) for point in own if point.get("fits", True)]
        return tuple(
            Point(num_facts, total / 1e6, tip=f"{name}, {number(num_facts)} facts: {size_of(total)}")
            for num_facts, total in sorted(totals)
            if total is not None and total > 0
        )

    return _by_way(points, drawn)


def _bytes(point: Mapping[str, Any]) -> float | None:
    parts = [point.get(name) for name in ("knowledge_bytes", "cache_bytes")]
    known = [part for part in parts if part is not None]
    return float(sum(known)) if known else None


def _by_way(
    points: Sequence[Mapping[str, Any]], drawn: Callable[[Sequence[Mapping[str, Any]], str], tuple[Point, ...]]
) -> tuple[Series, ...]:
    ways = dict.fromkeys((point["way"], point.get("selection")) for point in points)
    order = ("attention", "in_context", "dense", "bm25", "zero_shot")
    found = []
    for way, selection in sorted(ways, key=lambda one: order.index(one[0]) if one[0] in order else len(order)):
        own = [point for point in points if (point["way"], point.get("selection")) == (way, selection)]
        name = short_name({"system": way, "prior": None, "grounding": None})
        num_selected = (selection or "").partition(":")[2] if way == "attention" else ""
        is_selected = bool(num_selected)
        if is_selected:
            name += f", nearest {num_selected}"
        line: Line = "dashed" if is_selected else "solid"
        # The attention of a request includes whatever prior the adapter has.
        found.append(Series(name, role_of(way, way == "attention" and not is_selected), line, drawn(own, name)))
    return tuple(series for series in found if series.points)


def _points(points: Iterable[Mapping[str, Any]], figure: str, scale: float, name: str) -> tuple[Point, ...]:
    found = []
    for point in sorted(points, key=lambda one: one["num_facts"]):
        value = point.get(figure)
        if not point.get("fits", True) or value is None:
            continue
        if not isinstance(value, Mapping):
            value = {"value": value}
        if value.get("value") is None:
            continue
        low, high = value.get("low"), value.get("high")
        low, high = (None, None) if low is None or high is None else (scale * low, scale * high)
        tip = f"{name}, {number(point['num_facts'])} facts: {plain(value, scale)}"
        found.append(Point(point["num_facts"], scale * value["value"], low, high, tip))
    return tuple(found)


def _full(points: Iterable[Mapping[str, Any]], limit_tokens: int | None) -> tuple[Mark, ...]:
    """The smallest number of facts that the prompt cannot hold, where one was tried."""
    over = [point["num_facts"] for point in points if point["way"] == "in_context" and not point.get("fits", True)]
    if not over:
        return ()
    limit = f" ({number(limit_tokens)} tokens)" if limit_tokens else ""
    return (Mark(min(over), f"the prompt is full{limit}", "in_context"),)
