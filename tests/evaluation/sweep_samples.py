"""A tiny model and adapter on disk, and small sweeps over them, for tests of sweeps."""

from __future__ import annotations

from pathlib import Path

from model_samples import make_kb, save_base, tiny_adapter, tiny_llama

from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.evaluation.sweep.run import SweepResult, sweep

SMALL = {
    "num_questions": 2,
    "max_new_tokens": 3,
    "kinds": ["simple", "unanswerable"],
    "grounding": ["off"],
    "baseline": ["cosine", "zero_shot"],
    "device": "cpu",
}


def make_parts(folder: Path) -> dict[str, str]:
    """A base model, an adapter with a question prior and a table of six facts."""
    tiny_adapter(tiny_llama(), "shared", question_prior=20.0).save_pretrained(str(folder / "adapter"))
    return {
        "base_model": save_base(folder / "base"),
        "adapter": str(folder / "adapter"),
        "kb": make_kb(folder / "kb").uri,
    }


def small(output, **settings) -> EvaluateSettings:
    return EvaluateSettings(**{**SMALL, "output": str(output), **settings})


def swept(parts: dict[str, str], output, *, adapters=None, own=None, progress=None, **settings) -> SweepResult:
    if not {"kb", "input", "synthetic"} & settings.keys():
        settings["kb"] = [parts["kb"]]
    adapters = adapters or {"tiny": parts["adapter"]}
    return sweep(small(output, **settings), parts["base_model"], adapters, own=own, progress=progress)


def figures(found: SweepResult) -> list[dict]:
    """The units of a summary but those that measure time."""
    return [unit for unit in found.summary["units"] if unit["part"] != "cost"]
