"""The attention benchmark's numbers as a table on stderr while it runs, and as JSON, CSV and a plot in a folder."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kblam_ray.attention.benchmark.cases import Skipped
from kblam_ray.errors import MissingDependencyError, StorageError

_ROW = "{:>9}  {:<6}  {:<12}  {:>10}  {:>9}  {:>11}  {:>7}  {:>10}  {:>7}  {}"
_LINE = {"latent": "-", "materialized": "--", "published": ":"}
_COLOUR = {"paper": "tab:blue", "shared": "tab:orange"}


def print_header(summary: dict[str, Any]) -> None:
    settings = summary["settings"]
    _print(
        f"{summary['shape']}, {summary['parameters'] / 1e6:,.0f} million random parameters, {settings['dtype']}, "
        f"{summary['device_name']}, {summary['threads']} threads, "
        f"{summary['kb_layers']} KB layers, P = {settings['dim']}"
    )
    _print(f"prefill of {settings['prompt_tokens']} tokens, one decode step; x: times without facts")
    _print("auto: " + "; ".join(f"{kind}: {rule}" for kind, rule in summary["auto"].items()))
    _print(_ROW.format("facts", "kind", "form", "MB", "ready s", "prefill ms", "x", "decode ms", "x", ""))


def print_case(row: dict[str, Any]) -> None:
    _print(
        _ROW.format(
            f"{row['num_facts']:,}",
            row["kind"],
            row["form"],
            f"{row['nbytes'] / 1e6:,.2f}",
            f"{row['ready_s']:.4f}",
            f"{row['prefill_ms']:,.1f}",
            f"{row['prefill_ratio']:.2f}",
            f"{row['decode_ms']:,.2f}",
            f"{row['decode_ratio']:.2f}",
            "auto" if row["is_auto"] else "",
        )
    )


def print_skipped(item: Skipped) -> None:
    _print(f"skipped: {item.case}: {item.reason}")


def print_note(name: str, numbers: dict[str, Any]) -> None:
    _print(f"{name}: {json.dumps(numbers)}")


def writer(output: str | None) -> Callable[[dict[str, Any]], list[str]]:
    """A function that writes a summary's files and returns their paths; without a folder it writes none.

    Raises:
        MissingDependencyError: matplotlib is not installed. Said now, before anything is measured.
        StorageError: the folder cannot be made.
    """
    if output is None:
        return lambda summary: []
    try:
        import matplotlib  # noqa: F401 - looked for before an hour of work
    except ImportError:
        raise MissingDependencyError(
            "matplotlib is not installed", where="--output", help="pip install 'kblam-ray[plot]'"
        ) from None
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder: {error.strerror}", where=output, help="give another") from None
    return lambda summary: _write(folder, summary)


def _write(folder: Path, summary: dict[str, Any]) -> list[str]:
    as_json, as_csv, as_plot = (folder / f"attention.{ending}" for ending in ("json", "csv", "png"))
    try:
        as_json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        _write_csv(as_csv, summary["cases"])
        plot(as_plot, summary)
    except OSError as error:
        raise StorageError(
            f"cannot write the results: {error.strerror}", where=str(folder), help="give another folder as --output"
        ) from None
    return [str(as_json), str(as_csv), str(as_plot)]


def _write_csv(path: Path, cases: list[dict[str, Any]]) -> None:
    rows = []
    for case in cases:
        row = {name: value for name, value in case.items() if name != "published_over_ours"}
        rows.append(row | {f"published_over_ours_{name}": x for name, x in case.get("published_over_ours", {}).items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def plot(path: Path, summary: dict[str, Any]) -> None:
    """Prefill, decode and memory against the number of facts, both axes logarithmic, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    settings = summary["settings"]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    figure.suptitle(
        f"{summary['shape']}, {settings['dtype']}, {summary['device_name']}, "
        f"P = {settings['dim']}, {summary['kb_layers']} KB layers"
    )
    panels = (
        ("prefill_ratio", f"prefill of {settings['prompt_tokens']} tokens, times no KB", 1.0),
        ("decode_ratio", "one decode step, times no KB", 1.0),
        ("nbytes", "memory of the facts, MB", 1e6),
    )
    ways = list(dict.fromkeys((row["kind"], row["form"]) for row in summary["cases"]))
    for axes, (column, label, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for kind, form in ways:
            rows = [row for row in summary["cases"] if (row["kind"], row["form"]) == (kind, form)]
            colour = "tab:gray" if form == "published" else _COLOUR[kind]
            name = "published computation" if form == "published" else f"{kind}, {form}"
            numbers = [row["num_facts"] for row in rows], [row[column] / unit for row in rows]
            axes.plot(*numbers, color=colour, linestyle=_LINE[form], marker="o", markersize=3, label=name)
        if column != "nbytes":
            axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("facts")
        axes.set_title(label)
        axes.yaxis.set_major_formatter("{x:g}")
        # Labels at 2, 3 and 5 between the powers of ten do not run into each other.
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if column != "nbytes" else "")
        axes.grid(alpha=0.3)
    if ways:
        axes.legend()
    figure.savefig(path, dpi=120)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
