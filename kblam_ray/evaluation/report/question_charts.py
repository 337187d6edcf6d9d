"""Charts of what questions found: retrieval, answers and refusals over facts, kinds and whatever else varies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kblam_ray.evaluation.report.chart import Bar, BarPanel, Chart, HeatPanel, LinePanel, Point, Series
from kblam_ray.evaluation.report.naming import LINE_OF, number, role_of, short_name, words
from kblam_ray.evaluation.report.sweeps import Context, Sweep, figure_of, kinds_of, results_of

Size = Mapping[str, Any]

FACTS = "facts in the knowledge base"

_SHARE = "% of questions"


@dataclass(frozen=True)
class Metric:
    """A figure worth a chart.

    Attributes:
        name: in files.
        part, figure: where a result has it.
        title: of a chart of it; `short` of a panel beside other metrics.
        about: how it is read.
    """

    name: str
    part: str
    figure: str
    title: str
    short: str
    about: str
    unit: str = _SHARE


RETRIEVAL = (
    Metric("first", "retrieval", "@1", "Right fact first", "first",
           "How often the fact asked for ranks first among all facts."),
    Metric("first-five", "retrieval", "@5", "Right fact among the first five", "among the first five",
           "How often the fact asked for is among the five that rank first."),
)  # fmt: skip
ANSWERS = (
    Metric("exact", "answers", "exact_match", "Answer exactly right", "exactly right",
           "How often the answer states the value letter for letter, and no other."),
    Metric("f1", "answers", "f1", "Words of the answer (F1)", "words, F1",
           "Words of the answer against those of the value, without the question's own.", "F1, %"),
    Metric("rouge-l", "answers", "rouge_l", "ROUGE-L of the answer", "ROUGE-L",
           "The longest run of words, gaps allowed, that the answer shares with what it shall say.", "ROUGE-L, %"),
    Metric("bert-score", "answers", "bert_score", "BERTScore of the answer", "BERTScore",
           "How near the answer's words are to the value's in meaning, by a language model.", "BERTScore, %"),
)  # fmt: skip
REFUSAL = (
    Metric("refusal", "refusal", "f1", "Refusing what no fact answers", "F1",
           "All that should be refused, and nothing else, is 100.", "F1, %"),
    Metric("refusal-precision", "refusal", "precision", "Refusals that were right", "precision",
           "Of what was refused, the share that no fact answers.", "precision, %"),
    Metric("refusal-recall", "refusal", "recall", "Unanswerable questions refused", "recall",
           "Of what no fact answers, the share that was refused.", "recall, %"),
)  # fmt: skip

_FAMILIES = (
    ("retrieval", "Does it find the right fact?", RETRIEVAL),
    ("answers", "Is the answer right?", ANSWERS),
    ("refusal", "Does it say when it does not know?", REFUSAL),
)
"""What one chart shows where there is only one context: a panel for each metric."""

_ALONE = (*RETRIEVAL, *ANSWERS, REFUSAL[0])
"""What gets a chart of its own where there are several contexts: a panel for each context."""

_MAIN = (RETRIEVAL[0], ANSWERS[0], REFUSAL[0])

_BY_KIND = (RETRIEVAL[0], ANSWERS[0])


def question_charts(sweep: Sweep) -> list[Chart]:
    """Lines where the number of facts varies, bars where anything else does, and both by kind of question."""
    if not sweep.questions:
        return []
    grown = [context for context, sizes in sweep.contexts.items() if len(sizes) > 1]
    found: list[Chart | None] = []
    if len(grown) == 1:
        found += [_family_over_facts(sweep, grown[0], *family) for family in _FAMILIES]
    elif grown:
        found += [_metric_over_facts(sweep, grown, metric) for metric in _ALONE]
    found += [_over_scale(sweep, metric) for metric in _BY_KIND]
    if len(sweep.contexts) > 1:
        # Where lines have shown all that varies, bars are for those who want to compare.
        is_detail = bool(grown) and sweep.varying(sweep.questions) == ("source",)
        found += [
            _compared(sweep, metric, is_detail=is_detail or (bool(grown) and metric not in _MAIN)) for metric in _ALONE
        ]
    elif not grown:
        found += [_family_as_bars(sweep, *family) for family in _FAMILIES]
    found += [_by_kind(sweep, context, metric, is_detail=len(grown) > 1) for context in grown for metric in _BY_KIND]
    found += [_heat(sweep, metric) for metric in _BY_KIND]
    return [chart for chart in found if chart is not None]


def _family_over_facts(
    sweep: Sweep, context: Context, name: str, title: str, metrics: Sequence[Metric]
) -> Chart | None:
    sizes = sweep.contexts[context]
    panels = [_lines(metric.short, _by_facts(sizes), metric) for metric in metrics]
    shown = [(panel, metric) for panel, metric in zip(panels, metrics, strict=True) if panel.series]
    if not shown:
        return None
    about = " ".join(f"{metric.short[:1].upper()}{metric.short[1:]}: {_lower(metric.about)}" for _, metric in shown)
    return Chart(f"{name}-over-facts", title, f"{about} Bands: 95 % intervals.", tuple(panel for panel, _ in shown))


def _metric_over_facts(sweep: Sweep, contexts: Sequence[Context], metric: Metric) -> Chart | None:
    panels = (_lines(sweep.label(context), _by_facts(sweep.contexts[context]), metric) for context in contexts)
    shown = tuple(panel for panel in panels if panel.series)
    if not shown:
        return None
    return Chart(f"{metric.name}-over-facts", metric.title, f"{metric.about} Bands: 95 % intervals.", shown)


def _by_kind(sweep: Sweep, context: Context, metric: Metric, *, is_detail: bool) -> Chart | None:
    sizes = sweep.contexts[context]
    kinds = list(dict.fromkeys(kind for size in sizes for kind in kinds_of(size)))
    panels = (_lines(words(kind), _by_facts(sizes), metric, kind) for kind in kinds)
    shown = tuple(panel for panel in panels if panel.series)
    if len(shown) < 2:
        return None
    label = sweep.label(context)
    number_of = list(sweep.contexts).index(context) + 1
    name = f"{metric.name}-by-kind" + (f"-{number_of}" if label else "")
    title = f"{metric.title}, by kind of question" + (f": {label}" if label else "")
    return Chart(name, title, f"{metric.about} Bands: 95 % intervals.", shown, is_detail, is_split=True)


def _over_scale(sweep: Sweep, metric: Metric) -> Chart | None:
    """Lines over C, where at least three of it were tried."""
    rest: dict[Context, list[tuple[float, Size]]] = {}
    for context, size in sweep.largest().items():
        if context.kb_scale is not None:
            rest.setdefault(replace(context, kb_scale=None), []).append((context.kb_scale, size))
    tried = {context: sorted(scales, key=lambda one: one[0]) for context, scales in rest.items() if len(scales) > 2}
    panels = (
        _lines(
            ", ".join(filter(None, [sweep.label(context, without=("kb_scale",)), _at_facts(scales[0][1])])),
            scales,
            metric,
            x_label="C of the shift log C - log M",
        )
        for context, scales in tried.items()
    )
    shown = tuple(panel for panel in panels if panel.series)
    if not shown:
        return None
    return Chart(f"{metric.name}-over-scale", f"{metric.title}, by C", f"{metric.about} Bands: 95 % intervals.", shown)


def _at_facts(size: Size) -> str:
    return f"{number(size['num_facts'])} facts"


def _by_facts(sizes: Sequence[Size]) -> list[tuple[float, Size]]:
    return [(size["num_facts"], size) for size in sizes]


def _lines(
    title: str, sizes: Sequence[tuple[float, Size]], metric: Metric, group: str = "all", x_label: str = FACTS
) -> LinePanel:
    """Lines over whatever number stands before each size."""
    lines: dict[tuple[str, str, str], list[Point]] = {}
    for x, size in sizes:
        for result in _shown(size, metric):
            figure = figure_of(result, metric.part, metric.figure, group)
            if figure is None:
                continue
            name = short_name(result, metric.part)
            key = (name, role_of(result["system"], result["prior"]), LINE_OF.get(result["grounding"], "solid"))
            at = f"{number(size['num_facts'])} facts" if x_label == FACTS else f"C = {x:g}"
            lines.setdefault(key, []).append(Point(x, *_hundredfold(figure), f"{name}, {at}: {_figure_text(figure)}"))
    series = tuple(
        Series(name, role, line, tuple(lines[name, role, line]))  # type: ignore[arg-type]
        for name, role, line in lines
    )
    return LinePanel(title, x_label, metric.unit, series, log_x=True, y_range=(0.0, 100.0))


def _shown(size: Size, metric: Metric) -> Iterator[Mapping[str, Any]]:
    """The results of a metric: of refusals not the score's alone where answers refuse, too."""
    results = [result for result in results_of(size) if metric.part in result]
    answered = {(result["system"], result["prior"]) for result in results if result["grounding"]}
    for result in results:
        is_score_alone = result["grounding"] is None and (result["system"], result["prior"]) in answered
        if metric.part != "refusal" or not is_score_alone:
            yield result


