"""On what a sweep ran, as its summary says."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

import pytest

import kblam_ray
from kblam_ray.evaluation.sweep import environment as module
from kblam_ray.evaluation.sweep.environment import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", folder, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source tree of its own."""
    (tmp_path / "kblam_ray").mkdir()
    (tmp_path / "kblam_ray" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(module, "_SOURCE", tmp_path)
    return tmp_path


def test_versions_and_machine(source):
    found = environment()
    assert found["version"] == kblam_ray.__version__
    assert found["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"\d+ cores? of .+, \d+ GB, .+", found["machine"])
    # What is no checkout has no commit.
    assert (found["commit"], found["is_changed"]) == (None, None)


def test_the_commit_and_whether_files_differ_from_it(source):
    git(source, "init", "-q")
    assert environment()["commit"] is None
    git(source, "add", "kblam_ray")
    git(source, "commit", "-q", "-m", "first")
    found = environment()
    assert (found["commit"], found["is_changed"]) == (git(source, "rev-parse", "HEAD"), False)
    (source / "notes.txt").write_text("what is no part of the code does not count")
    assert environment()["is_changed"] is False
    (source / "kblam_ray" / "a.py").write_text("a = 2\n")
    assert environment()["is_changed"] is True
