"""The image: its Dockerfile can be built from what the build is given, and holds what manifests and jobs want of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pathspec
import pytest
from dockerfile_parse import DockerfileParser

from tests.cluster.manifests import CLUSTER, IN_IMAGE, ROOT, kubernetes, walk

BUILDS_ON = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    parser = DockerfileParser(path=str(CLUSTER / "Dockerfile"), cache_content=True)
    return [(one["instruction"], one["value"]) for one in parser.structure if one["instruction"] != "COMMENT"]


def values(instruction: str) -> list[str]:
    return [value for name, value in instructions() if name == instruction]


def copied() -> list[tuple[list[str], str]]:
    """What is copied from the repository, and where to."""
    found = []
    for value in values("COPY"):
        words = value.split()
        if not words[0].startswith("--from="):
            found.append((words[:-1], words[-1]))
    return found


def given_to_the_build(paths: list[str] | None = None) -> list[str]:
    """Which files the build gets: by default of the repository's."""
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    # Docker's patterns are anchored at the top.
    patterns = [re.sub(r"^(!?)(?!\*)", r"\1/", line) for line in lines if line and not line.startswith("#")]
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", patterns)
    return [path for path in paths or repository_files() if not ignored.match_file(path)]


def repository_files() -> list[str]:
    """Every file that git has or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if (ROOT / path).is_file()]


def test_every_instruction_is_one_that_docker_knows():
    assert {name for name, _ in instructions()} <= BUILDS_ON
    assert values("FROM") == [
        "python:${PYTHON_VERSION}-slim-bookworm AS wheel",
        "python:${PYTHON_VERSION}-slim-bookworm",
    ]


@pytest.mark.parametrize("command", values("RUN"))
def test_shell_commands_can_be_parsed(command):
    subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_is_copied_is_there_and_given_to_the_build():
    given = given_to_the_build()
    for sources, _ in copied():
        for source in sources:
            assert any(path == source or path.startswith(f"{source}/") for path in given), source


def test_the_build_gets_nothing_else():
    sources = [source for names, _ in copied() for source in names]
    for path in given_to_the_build():
        assert any(path == source or path.startswith(f"{source}/") for source in sources), path
    assert not [path for path in given_to_the_build() if path.startswith(("tests/", ".git", "cluster/kuberay"))]


def test_what_jobs_left_beside_themselves_is_not_in_the_image():
    left = [
        "jobs/facts.jsonl",
        "jobs/kb/_delta_log/0.json",
        "jobs/env/bin/python",
        "jobs/key.pem",
        "jobs/models/m/x.py",
    ]
    left += ["cluster/train/out/state.json", "cluster/train/model.safetensors", "cluster/deepspeed/checkpoint/latest"]
    assert not given_to_the_build(left)
    files = [path for path in repository_files() if path.startswith(("jobs/", "cluster/train/", "cluster/deepspeed/"))]
    assert given_to_the_build(files) == files


def test_the_image_has_every_extra_that_a_cluster_uses():
    (install,) = [value for value in values("RUN") if "kblam_ray-*.whl" in value]
    found = re.search(r"\.whl\)\[([\w,]+)\]", install)
    assert found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].keys()
    # `model` is part of `local`; the rest is for people: drawing, the demo's facts, development.
    assert set(found[1].split(",")) == extras - {"model", "plot", "demo", "all", "dev"}
    assert "--constraint" in install


def test_jobs_and_settings_lie_where_commands_look_for_them():
    targets = {target: sources for sources, target in copied() if target.startswith(IN_IMAGE)}
    for folder in ("jobs", "cluster/train", "cluster/deepspeed"):
        assert targets[f"{IN_IMAGE}{folder}"] == [folder]


def test_the_user_is_the_one_that_pods_run_as():
    (user,) = values("USER")
    ids = {
        value for manifest in kubernetes() for path, value in walk(manifest.content) if path and path[-1] == "runAsUser"
    }
    assert user == ":".join([str(one) for one in ids] * 2)
    assert any(f"useradd --uid {user.partition(':')[0]} " in value for value in values("RUN"))


def test_programs_that_operators_call_are_installed():
    (system,) = [value for value in values("RUN") if "apt-get install" in value]
    entrypoint: list[Any] = json.loads(values("ENTRYPOINT")[0])
    # KubeRay's probes and the launcher's copies.
    assert {"wget", "rsync", entrypoint[0]} <= set(system.split())


def test_commands_that_build_can_be_run_as_they_stand():
    """A comment's lines, as the guide's, may be copied: an index is an address, every argument is one of the file's."""
    texts = [(CLUSTER / name).read_text(encoding="utf-8") for name in ("Dockerfile", "README.md")]
    commands = [
        shlex.split(command)
        for text in texts
        for command in re.findall(r"^(?:# +)?(docker build .*)$", re.sub(r"\\\n#? *", "", text), re.MULTILINE)
    ]
    assert len(commands) == 4
    arguments = {name.partition("=")[0] for name in values("ARG")}
    for command in commands:
        assert command[-1] == "."
        given = [command[number + 1] for number, word in enumerate(command) if word == "--build-arg"]
        assert bool(given) is any(word.endswith("-cpu") for word in command)
        for name, _, value in (one.partition("=") for one in given):
            assert name in arguments
            assert value.startswith("https://")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built and installed from what the build gets as the Dockerfile does, and its own copy of the jobs."""
    folder = tmp_path_factory.mktemp("image")
    for path in given_to_the_build():
        (folder / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / "src" / path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Without isolation and dependencies: nothing is fetched.
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "wheels"), str(folder / "src")]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = (folder / "wheels").glob("kblam_ray-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True)
    (folder / "src" / "jobs").rename(folder / "jobs")
    return target, folder / "jobs"


@pytest.mark.slow
def test_a_job_runs_from_the_wheel_in_another_folder(installed, tmp_path):
    site, jobs = installed
    (tmp_path / "facts.jsonl").write_text('{"entity": "Ur", "property": "founder", "value": "nobody knows"}\n')
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import kblam_ray; print(kblam_ray.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    done = subprocess.run(
        [sys.executable, str(jobs / "embed_kb.py"), "--kb", "kb", "--input", "facts.jsonl", "--encoder", "hashing"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, summary["ok"], summary["num_facts"]) == (0, True, 1), done.stderr
    # Everything that the package reads beside its code is in the wheel.
    source = jobs.parent / "src"
    for path in (source / "kblam_ray").rglob("*"):
        assert (site / path.relative_to(source)).exists(), path
