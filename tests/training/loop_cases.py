"""A tiny base model, a table of made-up facts, and settings that train on them in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kblam_ray.facts.synthetic import SyntheticFacts
from kblam_ray.table import KnowledgeBase
from kblam_ray.training.settings import TrainSettings
from tests.model_samples import ENCODER, save_base

NUM_FACTS = 120


def make_places(folder: Path) -> dict[str, str]:
    """A base model's folder and a table, as settings name them."""
    save_base(folder / "base")
    kb = KnowledgeBase.create(str(folder / "kb"), ENCODER)
    kb.upsert(list(SyntheticFacts(3).facts(0, NUM_FACTS)))
    return {"base_model": str(folder / "base"), "kb": [str(folder / "kb")]}


def settings(places: dict[str, Any], output: Path, **given: Any) -> TrainSettings:
    """Six steps in this process from a random start, without calibration and evaluation unless `given` says so."""
    mix = {"batch_size": 4, "kb_size": (4, 12), "max_tokens": 512, **given.pop("mix", {})}
    merged = {
        "output": str(output),
        "start": "random",
        "kb_layers": [1, 3],
        "num_workers": 0,
        "device": "cpu",
        "dtype": "float32",
        "steps": 6,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "log_every": 1,
        "calibrate": False,
        "evaluate": False,
        "tensorboard": False,
        **places,
        **given,
        "mix": mix,
    }
    return TrainSettings.model_validate(merged)


def arguments(given: TrainSettings) -> list[str]:
    """The same as flags of the job."""
    flags = []
    for name, value in given.model_dump(mode="json", exclude_unset=True).items():
        parts = {f"{name}-{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {name: value}
        for part, item in parts.items():
            flag = "--" + part.replace("_", "-")
            if isinstance(item, bool):
                flags.append(flag if item else flag.replace("--", "--no-", 1))
            elif isinstance(item, list) and part not in ("mix-kb_size", "betas"):
                flags += [each for element in item for each in (flag, str(element))]
            elif isinstance(item, list):
                flags += [flag, *map(str, item)]
            elif item is not None:
                flags += [flag, str(item)]
    return flags


def losses(output: Path | str) -> dict[int, float]:
    """The loss of each logged step."""
    lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {event["step"]: event["loss"] for event in events if event["kind"] == "step"}
