"""Evaluate a model with its adapter on a knowledge base: retrieval, answers, refusals, beside baselines.

    python jobs/evaluate.py --kb kb/world --output results/world
    python jobs/evaluate.py --synthetic 10000 --num-facts 100 --num-facts 10000 --output results/synthetic
    python jobs/evaluate.py --base-model models/llama --adapter adapters/world --kb kb/world --questions own.jsonl \\
        --output results/own
    python jobs/evaluate.py --kb kb/world --question "What is the capital of Peru?"

With neither --base-model nor --adapter the demo's are used. The output folder gets rows.parquet (a row per size, way of
answering and question), summary.json (figures with 95 % confidence intervals) and report.md (the same as tables). With
--question the summary has `text`, `citations`, `refused` and `kb_version`.
"""

from typing import Any

from kblam_ray.errors import MissingDependencyError
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.job import main


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    try:
        from kblam_ray.evaluation.job import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "kblam_ray":
            raise
        raise MissingDependencyError(
            f"an evaluation needs the package {error.name}", help='pip install "kblam-ray[model]"'
        ) from None
    base_model, adapter = settings.base_model, settings.adapter
    if base_model is None or adapter is None:
        from kblam_ray.demo import shipped

        base_model, adapter = str(shipped.BASE_MODEL), str(shipped.ADAPTER)
    return run(settings, base_model, adapter)


if __name__ == "__main__":
    main("evaluate", EvaluateSettings, evaluate)
