"""The jobs under `ray job submit`, against a head on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.facts import write_facts
from tests.jobs.running import ROOT

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(port: int, head: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert head.poll() is None, "the head ended"
        assert time.monotonic() < deadline, "the head does not listen"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment that leads `ray job submit` to a head of its own, ended by signal: `ray stop` is host-wide."""
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
            wait_for(dashboard_port, head)
            yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def submit(cluster: dict[str, str], *entrypoint: str) -> tuple[int, dict, str]:
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *entrypoint]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        # A head listens before the agent that runs its jobs is up.
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    summaries = [line for line in done.stdout.splitlines() if line.startswith('{"job"')]
    assert summaries, done.stdout + done.stderr
    return done.returncode, json.loads(summaries[-1]), done.stdout


def test_embed_runs_unchanged_under_ray_job_submit(cluster, tmp_path):
    source, kb = str(tmp_path / "facts.jsonl"), str(tmp_path / "kb")
    write_facts((Fact(f"entity {n}", "code", str(n)) for n in range(300)), source)
    arguments = ["--kb", kb, "--input", source, "--encoder", "hashing", "--num-workers", "2"]
    code, summary, logs = submit(cluster, "python", "jobs/embed_kb.py", *arguments)
    assert (code, summary["ok"], summary["num_facts"]) == (0, True, 300), logs
    assert KnowledgeBase.open(kb).num_facts == 300

    code, summary, _ = submit(cluster, "python", "jobs/embed_kb.py", "--kb", kb, "--input", "nowhere.jsonl")
    assert code == 1
    assert (summary["ok"], summary["error"]["code"]) == (False, "bad_input")
