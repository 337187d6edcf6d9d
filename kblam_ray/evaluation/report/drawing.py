"""Panels drawn on matplotlib's axes, with settings of our own whatever the process has set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kblam_ray.errors import MissingDependencyError
from kblam_ray.evaluation.report.chart import BarPanel, Chart, HeatPanel, Line, LinePanel, Panel
from kblam_ray.evaluation.report.naming import INKS, clipped, tick

INK, SOFT, RULE, ON_SHADE = "#1b2024", "#5c6670", "#dde2e6", "#fefefe"

_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,  # names are data: a dollar sign is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "path.simplify": False,
}

_DASHES: Mapping[Line, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.6))}
_LINE_INCHES = (4.0, 2.7)
_BAR_INCHES = 0.21
_TIPS_OF_CURVE = 25

LONGEST_NAME = 34
"""Letters of a name that leave room for its figure."""

Tip = tuple[float, float, str]
"""Where, in the coordinates of the data, and what is said there."""


@contextmanager
def drawing(salt: str) -> Iterator[Any]:
    """matplotlib's own settings and ours for a while; gives what makes a figure.

    Args:
        salt: of the names inside an SVG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "plots need the package matplotlib", help='pip install "kblam-ray[evaluate]"'
        ) from None

    def figure_of(**settings: Any) -> Any:
        figure = Figure(**settings)
        FigureCanvasAgg(figure)
        return figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        settings: Any = _SETTINGS | {"svg.hashsalt": salt}
        matplotlib.rcParams.update(settings)
        # A name in a script that the font lacks shows as boxes in the PNG; on the page the browser has its fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield figure_of


def inches(panel: Panel) -> tuple[float, float]:
    """Width and height that a panel wants."""
    if isinstance(panel, LinePanel):
        return _LINE_INCHES
    if isinstance(panel, BarPanel):
        bars = sum(len(bars) for _, bars in panel.groups)
        heads = sum(1 for name, bars in panel.groups if name and not _is_single(panel))
        return 4.3, 0.75 + _BAR_INCHES * (bars + 1.5 * heads)
    return 1.5 + 0.64 * len(panel.columns), 0.8 + 0.3 * len(panel.rows)


def draw(axes: Any, panel: Panel) -> list[Tip]:
    """Draw a panel without its title; what is to be said where one points at it."""
    if isinstance(panel, LinePanel):
        return _draw_lines(axes, panel)
    return _draw_bars(axes, panel) if isinstance(panel, BarPanel) else _draw_heat(axes, panel)


def _draw_lines(axes: Any, panel: LinePanel) -> list[Tip]:
    numbers = sorted({point.x for one in panel.series for point in one.points} | {mark.x for mark in panel.marks})
    place = _Places(numbers) if panel.log_x else float
    tips: list[Tip] = []
    if panel.log_y:
        axes.set_yscale("log")
    if panel.has_diagonal:
        axes.plot([0, 100], [0, 100], color=RULE, linewidth=1.2, zorder=1)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=SOFT, linewidth=1, zorder=1)
    for depth, one in enumerate(reversed(panel.series)):
        ink = INKS[one.role]
        points = [point for point in one.points if not panel.log_y or point.value > 0]
        xs, ys = [place(point.x) for point in points], [point.value for point in points]
        banded = [point for point in points if point.low is not None and point.high is not None]
        if len(banded) > 1 and not panel.has_bars:
            axes.fill_between(
                [place(point.x) for point in banded],
                [_above(point.low, panel) for point in banded],
                [_above(point.high, panel) for point in banded],
                color=ink.light, alpha=0.16, linewidth=0, zorder=2,
            )  # fmt: skip
        else:
            for point in banded:
                axes.vlines(place(point.x), point.low, point.high, color=ink.light, linewidth=1.2, zorder=2)
        axes.plot(
            xs, ys,
            color=ink.light, linewidth=0.6 if panel.has_bars else 1.8, linestyle=_DASHES[one.line], zorder=3 + depth,
            marker=ink.marker if one.has_markers else "", markersize=5, markeredgewidth=0,
        )  # fmt: skip
        # Of a curve some points tell their numbers: one cannot point at a hundred.
        step = 1 if one.has_markers else math.ceil(len(points) / _TIPS_OF_CURVE) or 1
        told = list(zip(xs, ys, points, strict=True))[::step]
        tips += [(x, y, point.tip) for x, y, point in told if point.tip]
    for mark in panel.marks:
        color = SOFT if mark.role == "soft" else INKS[mark.role].light
        axes.axvline(place(mark.x), color=color, linewidth=1.2, linestyle=_DASHES["dashed"], zorder=2)
    _scale_lines(axes, panel, numbers, place)
    for mark in panel.marks:
        left, right = axes.get_xlim()
        share = (place(mark.x) - left) / (right - left)
        side = "right" if share > 0.6 else "left" if share < 0.3 else "center"
        axes.annotate(
            mark.name, (place(mark.x), 1), xycoords=("data", "axes fraction"), textcoords="offset points",
            xytext=(0, 2), ha=side, va="bottom", fontsize=7.5,
            color=SOFT if mark.role == "soft" else INKS[mark.role].light,
        )  # fmt: skip
    return tips


class _Places:
    """From numbers to places where equal factors are equal distances; 0 stands a step left of the smallest."""

    def __init__(self, numbers: Sequence[float]) -> None:
        logs = [math.log10(number) for number in numbers if number > 0]
        self._zero = min(logs, default=0.0) - max(0.6, 0.15 * (max(logs, default=0.0) - min(logs, default=0.0)))

    def __call__(self, number: float) -> float:
        return math.log10(number) if number > 0 else self._zero


