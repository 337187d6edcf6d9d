"""On what a sweep ran: versions, the commit of the source, and the machine in words."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kblam_ray

_SOURCE = Path(kblam_ray.__file__).parents[1]
_GIT_TIMEOUT_S = 20


def environment() -> dict[str, Any]:
    """`version, commit, is_changed, python, torch, transformers, ray, machine`.

    `commit` is null outside of a git checkout, and `is_changed` with it: whether files differ from that commit.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "kblam_ray", "jobs") if commit else None
    return {
        "version": kblam_ray.__version__,
        "commit": commit,
        "is_changed": None if changed is None else bool(changed),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "ray")},
        "machine": machine(),
    }


def machine() -> str:
    """Cores, memory and GPUs in words: `2 cores of AMD EPYC 7B13, 24 GB, no GPU`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    named = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    return f"{cores} core{'s' if cores > 1 else ''} of {_processor()}, {memory_gb} GB, {named}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the source tree; None where there is no git or no checkout of this package."""
    if not (_SOURCE / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_SOURCE), *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
