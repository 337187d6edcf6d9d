"""Charts as files and for the page: a PNG for each, an SVG for each panel whose colours are the page's."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape

from kblam_ray.evaluation.report.chart import Chart, HeatPanel, Line, LinePanel, Panel
from kblam_ray.evaluation.report.drawing import (
    INK,
    ON_SHADE,
    RULE,
    SOFT,
    Tip,
    draw,
    draw_legend,
    drawing,
    has_upright_label,
    inches,
)
from kblam_ray.evaluation.report.naming import INKS, clipped

_VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", ON_SHADE: "on-shade"} | {
    ink.light: f"ink-{role}" for role, ink in INKS.items()
}
"""The custom property of the page's style that takes the place of each colour."""

_PNG_DPI = 120


def panel_svg(panel: Panel, salt: str) -> str:
    """One panel as an SVG element to stand inside a page: no file, no script, no address but its own.

    Its title is left to the page. Colours are custom properties (`--ink`, `--ink-dense`, ...), so that light and dark
    need one drawing; what one points at tells its numbers.

    Args:
        salt: makes the names inside differ from those of other panels on the page.
    """
    with drawing(salt) as figure_of:
        width, height = inches(panel)
        figure = figure_of(figsize=(width, height), dpi=72, layout="constrained")
        axes = figure.subplots()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        tips = draw(axes, panel)
        file = io.StringIO()
        figure.savefig(file, format="svg", dpi=72, metadata={"Date": None, "Creator": None})
        places = [(*axes.transData.transform((x, y)), text) for x, y, text in tips]
    return _for_the_page(file.getvalue(), panel, [(x, 72 * height - y, text) for x, y, text in places])


def chart_png(chart: Chart) -> bytes:
    """A chart with its panels, title and legend; equal charts give equal bytes."""
    with drawing(chart.name) as figure_of:
        sizes = [inches(panel) for panel in chart.panels]
        # Four stand two by two, and what is not a line panel is wide.
        columns = min(len(sizes), 3 if isinstance(chart.panels[0], LinePanel) and len(sizes) != 4 else 2)
        rows = math.ceil(len(sizes) / columns)
        width = columns * max(width for width, _ in sizes)
        heights = [max(height for _, height in sizes[row * columns : (row + 1) * columns]) for row in range(rows)]
        legend_rows = math.ceil(len(chart.legend) / max(1, int(width / 1.9)))
        full = sum(heights) + 0.45 + 0.22 * legend_rows
        figure = figure_of(figsize=(width, full), dpi=_PNG_DPI, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
        for place, axes in enumerate(grid.flat):
            if place >= len(chart.panels):
                axes.set_visible(False)
                continue
            panel = chart.panels[place]
            draw(axes, panel)
            if panel.title:
                axes.set_title(
                    clipped(panel.title, int(9 * inches(panel)[0])), pad=18 if has_upright_label(panel) else 8
                )
        figure.suptitle(clipped(chart.title, int(10 * width)), x=0.01, ha="left", fontsize=12, fontweight="bold")
        if chart.legend:
            draw_legend(figure, chart, columns=max(1, int(width / 1.9)))
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return file.getvalue()


def legend_svg(role: str, line: Line = "solid", *, has_marker: bool = True) -> str:
    """The key of one line, for a legend on the page."""
    dashes = {"solid": "", "dashed": ' stroke-dasharray="6 3"', "dotted": ' stroke-dasharray="2 2.5"'}[line]
    color = f"var(--ink-{role})"
    marker = f'<path d="{_KEYS[INKS[role].marker]}" fill="{color}"/>' if has_marker else ""
    return (
        f'<svg class="key" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">'
        f'<path d="M1 6H29" fill="none" stroke="{color}" stroke-width="2.5"{dashes}/>{marker}</svg>'
    )


_KEYS = {
    "o": "M15 2a4 4 0 1 0 .01 0z",
    "h": "M15 1.5l4 2.3v4.4l-4 2.3-4-2.3V3.8z",
    "X": "M11 3.5L12.5 2 15 4.5 17.5 2 19 3.5 16.5 6 19 8.5 17.5 10 15 7.5 12.5 10 11 8.5 13.5 6z",
    "s": "M11.5 2.5h7v7h-7z",
    "^": "M15 1.5l4.5 8h-9z",
    "D": "M15 1l5 5-5 5-5-5z",
    "v": "M15 10.5l4.5-8h-9z",
    "P": "M13.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
}
"""The markers in a legend, around (15, 6), as paths."""


def _for_the_page(svg: str, panel: Panel, tips: Sequence[Tip]) -> str:
    """What matplotlib wrote, without what only a file of its own needs, in the page's colours and fonts."""
    start, end = svg.index("<svg"), svg.rindex("</svg>")
    head, _, body = svg[start:end].partition(">")
    # Its style would be the whole page's; the page gives lines their joins.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    names = {name for pair in used for name in pair if name}
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in names else "", body)
    body = re.sub(r" font-family: [^;\"]+;| transform=\"rotate\(-0 [^)]*\)\"", "", body)
    for color, name in _VARIABLES.items():
        body = re.sub(rf"(?<=: ){color}\b", f"var(--{name})", body, flags=re.IGNORECASE)
    body = "\n".join(line.strip() for line in body.splitlines() if line.strip())
    box = re.search(r'viewBox="[^"]+"', head)
    width = re.search(r'width="([\d.]+)', head)
    assert box is not None, "matplotlib writes a viewBox"
    assert width is not None, "matplotlib writes a width"
    label = escape(panel.title or (panel.x_label if not isinstance(panel, HeatPanel) else "heat map"), quote=True)
    points = "".join(
        f'<circle class="tip" cx="{x:.1f}" cy="{y:.1f}" r="8"><title>{escape(text)}</title></circle>'
        for x, y, text in tips
    )
    return f'<svg class="plot" {box[0]} style="--width:{width[1]}" role="img" aria-label="{label}">{body}{points}</svg>'