def _scale_lines(axes: Any, panel: LinePanel, numbers: Sequence[float], place: Any) -> None:
    if panel.log_x and numbers:
        places = [place(number) for number in numbers]
        span = max(places) - min(places)
        shown: list[float] = []
        for number in numbers:
            if not shown or place(number) - place(shown[-1]) > 0.09 * span:
                shown.append(number)
        axes.set_xticks([place(number) for number in shown], [tick(number) for number in shown])
        axes.set_xlim(min(places) - (0.04 * span or 0.5), max(places) + (0.04 * span or 0.5))
    elif panel.x_range is not None:
        low, high = panel.x_range
        edge = 0.02 * (high - low) or 0.5
        axes.set_xlim(low - edge, high + edge)
    if panel.y_range is not None:
        low, high = panel.y_range
        axes.set_ylim(low - 0.02 * (high - low), high + 0.04 * (high - low))
        if panel.y_range == (0.0, 100.0):
            axes.set_yticks([0, 25, 50, 75, 100])
    elif panel.log_y:
        _scale_log(axes)
    else:
        low, high = axes.get_ylim()
        # A change of nothing must not look like one.
        if high - low < 1e-3 * max(1.0, abs(high)):
            middle = (low + high) / 2
            axes.set_ylim(middle - 0.5, middle + 0.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.set_xlabel(panel.x_label)
    if has_upright_label(panel):
        # Above the axis: a text that stands on its side is read by nobody.
        axes.annotate(
            panel.y_label, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points",
            ha="left", va="bottom", fontsize=8, color=SOFT,
        )  # fmt: skip


def _scale_log(axes: Any) -> None:
    """Numbers at powers of ten, and at 2 and 5 of them where there are few."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_ylim()
    is_short = high / low < 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_short else (1.0,), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: tick(value) if value >= 1 else f"{value:.6f}".rstrip("0"))


def has_upright_label(panel: Panel) -> bool:
    """Whether the name of the upright axis stands above it."""
    return isinstance(panel, LinePanel) and panel.y_label != panel.title


def _above(value: float | None, panel: LinePanel) -> float:
    """An end of an interval that a logarithmic axis can show."""
    number = 0.0 if value is None else value
    return max(number, 1e-12) if panel.log_y else number


def _is_single(panel: BarPanel) -> bool:
    """Whether each group is one bar, which then has the group's name."""
    return all(len(bars) == 1 for _, bars in panel.groups) and len({bars[0].name for _, bars in panel.groups}) == 1


def _draw_bars(axes: Any, panel: BarPanel) -> list[Tip]:
    low, high = panel.x_range
    is_single = _is_single(panel)
    at = 0.0
    labels: list[tuple[float, str]] = []
    tips: list[Tip] = []
    for name, bars in panel.groups:
        if name and not is_single:
            at += 0.5
            axes.text(low, at, clipped(name, LONGEST_NAME), ha="left", va="center", fontweight="bold", fontsize=8.5)
            at += 1
        for bar in bars:
            color = INKS[bar.role].light
            axes.barh(at, bar.value - low, 0.72, left=low, color=color, alpha=1 if bar.line == "solid" else 0.55)
            if bar.low is not None and bar.high is not None:
                axes.hlines(at, bar.low, bar.high, color=INK, linewidth=1.1)
            end = max(bar.value, bar.high or bar.value)
            axes.text(end + 0.015 * (high - low), at, f"{bar.value:.1f}", va="center", fontsize=8, color=INK)
            labels.append((at, name if is_single and name else bar.name))
            tips.append(((low + bar.value) / 2, at, bar.tip))
            at += 1
    axes.set_yticks([place for place, _ in labels], [clipped(label, LONGEST_NAME) for _, label in labels])
    axes.set_ylim(at - 0.4, -0.6)
    axes.set_xlim(low, high + 0.1 * (high - low))
    if panel.x_range == (0.0, 100.0):
        axes.set_xticks([0, 25, 50, 75, 100])
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel(panel.x_label)
    return tips


def _draw_heat(axes: Any, panel: HeatPanel) -> list[Tip]:
    from matplotlib.patches import Rectangle

    tips: list[Tip] = []
    for row, cells in enumerate(panel.cells):
        for column, value in enumerate(cells):
            if value is None:
                axes.text(column, row, "–", ha="center", va="center", color=SOFT)
                continue
            share = min(max(value / 100, 0.0), 1.0)
            box = Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, linewidth=0)
            box.set_facecolor(INKS["prior"].light)
            box.set_alpha(0.04 + 0.96 * share**1.4)
            axes.add_patch(box)
            color = ON_SHADE if share > 0.62 else INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
            tips.append((column, row, f"{panel.rows[row]}, {panel.columns[column]}: {value:.1f} %"))
    axes.set_xlim(-0.5, len(panel.columns) - 0.5)
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_xticks(range(len(panel.columns)), [name.replace(" ", "\n") for name in panel.columns])
    axes.set_yticks(range(len(panel.rows)), [clipped(name, LONGEST_NAME) for name in panel.rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return tips


def draw_legend(figure: Any, chart: Chart, *, columns: int) -> None:
    """Draw the keys of all lines below the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], label=clipped(one.name, LONGEST_NAME), color=INKS[one.role].light, linestyle=_DASHES[one.line],
            linewidth=1.8,
            marker=INKS[one.role].marker if one.has_markers else "", markersize=5, markeredgewidth=0,
        )
        for one in chart.legend
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, handlelength=3)
