"""`ray job submit` against a head of its own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.running import ROOT
from tests.processes import free_ports, kill_tree, wait_for_port

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment that leads `ray job submit` to a head of its own, ended with its processes; `ray stop` is for all."""
    home = tmp_path_factory.mktemp("head")
    gcs_port, dashboard_port, client_port, agent_port = free_ports(4)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",  # the head listens on all interfaces
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
    }
    environment.pop("RAY_ADDRESS", None)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=300000000"]
    command += [f"--port={gcs_port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
    # The agent runs the jobs; another Ray on this host holds the port that it would take by default.
    command += [f"--dashboard-agent-listen-port={agent_port}"]
    with (home / "log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_port(dashboard_port, head)
            yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
        finally:
            # Asked to end, it takes half a minute.
            kill_tree(head)


def ray_job(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job` with these arguments, in the repository."""
    command = [str(BIN / "ray"), "job", *arguments]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
        # A head listens before the agent that runs its jobs is up.
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(0.5)


def submit(cluster: dict[str, str], *entrypoint: str) -> tuple[int, dict, str]:
    """Exit code, summary and output of a job that is submitted with the repository as its working directory."""
    done = ray_job(cluster, "submit", "--working-dir", ".", "--", *entrypoint)
    summaries = [line for line in done.stdout.splitlines() if line.startswith('{"job"')]
    assert summaries, done.stdout + done.stderr
    return done.returncode, json.loads(summaries[-1]), done.stdout
