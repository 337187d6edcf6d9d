"""All charts of a sweep, in the order in which a reader asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kblam_ray.evaluation.report.chart import Chart
from kblam_ray.evaluation.report.cost_charts import cost_charts, interference_charts
from kblam_ray.evaluation.report.question_charts import question_charts
from kblam_ray.evaluation.report.refusal_charts import refusal_charts
from kblam_ray.evaluation.report.sweeps import Sweep


def charts_of(summary: Mapping[str, Any]) -> list[Chart]:
    """Charts of what was measured, and of nothing else; names are unique within the sweep.

    Args:
        summary: of a sweep, as its `summary.json` has it.
    """
    sweep = Sweep(summary)
    return [*question_charts(sweep), *refusal_charts(sweep), *interference_charts(sweep), *cost_charts(sweep)]
