"""Charts of the refusal threshold: what it trades, where it stands, and whether its statistic means what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kblam_ray.evaluation.report.chart import Chart, LinePanel, Mark, Point, Series
from kblam_ray.evaluation.report.naming import number, role_of, short_name
from kblam_ray.evaluation.report.sweeps import Context, Sweep, results_of

Scored = dict[str, Mapping[str, Any]]
"""By the name of a system, a result of it that has a calibration: its groundings share the statistic."""


def refusal_charts(sweep: Sweep) -> list[Chart]:
    """For each context, at its size of comparison: receiver curve, thresholds and reliability."""
    found: list[Chart] = []
    if not sweep.questions:
        return found
    largest = sweep.largest()
    for place, (context, size) in enumerate(largest.items(), 1):
        scored: Scored = {}
        for result in results_of(size):
            if result.get("calibration"):
                scored.setdefault(short_name({**result, "grounding": None}, "retrieval"), result)
        if scored:
            found += _charts_of(sweep, context, size, scored, place if len(largest) > 1 else None)
    return found


def _charts_of(
    sweep: Sweep, context: Context, size: Mapping[str, Any], scored: Scored, place: int | None
) -> list[Chart]:
    where = ", ".join(filter(None, [sweep.label(context), f"{number(size['num_facts'])} facts"]))
    ending = "" if place is None else f"-{place}"
    is_detail = place is not None and place > 1
    receiver, reliability = _receiver(scored), _reliability(scored)
    panels = [panel for panel in (receiver, reliability) if panel is not None]
    charts = []
    if panels:
        about = (
            "Left to right, ever more questions are refused: those that have no answer should come before those that "
            "have one, so the nearer the curve is to the upper left corner, the better."
            if receiver
            else ""
        )
        if reliability:
            about += " Reliability: of the questions given a chance of p, a share of p should have an answer: points on"
            about += " the diagonal are honest, below it too sure."
        title = f"Does it know what it knows? {where}"
        charts.append(Chart(f"refusal-curves{ending}", title, about.strip(), tuple(panels), is_detail))
    # Of what has a threshold: a search only ranks.
    thresholds = tuple(
        panel
        for name, result in scored.items()
        if result["system"] == "attention" and (panel := _thresholds(name, result["calibration"])) is not None
    )
    if thresholds:
        about = "What another threshold would give on these questions; upright line: the one stored with the adapter."
        charts.append(Chart(f"thresholds{ending}", f"Where the refusal threshold stands: {where}", about, thresholds,
                            is_detail))  # fmt: skip
    return charts


def _receiver(scored: Scored) -> LinePanel | None:
    series = tuple(
        Series(
            name,
            role_of(result["system"], result["prior"]),
            "solid",
            tuple(
                Point(
                    100 * point["false_positive"],
                    100 * point["true_positive"],
                    tip=f"{name}: {100 * point['true_positive']:.0f} % of the unanswerable and "
                    f"{100 * point['false_positive']:.0f} % of the answerable refused",
                )
                for point in result["calibration"]["receiver"]
            ),
            has_markers=False,
        )
        for name, result in scored.items()
        if result["calibration"].get("receiver")
    )
    if not series:
        return None
    return LinePanel(
        "receiver curve",
        "answerable questions refused, %",
        "unanswerable ones refused, %",
        series,
        x_range=(0.0, 100.0),
        y_range=(0.0, 100.0),
        has_diagonal=True,
    )


def _reliability(scored: Scored) -> LinePanel | None:
    series = []
    for name, result in scored.items():
        bins = [one for one in result["calibration"].get("bins") or () if one["share_answerable"]["value"] is not None]
        points = tuple(
            Point(
                100 * one["mean_statistic"],
                100 * one["share_answerable"]["value"],
                100 * one["share_answerable"]["low"],
                100 * one["share_answerable"]["high"],
                f"{name}: said {100 * one['mean_statistic']:.0f} %, "
                f"{100 * one['share_answerable']['value']:.0f} % of {one['share_answerable']['count']} have an answer",
            )
            for one in bins
        )
        if points:
            series.append(Series(name, role_of(result["system"], result["prior"]), "solid", points))
    if not series:
        return None
    return LinePanel(
        "reliability",
        "chance of an answer, as the model says, %",
        "have an answer, %",
        tuple(series),
        x_range=(0.0, 100.0),
        y_range=(0.0, 100.0),
        has_diagonal=True,
        has_bars=True,
    )


def _thresholds(name: str, calibration: Mapping[str, Any]) -> LinePanel | None:
    """Precision, recall and F1, drawn apart by their lines."""
    points = calibration.get("thresholds") or ()
    series = []
    for figure, line in (("f1", "solid"), ("precision", "dashed"), ("recall", "dotted")):
        drawn = tuple(
            Point(
                one["threshold"], 100 * one[figure], tip=f"threshold {one['threshold']:.3g}: {100 * one[figure]:.0f} %"
            )
            for one in points
            if one.get(figure) is not None
        )
        if len(drawn) > 1:
            label = "F1" if figure == "f1" else figure
            series.append(Series(label, "other", line, drawn, has_markers=False))  # type: ignore[arg-type]
    if not series:
        return None
    marks = []
    if calibration.get("threshold") is not None:
        marks.append(Mark(calibration["threshold"], "stored"))
    places = [point.x for one in series for point in one.points] + [mark.x for mark in marks]
    return LinePanel(
        name,
        "threshold",
        "of refusals, %",
        tuple(series),
        x_range=(min(places), max(places)),
        y_range=(0.0, 100.0),
        marks=tuple(marks),
    )
