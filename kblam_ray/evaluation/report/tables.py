"""Summaries of evaluations and sweeps as tables: Markdown for BENCHMARKS.md and adapter cards, and cells to lay out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kblam_ray.evaluation.report.naming import number, percent, plain, size_of, table_name, words
from kblam_ray.evaluation.report.sweeps import Context, Sweep, kinds_of

_ANSWERS = (
    ("exact_match", "Exact match: the wanted values and no others, %"),
    ("f1", "F1 of the stated words, %"),
    ("rouge_1", "ROUGE-1 of the answer, %"),
    ("rouge_2", "ROUGE-2 of the answer, %"),
    ("rouge_l", "ROUGE-L of the answer, %"),
    ("bert_score", "BERTScore of the answer, %"),
)


@dataclass(frozen=True)
class Table:
    """Cells of text under a head."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


@dataclass(frozen=True)
class Group:
    """Tables of one context, with what a reader of them has to know.

    Attributes:
        title: the settings that these tables have in common; empty where nothing varies.
    """

    title: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()

    def markdown(self, heading: str = "###") -> str:
        parts = [f"{heading} {one_line(self.title)}"] if self.title else []
        parts += [table.markdown() for table in self.tables]
        if self.notes:
            parts.append("\n".join(f"- {one_line(note)}" for note in self.notes))
        return "\n\n".join(parts)


def markdown(summary: Mapping[str, Any], *, kinds: Sequence[str] | None = None) -> str:
    """Tables of retrieval, of answers and of refusal, a row per size and way of answering.

    Args:
        summary: of `Evaluation.summary()`.
        kinds: groups to show, a column each; None: `all`, then each kind that was asked.

    Returns:
        Text that ends with a line break; percentages with their 95 % confidence interval behind them.
    """
    return _of_sizes("", summary["sizes"], summary.get("notes", ()), kinds).markdown() + "\n"


def sweep_markdown(summary: Mapping[str, Any], *, heading: str = "###") -> str:
    """The tables of a sweep, context by context, then interference and cost.

    Args:
        summary: of a sweep, as its `summary.json` has it.
        heading: the marks before a context's name.

    Returns:
        Text that ends with a line break; figures with their 95 % confidence interval behind them.
    """
    return "\n\n".join(group.markdown(heading) for group in sweep_groups(summary)) + "\n"


def sweep_groups(summary: Mapping[str, Any]) -> list[Group]:
    """The tables of a sweep."""
    sweep = Sweep(summary)
    notes: dict[Context, dict[str, None]] = {}
    for unit in sweep.questions:
        notes.setdefault(Context.of(unit), {}).update(dict.fromkeys(unit.get("notes", ())))
    groups = [
        _of_sizes(sweep.label(context), sizes, list(notes[context]), None) for context, sizes in sweep.contexts.items()
    ]
    interference = tuple(filter(_has_rows, [_interference(sweep)]))
    if interference:
        groups.append(Group("Text that needs no fact" if groups else "", interference))
    cost = tuple(filter(_has_rows, [_times(sweep), _memory(sweep)]))
    if cost:
        groups.append(Group("Time and memory" if groups else "", cost))
    if summary.get("notes"):
        groups.append(Group("", (), tuple(summary["notes"])))
    return groups


def _of_sizes(
    title: str, sizes: Sequence[Mapping[str, Any]], notes: Sequence[str], kinds: Sequence[str] | None
) -> Group:
    groups = list(kinds) if kinds is not None else _groups(sizes)
    tables = [_questions(sizes)]
    for k in ("@1", "@5"):
        name = f"Retrieval {k}: all wanted facts within the first {k[1:]} (two wanted: within 2 at least), %"
        tables.append(_by_kind(name, sizes, "retrieval", k, groups))
    tables += [_by_kind(name, sizes, "answers", figure, groups) for figure, name in _ANSWERS]
    tables.append(_by_kind("Citations: all wanted facts are cited, %", sizes, "citations", "recall", groups))
    tables += [_refusal(sizes), _calibration(sizes)]
    left_out = [
        f"at {number(size['num_facts'])} facts, {what}: {why}"
        for size in sizes
        for what, why in size["left_out"].items()
    ]
    return Group(title, tuple(filter(_has_rows, tables)), (*notes, *left_out))