def _family_as_bars(sweep: Sweep, name: str, title: str, metrics: Sequence[Metric]) -> Chart | None:
    (size,) = sweep.largest().values()
    panels = []
    for metric in metrics:
        bars = _bars(size, metric)
        if bars:
            panels.append(BarPanel(metric.short, metric.unit, (("", bars),)))
    if not panels:
        return None
    about = f"At {number(size['num_facts'])} facts. Thin lines: 95 % intervals."
    return Chart(f"{name}-bars", title, about, tuple(panels))


def _compared(sweep: Sweep, metric: Metric, *, is_detail: bool) -> Chart | None:
    """Bars of every context; with several sources and something else that varies, a panel for each source."""
    largest = sweep.largest()
    varying = sweep.varying(sweep.questions)
    is_split = "source" in varying and len(varying) > 1
    panels: dict[str, list[tuple[str, tuple[Bar, ...]]]] = {}
    for context, size in largest.items():
        bars = _bars(size, metric)
        if bars:
            label = sweep.label(context, without=("source",) if is_split else ())
            is_same = len({size["num_facts"] for size in largest.values()}) == 1
            group = label if is_same else f"{label}, {number(size['num_facts'])} facts"
            panels.setdefault(context.word("source") if is_split else "", []).append((group, bars))
    if not panels:
        return None
    sizes = {size["num_facts"] for size in largest.values()}
    at = f"At {number(sizes.pop())} facts. " if len(sizes) == 1 else ""
    by = " and ".join(_VARYING[name] for name in varying)
    return Chart(
        f"{metric.name}-compared",
        f"{metric.title}, by {by}",
        f"{metric.about} {at}Thin lines: 95 % intervals.",
        tuple(BarPanel(title, metric.unit, tuple(groups)) for title, groups in panels.items()),
        is_detail,
    )


