"""Published figures, and the table that sets them beside what a sweep found.

Every figure names where it was read. A model that was not run here is marked so; what a paper shows only as a figure
without numbers is named and not guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from kblam_ray.job import JobConfig

NOT_RUN = "not run here"
NONE = "–"
OTHER_SIZES = "Other sizes"

Ours = Literal["attention", "selection", "bm25", "largest", "memory", "context", "none"]
Metric = Literal["@1", "@5"]


class _Source(JobConfig):
    short: str
    title: str
    url: str


class _Named(JobConfig):
    experiments: list[str] = Field(min_length=1)
    source: str


class _Figure(_Named):
    """Figures by size of the knowledge base, in per cent."""

    place: str
    system: str
    model: str
    data: str
    ours: Ours
    values: dict[Metric, dict[int, float]] = Field(min_length=1)


class _Statement(_Named):
    """One figure that a text states."""

    place: str
    model: str
    what: str
    value: str
    ours: Ours


class _Unread(_Named):
    """What a paper shows as a figure without numbers."""

    what: str


class PublishedFigures(JobConfig):
    """All of `published.yaml`."""

    sources: dict[str, _Source]
    figures: list[_Figure]
    statements: list[_Statement]
    unread: list[_Unread]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for one in (*self.figures, *self.statements, *self.unread):
            if one.source not in self.sources:
                raise ValueError(f"there is no source {one.source}")
        return self


@dataclass(frozen=True)
class PublishedTable:
    """A table beside results: `head`, and rows of as many cells."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