def _groups(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    groups = dict.fromkeys(["all", *(kind for size in sizes for kind in kinds_of(size))])
    # Of one kind, that kind is all.
    return list(groups) if len(groups) > 2 else ["all"]


def _questions(sizes: Sequence[Mapping[str, Any]]) -> Table:
    kinds = list(dict.fromkeys(kind for size in sizes for kind in size["num_questions"]))
    rows = [
        (
            *(number(size[name]) for name in ("num_facts", "num_entities", "num_facts_asked")),
            *(number(size["num_questions"].get(kind, 0)) for kind in kinds),
        )
        for size in sizes
    ]
    return Table("Questions", ("facts", "entities", "facts asked for", *map(words, kinds)), tuple(rows))


def _by_kind(title: str, sizes: Sequence[Mapping[str, Any]], part: str, figure: str, groups: Sequence[str]) -> Table:
    rows = [
        (
            number(size["num_facts"]),
            table_name(found, part),
            *(percent(found[part].get(group, {}).get(figure)) for group in groups),
        )
        for size, found in _results(sizes)
        if part in found and any(figure in figures for figures in found[part].values())
    ]
    return Table(title, ("facts", "", *map(words, groups)), tuple(rows))


def _refusal(sizes: Sequence[Mapping[str, Any]]) -> Table:
    figures = ("precision", "recall", "f1", "area_under_curve")
    rows = [
        (
            number(size["num_facts"]),
            table_name(found),
            *(percent(found["refusal"]["all"].get(figure)) for figure in figures),
        )
        for size, found in _results(sizes)
        if "refusal" in found
    ]
    head = ("facts", "", "precision", "recall", "F1", "area under the curve")
    return Table("Refusal of what no fact answers, %", head, tuple(rows))


def _calibration(sizes: Sequence[Mapping[str, Any]]) -> Table:
    """Once for each statistic: the groundings of a system share it."""
    rows: dict[tuple[int, str, bool | None], tuple[str, ...]] = {}
    for size, found in _results(sizes):
        calibration = found.get("calibration")
        key = (size["num_facts"], found["system"], found["prior"])
        if not calibration or key in rows:
            continue
        best, stored = calibration.get("best") or {}, calibration.get("threshold")
        rows[key] = (
            number(size["num_facts"]),
            table_name({**found, "grounding": None}),
            "-" if stored is None else f"{stored:.4g}",
            "-" if best.get("threshold") is None else f"{best['threshold']:.4g}",
            "-" if best.get("f1") is None else f"{100 * best['f1']:.1f}",
            plain(calibration.get("error")),
            plain(calibration.get("brier")),
        )
    head = ("facts", "", "stored threshold", "best here", "F1 there, %", "calibration error", "Brier score")
    return Table("The refusal threshold, and whether its statistic is a probability", head, tuple(rows.values()))


def _interference(sweep: Sweep) -> Table:
    varying = sweep.varying(sweep.interference)
    rows = [
        (
            *(Context.of(unit).word(name) for name in varying),
            number(point["num_facts"]),
            "with prior" if point["prior"] else "alone",
            plain(point.get("perplexity")),
            plain(point.get("perplexity_ratio")),
            plain(point.get("divergence")),
            percent(point.get("agreement")),
            percent(point.get("kb_mass")),
            plain(point.get("answer_divergence")),
            percent(point.get("answer_agreement")),
            percent(point.get("answer_kb_mass")),
        )
        for unit in sweep.interference
        for point in unit["interference"]["points"]
    ]
    head = (
        *map(words, varying),
        *("facts", "", "perplexity", "x without facts", "divergence, nats", "same next token, %", "KB mass, %"),
        *("divergence of an answer's first token", "same first token, %", "KB mass there, %"),
    )
    return Table("Text that needs no fact, with facts attached", head, tuple(rows))


def _times(sweep: Sweep) -> Table:
    return _cost(
        sweep,
        "Time of an answer",
        ("prompt tokens", "first token, ms", "x no facts", "each further token, ms", "x no facts"),
        lambda point: (
            number(point["prompt_tokens"]),
            plain(point.get("first_token_s"), 1000),
            plain(point.get("first_token_ratio")),
            plain(point.get("per_token_s"), 1000),
            plain(point.get("per_token_ratio")),
        ),
    )


def _memory(sweep: Sweep) -> Table:
    return _cost(
        sweep,
        "Memory of the facts, and of what the prompt leaves in the key-value cache",
        ("facts in memory", "cache of the prompt", "facts ready after, s"),
        lambda point: (
            *("-" if point.get(name) is None else size_of(point[name]) for name in ("knowledge_bytes", "cache_bytes")),
            "-" if point.get("load_s") is None else plain({"value": point["load_s"]}),
        ),
    )


def _cost(sweep: Sweep, title: str, head: tuple[str, ...], cells: Any) -> Table:
    varying = sweep.varying(sweep.cost)
    rows = [
        (
            *(Context.of(unit).word(name) for name in varying),
            number(point["num_facts"]),
            way_name(point),
            *(cells(point) if point.get("fits", True) else (_does_not_fit(point), *("-",) * (len(head) - 1))),
        )
        for unit in sweep.cost
        for point in unit["cost"]["points"]
    ]
    return Table(title, (*map(words, varying), "facts", "", *head), tuple(rows))


def _does_not_fit(point: Mapping[str, Any]) -> str:
    tokens = point.get("prompt_tokens")
    return "does not fit" if not tokens else f"{number(tokens)} tokens: does not fit"


def way_name(point: Mapping[str, Any]) -> str:
    """A way of answering whose cost was measured, with its selection where it has one."""
    name = table_name({"system": point["way"], "prior": None, "grounding": None})
    selection = point.get("selection")
    if point["way"] != "attention" or selection in (None, "all"):
        return name
    return f"{name}, nearest {selection.partition(':')[2]}"


def _results(sizes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return ((size, found) for size in sizes for found in size["results"])


def _has_rows(table: Table) -> bool:
    return bool(table.rows)


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def one_line(text: str) -> str:
    """Text that stays one line, and text, in Markdown that lets HTML through."""
    return prose(" ".join(text.split()))


def prose(text: str) -> str:
    """Paragraphs of text that are no HTML in Markdown."""
    return text.strip().replace("<", "&lt;")
