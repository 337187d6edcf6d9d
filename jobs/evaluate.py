"""Evaluate adapters on knowledge bases: retrieval, answers, refusals, cost, beside baselines on the same base model.

    python jobs/evaluate.py --kb kb/world --output results/world
    python jobs/evaluate.py --input cities.csv --input nouns=wordnet.jsonl.gz --output results/real
    python jobs/evaluate.py --synthetic 100000 --num-facts 100 --num-facts 10000 --num-facts 100000 \\
        --selection all --selection similar:64 --interference 0 --interference 10000 --cost 100 --cost 10000 \\
        --num-workers 8 --output s3://bucket/results/synthetic
    python jobs/evaluate.py --base-model models/llama --adapter paper=adapters/a --adapter shared=adapters/b \\
        --kb kb/world --kb-scale 10 --kb-scale 100 --held-out 0.1 --entities held_out --entities trained \\
        --output results/two
    python jobs/evaluate.py --kb kb/world --questions own.jsonl --output results/own
    python jobs/evaluate.py --kb kb/world --question "What is the capital of Peru?" --grounding verbatim

With neither --base-model nor --adapter the demo's are used. Settings that can be given several times make a sweep over
every combination of them. The output folder gets rows.parquet (a row per question and way of answering), summary.json
(figures with 95 % confidence intervals), report.html with its plots, and report.md. What is done is kept there, unit by
unit: the same command again does what is missing and no more. With --question the summary has `text`, `citations`,
`refused` and `kb_version`.
"""

from typing import Any

from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.job import main, packages_of


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    with packages_of("model,evaluate", "an evaluation needs"):
        from kblam_ray.evaluation.job import run
        from kblam_ray.evaluation.sources import named
    if settings.base_model is None:
        from kblam_ray.demo import shipped

        return run(settings, str(shipped.BASE_MODEL), {"demo": str(shipped.ADAPTER)})
    return run(settings, settings.base_model, named(settings.adapter, "--adapter"))


if __name__ == "__main__":
    main("evaluate", EvaluateSettings, evaluate)
