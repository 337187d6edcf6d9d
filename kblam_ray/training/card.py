"""The model card of a trained adapter: data, settings, curves, evaluation, and how to make it again."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.attention.adapter.saving import model_card
from kblam_ray.evaluation.report import markdown

FILE = "README.md"
CURVES_FILE = "curves.png"
_ROWS_OF_CURVE = 12


def text(
    config: AdapterConfig,
    settings: Mapping[str, Any],
    tables: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    *,
    has_picture: bool,
) -> str:
    """The card as Markdown.

    Args:
        settings: of the job, as YAML shows them.
        tables: `uri`, `version` and `num_facts` of each.
        found: what is known of the run: `step`, `num_facts`, `seconds`, and where there were such `closed_form`,
            `calibration`, `evaluation`.
        curve: events of `reports.Curve`.
        has_picture: there is a picture of the curves beside the card.
    """
    parts = [model_card(config), _data(config, settings, tables, found), _how(settings, found)]
    if curve:
        parts.append(_curve(curve, has_picture=has_picture))
    if "closed_form" in found:
        parts.append(_fit(found["closed_form"]))
    if "calibration" in found:
        parts.append(_json("Calibration, on held-out questions", found["calibration"]))
    if "evaluation" in found:
        parts.append("## Evaluation\n\nOn questions about held-out entities.\n\n" + markdown(found["evaluation"]))
    return "\n".join(part.strip() + "\n" for part in parts)


def _data(
    config: AdapterConfig, settings: Mapping[str, Any], tables: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> str:
    rows = "\n".join(f"| `{table['uri']}` | {table['version']} | {table['num_facts']:,} |" for table in tables)
    mix = settings.get("mix", {})
    encoder = config.encoder
    named = "not recorded" if encoder is None else f"{encoder.name}, revision `{encoder.revision}`"
    return f"""## Data

| table | version | facts |
|---|---|---|
{rows}

{found.get("num_facts", 0):,} facts together, embedded by {named}. Of these, {found.get("num_facts_held_out", 0):,} are
about held-out entities (seed {mix.get("held_out_seed", 0)}) and were never trained on.
"""


def _how(settings: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{part.replace('_', ' ')} {value:,.0f} s" for part, value in found.get("seconds", {}).items())
    command = shlex.join(["python", "jobs/train_adapter.py", "--config", "settings.yaml"])
    given = shlex.join(sys.argv) if Path(sys.argv[0]).name == "train_adapter.py" else command
    return f"""## Settings

{found["step"]:,} optimizer steps. Wall time: {seconds or "not recorded"}.

```yaml
{yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).strip()}
```

Made by `{given}`; the settings above are in `settings.yaml`: `{command}` makes it again.
"""


def _curve(curve: Sequence[Mapping[str, Any]], *, has_picture: bool) -> str:
    steps = [event for event in curve if event["kind"] == "step"]
    shown = (
        [steps[round(at * (len(steps) - 1) / (_ROWS_OF_CURVE - 1))] for at in range(_ROWS_OF_CURVE)] if steps else []
    )
    shown = list({event["step"]: event for event in shown}.values())
    names = [
        name for name in ("loss", "next_token", "retrieval", "refusal", "divergence") if any(name in e for e in shown)
    ]
    lines = [_row(["step", *names, "gradient norm"]), _row(["---"] * (len(names) + 2))]
    for event in shown:
        numbers = [f"{event[name]:.4f}" if name in event else "" for name in (*names, "gradient_norm")]
        lines.append(_row([str(event["step"]), *numbers]))
    evaluated = [event for event in curve if event["kind"] == "evaluation"]
    if evaluated:
        held_out = [name for name in evaluated[-1] if name not in ("kind", "step")]
        lines += ["", "On held-out facts while it was trained, attention alone:", ""]
        lines += [_row(["step", *held_out]), _row(["---"] * (len(held_out) + 1))]
        lines += [
            _row([str(e["step"]), *(f"{e[name]:.3f}" if name in e else "" for name in held_out)]) for e in evaluated
        ]
    picture = f"![curves]({CURVES_FILE})\n\n" if has_picture else ""
    return "## Curves\n\n" + picture + "\n".join(lines) + "\n"


def _fit(report: Mapping[str, Any]) -> str:
    return _json("Closed-form fit", report)


def _json(title: str, content: Mapping[str, Any]) -> str:
    return f"## {title}\n\n```json\n{json.dumps(content, indent=1, ensure_ascii=False, default=str)}\n```\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def headline(summary: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """An evaluation in a few numbers, for the job's one line: per size and way of answering, over all questions."""
    if summary is None:
        return None
    lines = []
    for size in summary["sizes"]:
        for found in size["results"]:
            line = {
                "num_facts": size["num_facts"],
                "system": found["system"],
                "prior": found["prior"],
                "grounding": found["grounding"],
            }
            for part, names in (("retrieval", ("@1", "@5")), ("answers", ("exact_match",)), ("refusal", ("f1",))):
                figures = found.get(part, {}).get("all", {})
                line |= {f"{part} {name}": round(figures[name]["value"], 4) for name in names if name in figures}
            lines.append(line)
    return lines


def draw_curves(curve: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw loss terms and learning rate over the steps, where matplotlib is installed; whether it was."""
    steps = [event for event in curve if event["kind"] == "step"]
    if len(steps) < 2:
        return False
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("loss", "next_token", "retrieval", "refusal", "divergence"):
        points = [(event["step"], event[name]) for event in steps if name in event]
        if points:
            left.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
    left.set_xlabel("step")
    left.set_title("loss and its terms")
    left.legend(fontsize=8)
    evaluated = [event for event in curve if event["kind"] == "evaluation"]
    if evaluated:
        for name in (key for key in evaluated[-1] if key not in ("kind", "step")):
            points = [(event["step"], event[name]) for event in evaluated if name in event]
            right.plot(*zip(*points, strict=True), marker=".", label=name)
        right.set_title("held-out facts")
        right.legend(fontsize=8)
    else:
        right.plot([event["step"] for event in steps], [event["learning_rate"] for event in steps], linewidth=1)
        right.set_title("learning rate")
    right.set_xlabel("step")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return True
