"""The settings of a training: flags, YAML, what they refuse; the shipped files; DeepSpeed's settings; the schedule."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.job import parse
from kblam_ray.training.loop.deepspeed_config import (
    SHIPPED,
    clipping_of,
    completed,
    read_deepspeed_config,
    require_deepspeed,
)
from kblam_ray.training.loop.ray_workers import cpus_per_worker, require_gpus
from kblam_ray.training.loop.schedule import learning_rate
from kblam_ray.training.loop.trackers import require_trackers
from kblam_ray.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]
LEAST = ["--kb", "kb", "--output", "out"]


def parsed(*arguments: str) -> TrainSettings:
    settings = parse("train_adapter", TrainSettings, [*LEAST, *arguments])
    assert isinstance(settings, TrainSettings)
    return settings


def test_parts_are_prefixed_flags_and_win_over_yaml(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("mix: {batch-size: 8, kb_per: batch, kb_size: [10, 20]}\nseed: 3\nclosed_form: {seed: 9}\n")
    settings = parsed(
        *("--config", str(config), "--mix-kb-size", "30", "40", "--mix-question-mix", "simple=2"),
        *("--mix-question-mix", "unanswerable=1", "--kb-layers", "1", "--kb-layers", "3"),
    )
    assert settings.mix.kb_per == "batch"
    assert settings.mix.batch_size == 8
    assert settings.mix.kb_size == (30, 40)
    assert settings.mix.question_mix == {"simple": 2.0, "unanswerable": 1.0}
    assert settings.kb_layers == [1, 3]
    assert (settings.mix.seed, settings.calibration.seed, settings.closed_form.seed) == (3, 3, 9)


def test_the_fit_never_holds_out_by_the_seed_that_training_holds_out_by():
    assert parsed().closed_form.seed != parsed().mix.held_out_seed
    with pytest.raises(InputError, match="closed-form-seed"):
        parsed("--closed-form-seed", "4", "--mix-held-out-seed", "4")


def test_evaluation_asks_about_what_training_holds_out():
    settings = parsed("--mix-held-out", "0.2", "--mix-held-out-seed", "7")
    assert (settings.evaluation.held_out, settings.evaluation.held_out_seed) == (0.2, 7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mix-batch-size", "9", "--num-workers", "2"], "--mix-batch-size 9"),
        (["--mix-batch-size", "8", "--micro-batch-size", "3"], "--micro-batch-size 3"),
        (["--kb-layers", "1", "--kb-layer-frequency", "3"], "not both"),
        (["--mix-kb-size", "9", "3"], "--mix"),
        (["--mix-kb-size", "9"], "expected 2 arguments"),
        (["--mix-question-mix", "simple"], "is not KEY=VALUE"),
        (["--mix-question-mix", "riddle=1"], "--mix-question-mix"),
        (["--losses-retrieval", "-1"], "--losses-retrieval"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, says):
    with pytest.raises(InputError, match=says):
        parsed(*arguments)
    with pytest.raises(InputError, match="--synthetic"):
        parse("train_adapter", TrainSettings, ["--output", "out"])


def test_accumulation():
    settings = parsed("--mix-batch-size", "48", "--num-workers", "4", "--micro-batch-size", "3")
    assert settings.accumulation == 4
    assert parsed("--num-workers", "0").accumulation == 1


@pytest.mark.parametrize("path", sorted((ROOT / "cluster" / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_settings(path):
    settings = parsed("--config", str(path))
    given = yaml.safe_load(path.read_text())
    assert settings.base_model == given["base_model"]
    assert settings.accumulation * settings.micro_batch_size * settings.num_workers == settings.mix.batch_size
    clipping_of(settings.strategy, settings.gradient_clipping)


def test_the_papers_settings():
    settings = parsed("--config", str(ROOT / "cluster" / "train" / "llama-3-8b.yaml"))
    assert (settings.kind, settings.kb_layer_frequency, settings.kb_scale, settings.start) == (
        "paper",
        3,
        100,
        "random",
    )
    assert (settings.steps, settings.learning_rate, settings.mix.batch_size) == (20_000, 5e-4, 400)
    assert settings.losses.retrieval == settings.losses.refusal == settings.losses.divergence == 0
    assert settings.num_workers == 8


def test_settings_are_read_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, kblam_ray.training.settings; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeeds_shipped_settings_state_what_matters(name):
    config = read_deepspeed_config(name)
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["stage"] == int(name[-1])
    for setting in ("reduce_bucket_size", "overlap_comm", "contiguous_gradients"):
        assert setting in config["zero_optimization"]
    assert json.loads((ROOT / "cluster" / "deepspeed" / f"{name}.json").read_text()) == config
    made = completed(config, micro_batch_size=2, accumulation=3, clipping=0.5)
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 0.5


def test_deepspeed_itself_accepts_them():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in SHIPPED:
        DeepSpeedZeroConfig(**read_deepspeed_config(name)["zero_optimization"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot read"),
        ("[]", "zero_optimization"),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization"),
        ('{"zero_optimization": {"stage": 1}, "optimizer": {}}', "'optimizer'"),
        ('{"zero_optimization": {"stage": 1}, "scheduler": {}}', "'scheduler'"),
        ('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}', "'bf16'"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}',
            "offload_optimizer go to 'nvme'",
        ),
    ],
)
def test_deepspeed_settings_that_cannot_be(tmp_path, content, says):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(InputError, match=says):
        read_deepspeed_config(str(tmp_path / "mine.json"))


def test_gradient_clipping_is_the_flags_then_the_files(tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 0.3}')
    assert clipping_of("ddp", None) == 1.0
    assert clipping_of(str(tmp_path / "mine.json"), None) == 0.3
    assert clipping_of("zero2", 0) == 0
    with pytest.raises(InputError, match="gradient_accumulation_steps is 7"):
        completed({"gradient_accumulation_steps": 7}, micro_batch_size=1, accumulation=2, clipping=1)


def test_the_learning_rate():
    rates = [learning_rate(step, peak=1.0, warmup_steps=4, steps=12, last=0.1) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.55)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert learning_rate(12, peak=1.0, warmup_steps=4, steps=12, last=0.1) == pytest.approx(0.1)
    assert learning_rate(0, peak=2.0, warmup_steps=0, steps=1, last=0.1) == 2.0


def test_workers_never_ask_for_every_cpu():
    assert cpus_per_worker(parsed("--num-workers", "2"), 2, is_local=True) == 0.75
    assert cpus_per_worker(parsed("--num-workers", "2"), 16, is_local=True) == 1.0
    with pytest.raises(InputError, match="8 workers for 2 logical CPUs"):
        cpus_per_worker(parsed("--num-workers", "8"), 2, is_local=True)
    with pytest.raises(InputError, match="2 of 2 logical CPUs"):
        cpus_per_worker(parsed("--num-workers", "2", "--cpus-per-worker", "1"), 2, is_local=True)
    assert cpus_per_worker(parsed("--num-workers", "8", "--cpus-per-worker", "0.1"), 2, is_local=True) == 0.1
    assert cpus_per_worker(parsed("--num-workers", "8"), 2, is_local=False) == 1.0
    with pytest.raises(InputError, match="2 workers ask for 2 GPUs, 1 are there"):
        require_gpus(parsed("--num-workers", "2"), {"GPU": 1.0})


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--strategy ddp"):
        require_deepspeed()


@pytest.mark.parametrize("arguments", [["--mlflow-uri", "x"], ["--wandb-project", "x"]])
def test_trackers_that_are_not_installed(arguments, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=arguments[0]):
        require_trackers(parsed(*arguments))
