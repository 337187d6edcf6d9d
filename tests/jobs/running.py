"""Run a job as a user does: its own process, its exit code, its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start_job(name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run_job(name: str, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary (the last line of stdout) and stderr of a job run to its end."""
    job = start_job(name, *arguments, **environment)
    stdout, stderr = job.communicate(timeout=240)
    assert stdout.strip(), stderr
    return job.returncode, json.loads(stdout.splitlines()[-1]), stderr
