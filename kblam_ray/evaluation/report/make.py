"""A report of one or several sweeps: its HTML page, the same as Markdown, and the plots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from kblam_ray.errors import InputError
from kblam_ray.evaluation.report.chart import Chart
from kblam_ray.evaluation.report.charts import charts_of
from kblam_ray.evaluation.report.naming import environment_words
from kblam_ray.evaluation.report.plots import chart_png
from kblam_ray.evaluation.report.tables import Table, one_line, prose, sweep_markdown

PLOTS = "plots"
"""The folder of the plots beside the report."""


@dataclass(frozen=True)
class Published:
    """A table that stands beside results.

    Attributes:
        head: names of the columns.
        rows: cells, as many as the head has.
        note: what a reader of the table has to know.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One sweep in a report.

    Attributes:
        name: different from that of other sections.
        title: its heading.
        about: what is asked; paragraphs stand apart by an empty line.
        summary: of the sweep, as its `summary.json` has it; without units the section says that nothing was measured.
        rows: of the sweep, as its `rows.parquet` has them.
        published: figures of others.
    """

    name: str
    title: str
    about: str
    summary: Mapping[str, Any]
    rows: pa.Table
    published: Published | None = None


@dataclass(frozen=True)
class Report:
    """A report, ready to be written.

    Attributes:
        html: one page that needs nothing beside it.
        markdown: the tables, with the plots in the folder `plots`.
        plots: PNGs by file name.
    """

    html: str
    markdown: str
    plots: Mapping[str, bytes]


@dataclass(frozen=True)
class Prepared:
    """A section with its charts, whose names are unique in the report."""

    section: Section
    slug: str
    charts: tuple[Chart, ...]


def make_report(title: str, sections: Sequence[Section], *, about: str = "") -> Report:
    """Lay out sweeps: key figures, charts, tables, published figures, questions, and how it was measured.

    Equal input gives an equal report, to the byte.

    Args:
        about: what the report is of; paragraphs stand apart by an empty line.

    Raises:
        InputError: two sections of one name, or a published table whose rows are not as wide as its head.
        MissingDependencyError: matplotlib or Jinja2 is not installed.
    """
    from kblam_ray.evaluation.report.page import page

    _check(sections)
    prepared = []
    slugs: set[str] = set()
    for section in sections:
        slug = _slug(section.name, slugs)
        prefix = f"{slug}-" if len(sections) > 1 else ""
        charts = tuple(replace(chart, name=prefix + chart.name) for chart in charts_of(section.summary))
        prepared.append(Prepared(section, slug, charts))
    plots = {f"{chart.name}.png": chart_png(chart) for one in prepared for chart in one.charts}
    return Report(page(title, prepared, about=about), _markdown(title, prepared, about), plots)


def _check(sections: Sequence[Section]) -> None:
    names = [section.name for section in sections]
    for section in sections:
        if names.count(section.name) > 1:
            raise InputError("two sections of one name", where=section.name, help="give each its own name")
        told = section.published
        if told is not None and any(len(row) != len(told.head) for row in told.rows):
            raise InputError(
                "a row of published figures has not as many cells as its head",
                where=section.name,
                help="give each row a cell for every column",
            )


def _slug(name: str, taken: set[str]) -> str:
    """The name as it can stand in a file name and in an address; different for different names."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "section"
    slug, number = plain, 2
    # `how` is the page's own.
    while slug in taken or slug == "how":
        slug, number = f"{plain}-{number}", number + 1
    taken.add(slug)
    return slug


def _markdown(title: str, prepared: Sequence[Prepared], about: str) -> str:
    parts = [f"# {one_line(title)}", prose(about)]
    for one in prepared:
        section = one.section
        parts += [f"## {one_line(section.title)}", prose(section.about)]
        parts += [f"![{_alternative(chart.title)}]({PLOTS}/{chart.name}.png)" for chart in one.charts]
        if section.published is not None:
            told = section.published
            parts += [Table("Beside published figures", told.head, told.rows).markdown(), prose(told.note)]
        parts.append(sweep_markdown(section.summary).strip())
        parts.append(_how(section.summary))
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(summary: Mapping[str, Any]) -> str:
    environment = summary.get("environment", {})
    command = environment.get("command")
    known = [f"{name} {one_line(value)}" for name, value in environment_words(environment)]
    lines = [f"Base model {one_line(summary['base_model'])}."] if summary.get("base_model") else []
    if known:
        lines.append("; ".join(known) + ".")
    text = f"Measured with: {' '.join(lines)}" if lines else ""
    # Indented, so that nothing in it ends the code.
    return f"{text}\n\n    {' '.join(command.splitlines())}" if command else text


def _alternative(title: str) -> str:
    return one_line(title).replace("[", "(").replace("]", ")")
