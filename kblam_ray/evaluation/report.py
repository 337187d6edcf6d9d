"""An evaluation's summary as Markdown tables, for BENCHMARKS.md and an adapter's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figure = Mapping[str, Any] | None

_NAMES = {"attention": "attention", "cosine": "cosine of question and key", "dense": "dense facts in context"}


def markdown(summary: Mapping[str, Any], *, kinds: Sequence[str] | None = None) -> str:
    """Tables of retrieval, of answers and of refusal, a row per size and way of answering.

    Args:
        summary: of `Evaluation.summary()`, or read from `summary.json`.
        kinds: groups to show, a column each; None: `all`, then each kind that was asked.

    Returns:
        Text that ends with a line break; percentages with their 95 % confidence interval behind them.
    """
    sizes = summary["sizes"]
    groups = list(kinds) if kinds is not None else _groups(sizes)
    parts = [_questions(sizes)]
    for k in ("@1", "@5"):
        title = f"Retrieval {k}: all wanted facts within the first {k[1:]} (two wanted: within 2 at least), %"
        parts.append(_table(title, sizes, "retrieval", k, groups))
    parts.append(_table("Exact match: the wanted values and no others, %", sizes, "answers", "exact_match", groups))
    parts.append(_table("F1 of the stated words, %", sizes, "answers", "f1", groups))
    parts.append(_table("Citations: all wanted facts are cited, %", sizes, "citations", "recall", groups))
    parts.append(_refusal(sizes))
    notes = [f"- {note}" for note in summary.get("notes", [])]
    notes += [
        f"- at {size['num_facts']:,} facts, {what}: {why}" for size in sizes for what, why in size["left_out"].items()
    ]
    parts.append("\n".join(notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _groups(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    groups = dict.fromkeys(["all"])
    for size in sizes:
        groups |= dict.fromkeys(kind for kind in size["num_questions"] if kind != "unanswerable")
    # Of one kind, that kind is all.
    return list(groups) if len(groups) > 2 else ["all"]


def _questions(sizes: Sequence[Mapping[str, Any]]) -> str:
    kinds = list(dict.fromkeys(kind for size in sizes for kind in size["num_questions"]))
    rows = [
        [f"{size['num_facts']:,}", f"{size['num_entities']:,}", f"{size['num_facts_asked']:,}"]
        + [f"{size['num_questions'].get(kind, 0):,}" for kind in kinds]
        for size in sizes
    ]
    return _grid("Questions", ["facts", "entities", "facts asked for", *map(_words, kinds)], rows)


def _table(title: str, sizes: Sequence[Mapping[str, Any]], part: str, figure: str, groups: Sequence[str]) -> str:
    rows = [
        [f"{size['num_facts']:,}", _name(found)]
        + [_percent(found[part].get(group, {}).get(figure)) for group in groups]
        for size in sizes
        for found in size["results"]
        if part in found and any(figure in figures for figures in found[part].values())
    ]
    return _grid(title, ["facts", "", *map(_words, groups)], rows)


def _refusal(sizes: Sequence[Mapping[str, Any]]) -> str:
    figures = ("precision", "recall", "f1", "area_under_curve")
    rows = [
        [f"{size['num_facts']:,}", _name(found)] + [_percent(found["refusal"]["all"].get(figure)) for figure in figures]
        for size in sizes
        for found in size["results"]
        if "refusal" in found
    ]
    return _grid(
        "Refusal of what no fact answers, %", ["facts", "", "precision", "recall", "F1", "area under the curve"], rows
    )


def _name(found: Mapping[str, Any]) -> str:
    name = _NAMES.get(found["system"], found["system"])
    if found["prior"] is not None:
        name += " with prior" if found["prior"] else " alone"
    return f"{name}, {found['grounding']}" if found["grounding"] else name


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(figure: Figure) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def _grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