@cache
def published_figures() -> PublishedFigures:
    """What `published.yaml` states."""
    text = (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
    return PublishedFigures.model_validate(yaml.safe_load(text))


def published_table(
    experiment: str, *, base_model: str, label: str, summary: Mapping[str, Any] | None
) -> PublishedTable | None:
    """The published figures of an experiment beside ours; None where nothing is published.

    Args:
        base_model: name of the model that the suite is about: published figures on it are not "not run here" if it ran.
        label: what it is called in the table.
        summary: of the experiment's sweep; None: the model could not be had.
    """
    known = published_figures()
    figures = [one for one in known.figures if experiment in one.experiments]
    statements = [one for one in known.statements if experiment in one.experiments]
    unread = [one for one in known.unread if experiment in one.experiments]
    if not (figures or statements or unread):
        return None
    titles = {name: source.short for name, source in known.sources.items()}
    links = [
        f"{source.title}, {source.url}"
        for name, source in known.sources.items()
        if any(one.source == name for one in (*figures, *statements, *unread))
    ]
    notes = [f"Sources: {'; '.join(links)}."]
    if figures:
        head, rows = _by_size(figures, titles, base_model, label, summary)
        told = [f"{one.what}: {one.value} ({titles[one.source]}, {one.place})" for one in statements]
        told += [f"{one.what}: shown as a figure, without numbers ({titles[one.source]})" for one in unread]
        notes += ["Also published: " + "; ".join(told) + "."] if told else []
    else:
        head, rows = _by_statement(statements, unread, titles, base_model, label, summary)
    return PublishedTable(head, tuple(rows), " ".join(notes))


def _by_size(
    figures: list[_Figure],
    titles: Mapping[str, str],
    base_model: str,
    label: str,
    summary: Mapping[str, Any] | None,
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Published rows, then ours, with a column for each size that we have or most figures have."""
    ours = list(_ours_by_size(summary, {one.ours for one in figures})) if summary else []
    counts = Counter(size for one in figures for size in one.values["@1"])
    # Sizes that few figures have would make the table too wide to read.
    order = sorted(
        {size for size, count in counts.items() if 2 * count > len(figures)} | {size for one in ours for size in one[3]}
    )
    head = ("What", "Model", "Facts of", "Metric", *(f"{size:,}" for size in order), OTHER_SIZES, "Source", "Here")
    rows = []
    for one in figures:
        for metric, values in one.values.items():
            source = f"{titles[one.source]}, {one.place}"
            here = _here(one.model, base_model, summary)
            rows.append((one.system, _model(one.model), one.data, metric, *_cells(values, order), source, here))
    for what, data, measured, shares in ours:
        values = {size: 100 * share for size, share in shares.items()}
        rows.append((what, label, data, measured, *_cells(values, order), "this run", "run here"))
    if not summary:
        rows.append(("ours", label, NONE, NONE, *_cells({}, order), NONE, NOT_RUN))
    return head, rows


def _cells(values: Mapping[int, float], order: Sequence[int]) -> list[str]:
    """The values at the sizes that have a column, then the others in one cell."""
    others = [f"{size:,}: {_percent(value)}" for size, value in values.items() if size not in order]
    return [*(_percent(values.get(size)) for size in order), ", ".join(others) or NONE]


def _by_statement(
    statements: list[_Statement],
    unread: list[_Unread],
    titles: Mapping[str, str],
    base_model: str,
    label: str,
    summary: Mapping[str, Any] | None,
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("What", "Model", "Published", "Source", "Here", f"Ours, on {label}")
    rows: list[tuple[str, ...]] = []
    for one in statements:
        here = _here(one.model, base_model, summary)
        source = f"{titles[one.source]}, {one.place}"
        rows.append((one.what, _model(one.model), one.value, source, here, _ours_stated(one.ours, summary)))
    for told in unread:
        text = "shown as a figure, without numbers"
        # The paper has one model.
        here = _here("meta-llama/Meta-Llama-3-8B-Instruct", base_model, summary)
        ours = "see the results above" if summary else NOT_RUN
        rows.append((told.what, "Meta-Llama-3-8B-Instruct", text, titles[told.source], here, ours))
    return head, rows


def _here(model: str, base_model: str, summary: Mapping[str, Any] | None) -> str:
    if model == "none":
        return NONE if summary else NOT_RUN
    return "run here" if summary and model == base_model else NOT_RUN


def _ours_by_size(summary: Mapping[str, Any], kinds: set[Ours]) -> Iterator[tuple[str, str, str, dict[int, float]]]:
    """What, facts of, metric, and the share of plain questions (else of all) by number of facts."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for unit in summary["units"]:
        if unit["part"] != "questions":
            continue
        for result in unit["size"]["results"]:
            name, retrieval = _name(unit, result), result.get("retrieval")
            is_wanted = "attention" in kinds if result["system"] == "attention" else result["system"] in kinds
            if not is_wanted or not retrieval or result["grounding"] is not None:
                continue
            group = retrieval.get("simple", retrieval["all"])
            for metric in ("@1", "@5"):
                if (value := group.get(metric, {}).get("value")) is not None:
                    found.setdefault((name, unit["source"], metric), {})[unit["size"]["num_facts"]] = value
    for (name, source, metric), values in found.items():
        yield name, source, metric, values


def _name(unit: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if result["system"] == "bm25":
        return "BM25"
    prior = "with prior" if result["prior"] else "alone"
    chosen = "" if unit["selection"] == "all" else f", {unit['selection']}"
    scale = "" if unit.get("kb_scale") is None else f", C = {unit['kb_scale']:g}"
    return f"{unit['candidate']}: attention {prior}{chosen}{scale}"


def _ours_stated(wanted: Ours, summary: Mapping[str, Any] | None) -> str:
    """What a cost unit says to a statement of the papers."""
    if not summary:
        return NOT_RUN
    points = [point for unit in summary["units"] if unit["part"] == "cost" for point in unit["cost"].get("points", ())]
    attended = [point for point in points if point["way"] == "attention" and point["selection"] == "all"]
    if wanted == "none" or not points:
        return NONE
    if wanted == "context":
        missing = [point["num_facts"] for point in points if point["way"] == "in_context" and not point["fits"]]
        return f"context full at {min(missing):,} facts" if missing else "all sizes fit the context"
    if not attended:
        return NONE
    last = max(attended, key=lambda point: point["num_facts"])
    if wanted == "largest":
        return f"{last['num_facts']:,} measured"
    return f"{last['knowledge_bytes'] / 2**20:,.1f} MiB of knowledge at {last['num_facts']:,} facts"


def _model(name: str) -> str:
    return NONE if name == "none" else name.rpartition("/")[2]


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"
