"""Run the published experiments, and ours, by name: on the demo model, or on the paper's with the paper's settings.

    python jobs/reproduce.py --output results/demo
    python jobs/reproduce.py --output results/demo --experiment retrieval --experiment cost
    python jobs/reproduce.py --output results/full --scale full --input wordnet=nouns.jsonl.gz --num-workers 4
    python jobs/reproduce.py --suite llama-3-8b-instruct --output results/8b --num-workers 8 --gpus-per-worker 1
    python jobs/reproduce.py --suite llama-3-8b-instruct --base-model models/llama --adapter minilm=adapters/mine \\
        --experiment retrieval --output results/8b

The output folder gets report.html with every plot and the published figures beside ours, report.md, summary.json, and a
folder for each experiment. Adapters that an experiment needs are fitted first and kept. Run again, it does what is
missing. A suite whose model cannot be had is an error, or, beside others, marked "not run here".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kblam_ray.errors import InputError
from kblam_ray.evaluation.reproduce.settings import ReproduceSettings
from kblam_ray.job import main, packages_of


def reproduce(settings: ReproduceSettings) -> dict[str, Any]:
    with packages_of("train", "the experiments need"):
        from kblam_ray.evaluation.reproduce.run import BASE_MODEL, run
    from kblam_ray.demo import shipped

    return run(
        settings,
        fit=_fit,
        make_facts=_facts(),
        shipped={
            BASE_MODEL: str(shipped.BASE_MODEL),
            "shared": str(shipped.ADAPTER),
            "paper": str(shipped.PAPER_ADAPTER),
        },
        check_fit=_train_settings,
        progress=lambda line: print(f"reproduce: {line}", file=sys.stderr, flush=True),
    )


def _train_settings(told: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    from kblam_ray.training.settings import TrainSettings

    try:
        return TrainSettings.model_validate(dict(told))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{'.'.join(map(str, first['loc'])) or 'settings'}: {first['msg']}",
            where="an adapter's fit",
            help="the settings are those of jobs/train_adapter.py, see its --help",
        ) from None


def _fit(told: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = _train_settings(told)
    with packages_of("train", "fitting an adapter needs"):
        from kblam_ray.training.loop.run import train
    return train(settings)


def _facts() -> dict[str, Callable[[Path], int]]:
    """What suites have under these names: real facts, and those that the shipped adapters were trained on."""
    from kblam_ray.demo.pretraining.facts import pretraining_facts
    from kblam_ray.demo.pretraining.settings import PretrainSettings
    from kblam_ray.demo.world import world_facts
    from kblam_ray.encoders.load import load_encoder
    from kblam_ray.facts.writing import write_facts

    def world(path: Path, *, is_country: bool) -> int:
        facts = list(world_facts())
        countries = {fact.entity for fact in facts if fact.property == "capital" or fact.property == "continent"}
        return write_facts((fact for fact in facts if (fact.entity in countries) == is_country), str(path))

    def adapter_facts(path: Path) -> int:
        made = PretrainSettings()
        vocabulary = getattr(load_encoder(made.encoder), "vocabulary", None) or ()
        return write_facts(pretraining_facts(vocabulary, made.adapter_facts, made.seed + 1), str(path))

    return {
        "countries": lambda path: world(path, is_country=True),
        "cities": lambda path: world(path, is_country=False),
        "adapter-facts": adapter_facts,
    }


if __name__ == "__main__":
    main("reproduce", ReproduceSettings, reproduce)
