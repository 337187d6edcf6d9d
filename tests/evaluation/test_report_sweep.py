"""The report of a real sweep over a tiny model."""

from __future__ import annotations

import json
from functools import partial

from sweep_samples import make_parts, swept

from kblam_ray.evaluation.cost import measure_cost
from kblam_ray.evaluation.interference import measure_interference
from kblam_ray.evaluation.report import Section, make_report, sweep_markdown
from kblam_ray.evaluation.report.charts import charts_of
from kblam_ray.evaluation.sweep import unit as units


def test_a_sweep_that_measured_everything(tmp_path, monkeypatch):
    # Fewer texts and rounds than a real one has: charts have the same form.
    texts = ["A quiet day.", "Good night!"]
    monkeypatch.setattr(units, "measure_interference", partial(measure_interference, texts=texts))
    monkeypatch.setattr(units, "measure_cost", partial(measure_cost, new_tokens=2, rounds=2))
    # The same drawing as in the page, which takes seconds; files of it have tests of their own.
    monkeypatch.setattr("kblam_ray.evaluation.report.make.chart_png", lambda chart: b"png")
    parts = make_parts(tmp_path)
    found = swept(
        parts,
        tmp_path / "output",
        num_facts=[4, 6],
        unanswerable=1,
        baseline=["cosine", "bm25"],
        interference=[0, 6],
        cost=[4, 6],
    )
    # As it is read from a file.
    summary = json.loads(json.dumps(found.summary))
    names = {chart.name for chart in charts_of(summary)}
    assert {"retrieval-over-facts", "answers-over-facts", "refusal-over-facts"} <= names
    assert {"refusal-curves", "thresholds", "interference", "interference-of-answers", "time", "memory"} <= names
    report = make_report("A sweep", [Section("tiny", "A tiny model", "", summary, found.rows)])
    assert set(report.plots) == {f"{name}.png" for name in names}
    (table,) = [
        line for line in sweep_markdown(summary).splitlines() if line.startswith("| 6 | attention with prior |")
    ][:1]
    figure = next(
        one["retrieval"]["all"]["@1"]["value"]
        for unit in summary["units"]
        if unit["part"] == "questions" and unit["size"]["num_facts"] == 6
        for one in unit["size"]["results"]
        if (one["system"], one["prior"], one["grounding"]) == ("attention", True, None)
    )
    assert f"| {100 * figure:.1f} (" in table
    assert found.rows["question"][0].as_py().split()[0] in report.html
