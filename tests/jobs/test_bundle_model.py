"""jobs/bundle_model.py as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_samples import make_kb, save_base, tiny_adapter, tiny_llama
from running import run_job

from jobs import bundle_model
from kblam_ray.demo import shipped
from kblam_ray.errors import InputError
from kblam_ray.job import parse
from kblam_ray.model import load_bundle


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    tiny_adapter(tiny_llama(), "shared").save_pretrained(str(folder / "adapter"))
    kb = make_kb(folder / "kb")
    kb.delete([("Ur", "founder")])
    base = save_base(folder / "base")
    return ["--base-model", base, "--adapter", str(folder / "adapter"), "--kb", kb.uri]


def test_a_bundle(parts, tmp_path):
    output = str(tmp_path / "bundle")
    code, summary, _ = run_job("bundle_model", *parts, "--output", output, "--kb-version", "0")
    assert (code, summary["ok"], summary["kb_version"]) == (0, True, 0)
    _, memory = load_bundle(output)
    assert (memory.version, memory.num_facts) == (0, 6)
    assert summary["base_model"].startswith(output)


def test_a_reference_that_follows(parts, tmp_path):
    output = tmp_path / "bundle"
    settings = parse(
        "bundle_model",
        bundle_model.BundleSettings,
        [*parts, "--output", str(output), "--no-copy-base", "--follow"],
    )
    assert bundle_model.bundle(settings)["kb_version"] is None
    written = json.loads((output / "knowledge_model.json").read_text())
    assert written["base_model"] == parts[1]
    assert written["kb"] == {"uri": parts[5], "version": None}


def test_without_a_model_the_demos_is_bundled(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "BASE_MODEL", Path(parts[1]))
    monkeypatch.setattr(shipped, "ADAPTER", Path(parts[3]))
    summary = bundle_model.bundle(bundle_model.BundleSettings(kb=parts[5], output=str(tmp_path / "demo")))
    assert summary["base_model"].startswith(str(tmp_path / "demo"))
    assert (tmp_path / "demo" / "base" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"adapter": "a"}, "--base-model not given"),
        ({"base_model": "b"}, "--adapter not given"),
        ({"base_model": "b", "adapter": "a", "follow": True, "kb_version": 1}, "--follow and"),
    ],
)
def test_wrong_input_is_named(settings, error, tmp_path):
    with pytest.raises(InputError, match=error):
        bundle_model.bundle(bundle_model.BundleSettings(kb="kb", output=str(tmp_path / "bundle"), **settings))
