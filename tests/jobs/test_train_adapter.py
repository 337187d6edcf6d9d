"""jobs/train_adapter.py as a process: its summary, Ray Train's workers, SIGKILL and SIGTERM, workers that die."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from kblam_ray import KnowledgeAdapter
from kblam_ray.training.checkpoints import CheckpointStore
from kblam_ray.training.loop.run import train
from tests.jobs.running import run_job, start_job
from tests.training.loop_cases import arguments, losses, make_places, settings


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory) -> Path:
    """A run in one process that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(settings(places, output))
    return output


def kill_tree(job) -> None:
    """SIGKILL the driver, then what is left of what it started."""
    children = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    for child in children:
        if child.is_running():
            child.kill()
    psutil.wait_procs(children, timeout=10)


def wait_for_step(output: Path, step: int, job) -> None:
    deadline = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists() or max(losses(output), default=0) < step:
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.02)


def test_two_ray_workers_with_deepspeed_do_what_one_process_does(places, whole, tmp_path):
    pytest.importorskip("deepspeed")
    asked = settings(places, tmp_path / "out", num_workers=2, strategy="zero2")
    code, summary, stderr = run_job("train_adapter", *arguments(asked))
    assert code == 0, stderr
    assert summary["ok"]
    assert (summary["job"], summary["steps"], summary["strategy"]) == ("train_adapter", 6, "zero2")
    assert summary["adapter"] == str(tmp_path / "out")
    assert "step 6: loss" in stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=2e-5)
    assert KnowledgeAdapter.from_pretrained(tmp_path / "out").config.kind == "shared"


def test_wrong_input_is_one_line_and_exit_code_2(places, tmp_path):
    asked = settings({**places, "kb": [str(tmp_path / "none")]}, tmp_path / "out")
    code, summary, _ = run_job("train_adapter", *arguments(asked))
    assert code == 2
    assert summary["error"]["code"] == "table_not_found"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_killed_at_a_random_step_it_goes_on_to_the_same_curve(places, tmp_path, strategy):
    steps = {"steps": 40, "checkpoint_every": 3, "strategy": strategy}
    train(settings(places, tmp_path / "whole", **steps))
    asked = settings(places, tmp_path / "out", **steps)
    job = start_job("train_adapter", *arguments(asked))
    wait_for_step(tmp_path / "out", random.randint(4, 30), job)
    kill_tree(job)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    code, summary, stderr = run_job("train_adapter", *arguments(asked), "--resume")
    assert code == 0, stderr
    assert summary["resumed_from"] > 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "strategy"), [(2, "ddp"), (2, "zero1"), (2, "zero3"), (1, "zero2")])
def test_examples_made_ahead_by_ray_data_give_the_same_curve(places, whole, tmp_path, num_workers, strategy):
    asked = settings(
        places, tmp_path / "out", num_workers=num_workers, strategy=strategy, num_example_workers=1, micro_batch_size=1
    )
    code, _, stderr = run_job("train_adapter", *arguments(asked))
    assert code == 0, stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_143_on_ray_too(places, tmp_path):
    asked = settings(places, tmp_path / "out", steps=2_000, num_workers=1, checkpoint_every=10_000)
    job = start_job("train_adapter", *arguments(asked))
    wait_for_step(tmp_path / "out", 3, job)
    job.send_signal(signal.SIGTERM)
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 143, stderr
    assert '"interrupted"' in stdout.splitlines()[-1]
    newest = CheckpointStore(str(tmp_path / "out" / "checkpoints")).newest()
    assert newest is not None
    assert newest.step >= 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("process", ["RayTrainWorker", "BoardContent"])
def test_what_dies_is_started_again_and_the_curve_is_the_same(places, tmp_path, process):
    steps = {"steps": 60, "checkpoint_every": 5}
    train(settings(places, tmp_path / "whole", **steps))
    asked = settings(places, tmp_path / "out", **steps, num_workers=2, max_failures=2)
    job = start_job("train_adapter", *arguments(asked))
    wait_for_step(tmp_path / "out", 8, job)
    found = [
        child
        for child in psutil.Process(job.pid).children(recursive=True)
        if any(process in part for part in child.cmdline())
    ]
    assert len(found) == (2 if process == "RayTrainWorker" else 1)
    os.kill(found[-1].pid, signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stderr
    assert '"steps": 60' in stdout.splitlines()[-1]
    found, whole = losses(tmp_path / "out"), losses(tmp_path / "whole")
    # What stood on the board when it died is lost: the steps of a fraction of a second.
    assert found.keys() == whole.keys() if process == "RayTrainWorker" else 60 in found
    assert found == pytest.approx({step: whole[step] for step in found}, abs=2e-4)
