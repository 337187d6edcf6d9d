"""What `ray job submit` carries: the code and settings, neither data nor environments; or nothing, from the image."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.facts import write_facts
from tests.cluster.manifests import ROOT
from tests.cluster.test_image import installed, repository_files
from tests.jobs.submitting import BIN, cluster, submit

__all__ = ["cluster", "installed"]  # fixtures

MAX_BYTES = 40_000_000
"""Ray refuses packages of 500 MiB; ours is small enough to be sent with every submission."""

CARRIED = {"kblam_ray", "jobs", "cluster"}

DATA_AND_ENVIRONMENTS = [
    *("demo-kb/world/part-0.parquet", "kb/world/_delta_log/00000000000000000000.json", "my kb/part.parquet"),
    *("kb.rejected/rows.jsonl", "facts.jsonl", "exports/facts.csv.gz", "adapters/world/adapter_model.safetensors"),
    *("models/llama/model.safetensors", "results/world/rows.parquet", "bench/out.json", "mlruns/0/meta.json"),
    *(".venv/lib/python3.11/site.py", "venv/bin/python", "env311/bin/python", "conda/bin/python", ".git/config"),
    *(".pytest_cache/x", "build/lib/x.py", "dist/kblam_ray.whl", "kblam_ray.egg-info/PKG-INFO", ".env", "core.1234"),
    *("kblam_ray/__pycache__/job.cpython-311.pyc", "jobs/left.parquet", "notebooks/a.ipynb", "wandb/run/x.log"),
    # Beside the code, as jobs leave it that run there.
    *("jobs/kb/_delta_log/0.json", "jobs/facts.jsonl", "jobs/facts.json", "jobs/adapter/adapter_model.safetensors"),
    *("jobs/checkpoints/step-1/state.json", "jobs/env/bin/python", "jobs/env/lib/x.py", "jobs/.env", "jobs/core.1234"),
    *("jobs/.aws/credentials", "jobs/mlruns/0/meta.yaml", "cluster/facts.jsonl", "cluster/env/bin/python"),
    *("cluster/train/out/state.json", "cluster/train/model.safetensors", "cluster/key.pem", "cluster/.env"),
    *("kblam_ray/data/facts.jsonl", "kblam_ray/model/llama/model.safetensors", "kblam_ray/env/bin/python"),
    *("cluster/train/facts.json", "cluster/data/facts.json", "cluster/id_rsa", "kblam_ray/id_rsa", "kblam_ray/core"),
    *("kblam_ray/hub/models--m/blobs/0123abc", "kblam_ray/model/models--m/blobs/0123abc", "kblam_ray/env/lib/x.py"),
    *("kblam_ray/mlruns/0/meta.yaml", "kblam_ray/evaluation/wandb/run-1/config.yaml"),
    *("kblam_ray/env/lib/python3.11/site-packages/x.py", "demo-model/model/model.safetensors", "large.bin"),
]


def package(folder: Path, target: Path) -> list[str]:
    """The names in the package that a submission of a folder makes, by Ray's own way of making it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as content:
        return content.namelist()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a clone is sent as in which somebody has worked."""
    clone = tmp_path_factory.mktemp("clone")
    for path in [*repository_files(), *DATA_AND_ENVIRONMENTS, "own.yaml", "cluster/train/own.yaml"]:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).touch()
    for name in (".gitignore", ".rayignore"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    return package(clone, tmp_path_factory.mktemp("package") / "package.zip")


def test_no_data_and_no_environment_is_carried(names):
    assert not set(names) & set(DATA_AND_ENVIRONMENTS)
    at_the_top = {name for name in names if "/" not in name.rstrip("/")}
    assert at_the_top == {"pyproject.toml", "own.yaml"}
    assert {name.partition("/")[0] for name in names if "/" in name} == CARRIED


def test_all_that_jobs_need_is_carried(names):
    needed = {path for path in repository_files() if path.startswith(("kblam_ray/", "jobs/", "cluster/train/"))}
    assert needed <= set(names)
    assert {"own.yaml", "cluster/train/own.yaml"} <= set(names)


def test_the_package_of_this_clone_is_small(tmp_path):
    package(ROOT, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < MAX_BYTES


@pytest.mark.slow
def test_progress_and_summary_are_in_the_jobs_logs(cluster, installed, tmp_path):
    """Without a working_dir, from the image's wheel and jobs, in whatever folder Ray starts them."""
    site, jobs = installed
    facts, kb = str(tmp_path / "facts.jsonl"), str(tmp_path / "kb")
    write_facts((Fact(f"entity {n}", "code", str(n)) for n in range(200)), facts)
    environment = {**cluster, "PYTHONPATH": str(site)}
    # The image's environment is that of every process; here it comes with the submission.
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(site)}})
    command = [str(BIN / "ray"), "job", "submit", "--submission-id", "image", "--runtime-env-json", runtime, "--"]
    command += ["python", str(jobs / "embed_kb.py"), "--kb", kb, "--input", facts, "--encoder", "hashing"]
    # A head listens before the agent that runs its jobs is up: the first package is sent when it is.
    code, summary, _ = submit(cluster, "python", "jobs/embed_kb.py", "--kb", f"{kb}-2", "--input", "nowhere.jsonl")
    assert (code, summary["ok"]) == (1, False)
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert KnowledgeBase.open(kb).num_facts == 200
    logs = subprocess.run(
        [str(BIN / "ray"), "job", "logs", "image"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    lines = [line for line in logs.splitlines() if line.strip()]
    (summary,) = [json.loads(line) for line in lines if line.startswith('{"job"')]
    assert (summary["ok"], summary["num_facts"], summary["kb"]) == (True, 200, kb)
    assert any(line.startswith("embed_kb:") or "texts" in line for line in lines), logs
    assert not os.path.exists("/kb")
