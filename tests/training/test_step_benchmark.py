"""jobs/benchmark.py training-step: both steps compute one thing where they are set to, and its summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kblam_ray.errors import InputError
from kblam_ray.job import parse
from kblam_ray.training.benchmark import TrainingStepBenchmark, benchmark_training_step
from kblam_ray.training.benchmark.our_step import NEXT_TOKEN, OurStep
from kblam_ray.training.benchmark.published_step import PublishedStep
from kblam_ray.training.benchmark.run import _adapter, _base_model, _cases, random_batch

ROOT = Path(__file__).parents[2]

TINY = {
    "shape": "tiny",
    "batch_size": 3,
    "num_tokens": 9,
    "answer_tokens": 4,
    "num_facts": 7,
    "dim": 16,
    "kb_layer_frequency": 2,
    "rounds": 2,
    "steps": 1,
    "dtype": "float32",
}


class OnCpu:
    device = torch.device("cpu")

    @staticmethod
    def free_bytes() -> int:
        return 2**32


def test_the_losses_and_gradients_of_one_arithmetic_are_equal():
    settings = TrainingStepBenchmark(**TINY)
    base_model = _base_model(settings, OnCpu).double()
    implementation = base_model.config._attn_implementation
    batch = random_batch(settings, "example", is_all_answer=True)
    found = []
    for step in (
        PublishedStep(base_model, _adapter(settings, "paper").double()),
        OurStep(base_model, _adapter(settings, "paper").double(), NEXT_TOKEN),
    ):
        with step.attached():
            loss = step.loss(batch)
            found.append([loss, *torch.autograd.grad(loss, list(step.adapter.parameters()))])
        assert base_model.config._attn_implementation == implementation
    for published, ours in zip(*found, strict=True):
        # Their logits go through float32: the published ones in the loss and the softmax, the library's in its norms.
        torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert found[0][1].abs().max() > 1e-4


def test_every_case_trains():
    settings = TrainingStepBenchmark(**TINY)
    cases = _cases(settings, _base_model(settings, OnCpu))
    ways = [(case.way, case.kind, case.kb_per) for case in cases]
    parts = [(kind, kb_per) for kind in ("paper", "shared") for kb_per in ("example", "batch")]
    expected = [(way, *part) for part in parts for way in ("ours, answers' loss", "ours, all losses")]
    assert ways[:2] == [("published", "paper", "example"), ("ours, published loss", "paper", "example")]
    assert ways[2:] == expected
    for case in cases:
        before = {name: tensor.clone() for name, tensor in case.step.adapter.state_dict().items()}
        with case.step.attached():
            losses = [case.step(case.batch).item() for _ in range(4)]
        assert losses[-1] < losses[0], case
        # Every tensor but those that no loss can move: the bias of a shared query adds the same to all scores.
        moved = [
            name for name, tensor in case.step.adapter.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        assert "value_projection.weight" in moved
        assert any(name.startswith("query_heads") for name in moved)


def test_lengths_of_rows():
    settings = TrainingStepBenchmark(**{**TINY, "shortest": 5})
    batch = random_batch(settings, "batch")
    assert batch.attention_mask_BT.sum(1).tolist() == [5, 7, 9]
    assert (batch.labels_BT >= 0).sum(1).tolist() == [4, 4, 4]
    assert batch.answer_start_B.tolist() == [1, 3, 5]
    assert batch.wanted_at_W.tolist() == [*range(0, 4), *range(2, 6), *range(4, 8)]
    assert batch.is_shared
    with pytest.raises(InputError, match="rows of 4 to 9 tokens with answers of 4"):
        TrainingStepBenchmark(**{**TINY, "shortest": 4})


def test_shapes():
    small = TrainingStepBenchmark().base_config()
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size, small.head_dim) == (256, 8, 8_192, 32)
    large = parse("benchmark", TrainingStepBenchmark, ["--shape", "llama-8b", "--layers", "4"]).base_config()
    assert (large.hidden_size, large.num_hidden_layers, large.num_key_value_heads) == (4_096, 4, 8)
    with pytest.raises(InputError, match="5 query heads"):
        TrainingStepBenchmark(heads=5).base_config()


def test_a_model_that_does_not_fit_is_refused():
    settings = TrainingStepBenchmark(shape="llama-8b")
    with pytest.raises(InputError, match="may be taken"):
        _base_model(settings, OnCpu)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_summary(checkpointing, capsys):
    summary = benchmark_training_step(TrainingStepBenchmark(**TINY, gradient_checkpointing=checkpointing))
    assert summary["equal_loss"]["dtype"] == "float32"
    assert summary["equal_loss"]["ours"] == pytest.approx(summary["equal_loss"]["published"], rel=1e-5)
    assert summary["cases"][0]["ratio"] == 1
    assert all(row["tokens_per_s"] > 0 and row["ratio"] > 0 for row in summary["cases"])
    assert "ours, all losses" in capsys.readouterr().err
    json.dumps(summary)


def test_only_what_is_asked_for_is_measured():
    summary = benchmark_training_step(
        TrainingStepBenchmark(**{**TINY, "published": False, "kind": ["shared"], "kb_per": ["batch"], "rounds": 1})
    )
    assert [row["kind"] for row in summary["cases"]] == ["shared", "shared"]
    assert "equal_loss" not in summary
    assert "ratio" not in summary["cases"][0]


def test_the_job_runs_without_ray():
    absent = ("ray", "boto3", "sentence_transformers", "onnxruntime", "openai", "deepspeed")
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent!r}));"
        "runpy.run_path('jobs/benchmark.py', run_name='__main__')"
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    done = subprocess.run(
        [sys.executable, "-c", program, "training-step", "--kind", "paper", "--kb-per", "example", *flags],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, summary["ok"]) == (0, True), done.stderr
    assert summary["cases"][0]["way"] == "published"
