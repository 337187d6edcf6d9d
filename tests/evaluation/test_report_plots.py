"""What is drawn: PNGs that are equal for equal charts, and SVGs that stand in a page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from PIL import Image
from report_samples import EVIL

from kblam_ray.evaluation.report.chart import Bar, BarPanel, Chart, HeatPanel, LinePanel, Mark, Point, Series
from kblam_ray.evaluation.report.naming import INKS
from kblam_ray.evaluation.report.plots import chart_png, legend_svg, panel_svg

LINES = LinePanel(
    "a $title$ of two",
    "facts",
    "%",
    (
        Series("attention", "prior", "solid", (Point(0, 10, 5, 15, "ten"), Point(100, 50, 40, 60, "fifty"))),
        Series("dense", "dense", "dashed", (Point(0, 20, tip="twenty"), Point(100, 40))),
    ),
    log_x=True,
    marks=(Mark(100, "full", "in_context"),),
)
BARS = BarPanel("bars", "%", (("one", (Bar("attention", "prior", "solid", 80, 70, 90, "eighty"),)),))
HEAT = HeatPanel("heat", ("attention",), ("simple", "two entity"), ((90, None),), ("prior",))


def chart(*panels, name: str = "chart") -> Chart:
    return Chart(name, "A title", "How it is read.", panels)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_equal_charts_are_equal_pngs_whatever_the_process_has_set():
    first = chart_png(chart(LINES))
    with mpl.rc_context({"font.size": 30, "savefig.dpi": 20, "axes.facecolor": "red"}):
        assert chart_png(chart(LINES)) == first
    assert chart_png(chart(BARS)) != first
    picture = Image.open(io.BytesIO(first)).convert("RGB")
    assert picture.getpixel((2, picture.height - 2)) == (255, 255, 255)
    # The colour of the system is in the picture.
    ink = tuple(int(INKS["prior"].light[at : at + 2], 16) for at in (1, 3, 5))
    assert ink in {color for _, color in picture.getcolors(1 << 20)}


def test_a_chart_has_all_its_panels():
    widths = [Image.open(io.BytesIO(chart_png(chart(*[LINES] * count)))).size for count in (1, 3, 4, 5)]
    assert widths[1][0] == 3 * widths[0][0]
    assert widths[2][0] == 2 * widths[0][0]
    assert widths[3][1] > 1.5 * widths[1][1]


@pytest.mark.parametrize("panel", [LINES, BARS, HEAT])
def test_an_svg_needs_nothing_and_gives_nothing_away(panel):
    svg = panel_svg(panel, "salt")
    assert panel_svg(panel, "salt") == svg
    assert "http" not in svg
    assert "<style" not in svg
    assert "#" not in re.sub(r'href="#\w+"|url\(#\w+\)', "", svg).replace("&#", "")
    names = {name for pair in re.findall(r'href="#(\w+)"|url\(#(\w+)\)', svg) for name in pair if name}
    ids = re.findall(r' id="([^"]+)"', svg)
    assert sorted(ids) == sorted(names)
    root = parsed(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == panel.title


def test_names_inside_differ_from_those_of_other_panels():
    first, second = (set(re.findall(r' id="([^"]+)"', panel_svg(LINES, salt))) for salt in ("a", "b"))
    assert first
    assert not first & second


def test_colours_are_the_pages_own():
    svg = panel_svg(LINES, "salt")
    assert "var(--ink-prior)" in svg
    assert "var(--ink-in_context)" in svg
    assert "var(--rule)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "stroke-dasharray" in legend_svg("dense", "dashed")
    assert legend_svg("dense", has_marker=False).count("<path") == 1


def test_points_tell_their_numbers_where_they_stand():
    root = parsed(panel_svg(LINES, "salt"))
    tips = {tip.find("title").text: tip for tip in root.iter("circle")}
    assert set(tips) == {"ten", "fifty", "twenty"}
    # Right and up.
    assert float(tips["fifty"].get("cx")) > float(tips["ten"].get("cx")) == float(tips["twenty"].get("cx"))
    assert float(tips["fifty"].get("cy")) < float(tips["twenty"].get("cy")) < float(tips["ten"].get("cy"))
    texts = ["".join(text.itertext()) for text in root.iter("text")]
    assert {"0", "100", "facts", "full"} <= set(texts)


def test_names_are_text_and_neither_mathematics_nor_markup():
    panel = BarPanel(EVIL, "$x_1$ %", ((EVIL, (Bar("$a^2$", "prior", "solid", 50, 40, 60, EVIL),)), ("b", (
        Bar("a", "prior", "solid", 50, 40, 60), Bar("b", "dense", "solid", 50, 40, 60)))))  # fmt: skip
    svg = panel_svg(panel, "salt")
    texts = ["".join(text.itertext()) for text in parsed(svg).iter("text")]
    # Long names end where there would be no room for anything else.
    assert {"$x_1$ %", "$a^2$", EVIL[:33] + "…"} <= set(texts)
    assert EVIL in {title.text for title in parsed(svg).iter("title")}
    assert "<script" not in svg
    assert "<img" not in svg
    assert chart_png(chart(panel))


def test_one_bar_for_each_group_has_the_groups_name():
    bars = tuple((name, (Bar("attention", "prior", "solid", 50, 40, 60),)) for name in ("C = 1", "C = 10"))
    texts = ["".join(text.itertext()) for text in parsed(panel_svg(BarPanel("", "%", bars), "s")).iter("text")]
    assert {"C = 1", "C = 10"} <= set(texts)
    assert "attention" not in texts


def test_what_is_not_larger_than_nothing_is_not_on_a_logarithmic_axis():
    panel = LinePanel(
        "memory", "facts", "MB",
        (Series("a", "prior", "solid", (Point(10, 0.0, tip="none"), Point(100, 5.0, 0.0, 9.0, tip="five"))),),
        log_x=True, log_y=True,
    )  # fmt: skip
    assert [tip.find("title").text for tip in parsed(panel_svg(panel, "s")).iter("circle")] == ["five"]


def test_a_line_that_does_not_change_stands_in_the_middle():
    points = (Point(0, 1.0, 1.0, 1.0, tip="a"), Point(10, 1.0, 1.0, 1.0, tip="b"))
    root = parsed(panel_svg(LinePanel("t", "facts", "ratio", (Series("a", "prior", "solid", points),)), "s"))
    heights = {float(tip.get("cy")) for tip in root.iter("circle")}
    (height,) = heights
    assert 40 < height < 140
