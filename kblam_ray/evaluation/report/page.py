"""The report as one page of HTML: its own style, script, pictures and data inside, nothing to be fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from kblam_ray.errors import MissingDependencyError
from kblam_ray.evaluation.report.browser import Browser, browser_of
from kblam_ray.evaluation.report.chart import BarPanel, Chart, HeatPanel, LinePanel
from kblam_ray.evaluation.report.headline import Tile, tiles_of
from kblam_ray.evaluation.report.naming import GROUNDINGS, INKS, WAYS, environment_words, number
from kblam_ray.evaluation.report.plots import legend_svg, panel_svg
from kblam_ray.evaluation.report.tables import Table, sweep_groups

if TYPE_CHECKING:
    from kblam_ray.evaluation.report.make import Prepared

QUESTIONS = 240
"""Questions to leaf through in a report; at least `QUESTIONS_PER_SECTION` in each section."""

QUESTIONS_PER_SECTION = 48

_PLAIN_QUESTIONS = 12

_LIGHT = {
    "ground": "#f6f7f8", "surface": "#ffffff", "sunken": "#eef1f3", "ink": "#1b2024", "soft": "#5c6670",
    "rule": "#dde2e6", "edge": "#8a949d", "link": "#0b62a4", "good": "#0a7a4b", "bad": "#b3261e", "on-shade": "#ffffff",
}  # fmt: skip
_DARK = {
    "ground": "#101417", "surface": "#181d21", "sunken": "#20272c", "ink": "#e8ecef", "soft": "#a0abb4",
    "rule": "#2e363c", "edge": "#69757e", "link": "#6db4ff", "good": "#4fd093", "bad": "#ff8a80", "on-shade": "#0b1319",
}  # fmt: skip


def page(title: str, prepared: Sequence[Prepared], *, about: str = "") -> str:
    """The page of `make_report`.

    Whatever comes from facts, answers, names or settings is escaped, in the text and in the data of the script; the
    page allows no script but its own.

    Raises:
        MissingDependencyError: matplotlib or Jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"a report needs the package {error.name}", help='pip install "kblam-ray[evaluate]"'
        ) from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = _file("page.js")
    sections = [_section(one, prepared, Markup) for one in prepared]
    return environment.from_string(_file("page.html")).render(
        title=title,
        about=_paragraphs(about),
        facts=[line for line in (_extent(prepared), _when(prepared)) if line],
        style=Markup(_style()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tiles=_headline(prepared),
        ways=_ways(sections, Markup),
        groundings=list(GROUNDINGS.items()),
        # Of many sections the contents name each, of one its parts.
        contents=sections[0]["links"] if len(sections) == 1 else sections,
        sections=sections,
        runs=_runs(prepared),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    def block(own: Mapping[str, str], inks: Iterable[tuple[str, str]]) -> str:
        return "".join(f"--{name}:{color};" for name, color in [*own.items(), *inks])

    light = block(_LIGHT, ((f"ink-{role}", ink.light) for role, ink in INKS.items()))
    dark = block(_DARK, ((f"ink-{role}", ink.dark) for role, ink in INKS.items()))
    fonts = (
        '--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;'
        '--mono:ui-monospace,"SFMono-Regular",Menlo,"DejaVu Sans Mono",monospace;'
    )
    # Paper is light, whatever the screen is.
    return f":root{{{fonts}{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n" + _file(
        "page.css"
    )


def _section(one: Prepared, prepared: Sequence[Prepared], Markup: Any) -> dict[str, Any]:
    section = one.section
    is_alone = len(prepared) == 1
    charts = [
        (chart.is_detail or (chart.is_split and not is_alone), _chart(one, chart, Markup)) for chart in one.charts
    ]
    num_questions = max(QUESTIONS_PER_SECTION, QUESTIONS // len(prepared))
    browser = browser_of(section.rows, num_questions)
    groups = sweep_groups(section.summary)
    shown = [drawn for is_detail, drawn in charts if not is_detail]
    links = [{"id": drawn["id"], "title": drawn["title"]} for drawn in shown]
    if section.published is not None:
        links.append({"id": f"{one.slug}-published", "title": "Beside published figures"})
    if groups:
        links.append({"id": f"{one.slug}-tables", "title": "All figures as tables"})
    if browser.questions:
        links.append({"id": f"{one.slug}-questions", "title": "Questions and answers"})
    return {
        "id": one.slug,
        "title": section.title,
        "about": _paragraphs(section.about),
        "tiles": [] if is_alone else tiles_of(section.summary),
        "has_results": bool(section.summary.get("units")),
        "charts": shown,
        "details": [drawn for is_detail, drawn in charts if is_detail],
        "links": links,
        "published": section.published,
        "groups": groups,
        "browser": _browser(browser, Markup) if browser.questions else None,
    }


def _chart(one: Prepared, chart: Chart, Markup: Any) -> dict[str, Any]:
    shapes: dict[type, str] = {LinePanel: "lines", BarPanel: "bars", HeatPanel: "heat"}
    # One, two and four stand larger than three, five and more.
    shape = shapes[type(chart.panels[0])] + {1: " one", 2: " two", 4: " two"}.get(len(chart.panels), "")
    panels = [
        {"title": panel.title, "svg": Markup(panel_svg(panel, f"{one.slug}-{chart.name}-{place}"))}
        for place, panel in enumerate(chart.panels)
    ]
    legend = [(one.name, Markup(legend_svg(one.role, one.line, has_marker=one.has_markers))) for one in chart.legend]
    return {
        "id": f"chart-{chart.name}",
        "title": chart.title,
        "about": chart.about,
        "legend": legend,
        "panels": panels,
        "shape": shape,
    }


def _browser(browser: Browser, Markup: Any) -> dict[str, Any]:
    first = "0"
    plain = []
    step = max(1, len(browser.questions) // _PLAIN_QUESTIONS)
    for question in browser.questions[::step][:_PLAIN_QUESTIONS]:
        answer = question["answers"].get(first, {})
        verdict = {True: "right", False: "wrong", None: ""}[answer.get("is_right")]
        said = answer.get("text")
        if said is None and answer.get("place") is not None:
            said = f"ranks the fact number {number(answer['place'])}"
        wanted = "a refusal" if question["should_answer"] is False else "; ".join(question["wanted"])
        plain.append((question["kind"], question["question"], wanted, said or "", verdict))
    return {
        "num_shown": number(len(browser.questions)),
        "num_asked": number(browser.num_asked),
        "system": browser.systems[0]["name"],
        "plain": plain,
        "json": Markup(_script_json(browser.to_json())),
    }


def _script_json(content: Any) -> str:
    """JSON that cannot end the element that it stands in, whatever its texts are."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _headline(prepared: Sequence[Prepared]) -> list[Tile]:
    """Each tile from the first section that has one of its title."""
    found: dict[str, Tile] = {}
    for one in prepared:
        for tile in tiles_of(one.section.summary):
            found.setdefault(tile.title, tile)
    return list(found.values())


def _ways(sections: Sequence[Mapping[str, Any]], Markup: Any) -> list[tuple[str, str, Any]]:
    if not any(section["charts"] for section in sections):
        return []
    return [(name, about, Markup(legend_svg(role))) for role, name, about in WAYS]


def _extent(prepared: Sequence[Prepared]) -> str:
    """How much was asked, of what."""
    sizes: list[int] = []
    sources: dict[str, None] = {}
    adapters: dict[str, None] = {}
    for one in prepared:
        summary = one.section.summary
        sizes += [unit["size"]["num_facts"] for unit in summary.get("units", ()) if unit["part"] == "questions"]
        sources |= dict.fromkeys(unit["source"] for unit in summary.get("units", ()) if unit.get("source"))
        adapters |= dict.fromkeys(summary.get("candidates", {}))
    num_rows = sum(len(one.section.rows) for one in prepared)
    ends = dict.fromkeys(number(size) for size in (min(sizes), max(sizes))) if sizes else {}
    parts = [
        _counted(len(prepared), "experiment") if len(prepared) > 1 else "",
        f"{_counted(len(sources), 'knowledge base')}: {', '.join(sources)}" if sources else "",
        f"{_counted(len(adapters), 'adapter')}: {', '.join(adapters)}" if len(adapters) > 1 else "",
        f"{' to '.join(ends)} facts" if ends else "",
        f"{_counted(num_rows, 'row')} of question and answer" if num_rows else "",
    ]
    return " · ".join(part for part in parts if part)


def _counted(count: int, name: str) -> str:
    return f"{number(count)} {name}{'s' * (count != 1)}"


def _when(prepared: Sequence[Prepared]) -> str:
    """What of the machine and the code stands at the top: the first section's."""
    if not prepared:
        return ""
    summary = prepared[0].section.summary
    environment = summary.get("environment", {})
    changed = " with changes" if environment.get("is_changed") else ""
    parts = [
        f"base model {summary['base_model']}" if summary.get("base_model") else "",
        f"commit {environment['commit'][:12]}{changed}" if environment.get("commit") else "",
        environment.get("machine") or "",
    ]
    return " · ".join(part for part in parts if part)


def _runs(prepared: Sequence[Prepared]) -> list[dict[str, Any]]:
    """How each section was measured; what is the same for several is said once."""
    found: dict[str, dict[str, Any]] = {}
    for one in prepared:
        summary = one.section.summary
        environment = summary.get("environment", {})
        facts = [("base model", summary["base_model"])] if summary.get("base_model") else []
        facts += environment_words(environment)
        settings = summary.get("settings") or {}
        run = {
            "title": one.section.title if len(prepared) > 1 else "",
            "command": environment.get("command", ""),
            "facts": facts,
            "tables": [table for table in (_candidates(summary), _sources(summary)) if table.rows],
            "notes": list(summary.get("notes", ())),
            "settings": yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True) if settings else "",
        }
        same = json.dumps({**run, "title": ""}, default=vars)
        if same in found:
            found[same]["title"] += f"; {run['title']}"
        else:
            found[same] = run
    return list(found.values())


def _candidates(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, known in summary.get("candidates", {}).items():
        encoder = known.get("encoder") or {}
        layers = ", ".join(map(str, known.get("kb_layers") or ()))
        of = f" of {known['num_layers']}" if known.get("num_layers") else ""
        cells = (known.get("kind"), encoder.get("name"), f"{layers}{of}", known.get("kb_scale"))
        rest = (known.get("question_prior"), known.get("refusal_threshold"), known.get("adapter"))
        rows.append((name, *("-" if cell is None else _text(cell) for cell in (*cells, *rest))))
    head = ("adapter", "kind", "encoder", "KB layers", "C", "question prior", "refusal threshold", "from")
    return Table("Adapters", head, tuple(rows))


def _sources(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, tables in summary.get("sources", {}).items():
        for table in tables:
            encoder = table.get("encoder")
            named = encoder.get("name", "") if isinstance(encoder, Mapping) else encoder or ""
            num_facts = "-" if table.get("num_facts") is None else number(table["num_facts"])
            rows.append((name, num_facts, _text(table.get("version")), str(named), str(table.get("uri", ""))))
    return Table("Knowledge bases", ("", "facts", "version", "encoder", "table"), tuple(rows))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]
