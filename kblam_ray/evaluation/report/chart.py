"""What a chart is before it is drawn: panels of lines, of bars or of a heat map, with what is said about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Line = Literal["solid", "dashed", "dotted"]


@dataclass(frozen=True)
class Point:
    """A figure at a place.

    Attributes:
        x: place on the horizontal axis.
        value: what was measured.
        low, high: ends of its interval; None where it has none.
        tip: what is shown when one points at it.
    """

    x: float
    value: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one system.

    Attributes:
        name: in the legend.
        role: of its colour, a key of `naming.INKS`.
        line: how it is drawn.
        points: from left to right.
        has_markers: whether each point is marked.
    """

    name: str
    role: str
    line: Line
    points: tuple[Point, ...]
    has_markers: bool = True


@dataclass(frozen=True)
class Mark:
    """A place on the horizontal axis with a name, drawn as an upright line.

    Attributes:
        role: of its colour; `soft` for one that belongs to no system.
    """

    x: float
    name: str
    role: str = "soft"


@dataclass(frozen=True)
class LinePanel:
    """Lines over a number.

    Attributes:
        log_x: whether equal factors are equal distances; 0 then stands one step left of the smallest number.
        log_y: likewise upwards; what is not larger than 0 is then not drawn.
        y_range: ends of the upright axis; None: what the values need.
        reference: a height that the values are to be compared with, drawn as a thin line.
        has_diagonal: whether the line of equal coordinates is drawn.
        has_bars: whether intervals are upright bars and not bands: the points are apart.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    reference: float | None = None
    has_diagonal: bool = False
    has_bars: bool = False
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Bar:
    """One system's figure.

    Attributes:
        name, role, line: as of a `Series`; a bar of another line than solid is drawn lighter.
    """

    name: str
    role: str
    line: Line
    value: float
    low: float | None
    high: float | None
    tip: str = ""


@dataclass(frozen=True)
class BarPanel:
    """Bars in groups, each group with its name.

    Attributes:
        x_range: ends of the axis of values.
    """

    title: str
    x_label: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    x_range: tuple[float, float] = (0.0, 100.0)


@dataclass(frozen=True)
class HeatPanel:
    """Numbers from 0 to 100 as shades, a row per system.

    Attributes:
        cells: a row for each of `rows`, a number for each of `columns`; None where nothing was measured.
        roles: of each row.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    roles: tuple[str, ...]


Panel = LinePanel | BarPanel | HeatPanel


@dataclass(frozen=True)
class Chart:
    """Panels that are looked at together.

    Attributes:
        name: of its file, without suffix: letters, digits and hyphens.
        title: what is seen, in plain words.
        about: how it is read: what the axes are, what is better.
        panels: at least one.
        is_detail: whether it repeats a chart before it in more detail.
        is_split: whether it splits one before it; among many sections it counts as detail.
    """

    name: str
    title: str
    about: str
    panels: tuple[Panel, ...]
    is_detail: bool = False
    is_split: bool = False

    @property
    def legend(self) -> tuple[Series, ...]:
        """What is drawn in panels of lines, each name once, without its points."""
        found: dict[tuple[str, str, Line], Series] = {}
        for panel in self.panels:
            for one in panel.series if isinstance(panel, LinePanel) else ():
                key = (one.name, one.role, one.line)
                # Marked where any panel marks it.
                if key not in found or one.has_markers:
                    found[key] = replace(one, points=())
        return tuple(found.values())