_VARYING = {
    "source": "knowledge base",
    "candidate": "adapter",
    "entities": "entities",
    "selection": "selection",
    "kb_scale": "C",
}


def _bars(size: Size, metric: Metric) -> tuple[Bar, ...]:
    bars = []
    for result in _shown(size, metric):
        figure = figure_of(result, metric.part, metric.figure)
        if figure is not None:
            name = short_name(result, metric.part)
            line = LINE_OF.get(result["grounding"], "solid")
            role = role_of(result["system"], result["prior"])
            bars.append(Bar(name, role, line, *_hundredfold(figure), tip=f"{name}: {_figure_text(figure)}"))  # type: ignore[arg-type]
    return tuple(bars)


def _heat(sweep: Sweep, metric: Metric) -> Chart | None:
    panels = []
    sizes = sweep.largest()
    for context, size in sizes.items():
        kinds = kinds_of(size)
        results = [result for result in _shown(size, metric) if figure_of(result, metric.part, metric.figure)]
        if len(kinds) < 2 or not results:
            continue
        found = [[figure_of(result, metric.part, metric.figure, kind) for kind in kinds] for result in results]
        label = ", ".join(filter(None, [sweep.label(context), _at_facts(size)]))
        panels.append(
            HeatPanel(
                label,
                tuple(short_name(result, metric.part) for result in results),
                tuple(map(words, kinds)),
                tuple(tuple(None if one is None else 100 * one["value"] for one in row) for row in found),
                tuple(role_of(result["system"], result["prior"]) for result in results),
            )
        )
    if not panels:
        return None
    title = f"{metric.title}: which questions are hard?"
    return Chart(f"{metric.name}-heat", title, f"{metric.about} In percent; darker is better.", tuple(panels))


def _hundredfold(figure: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    low, high = figure.get("low"), figure.get("high")
    return 100 * figure["value"], None if low is None else 100 * low, None if high is None else 100 * high


def _figure_text(figure: Mapping[str, Any]) -> str:
    value, low, high = _hundredfold(figure)
    ends = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
    return f"{value:.1f} %{ends}, {number(figure.get('count') or 0)} questions"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
