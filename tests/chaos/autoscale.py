"""A backlog on a cluster that grows and shrinks: `python -m tests.chaos.autoscale --facts 200000 --output nodes.json`.

Ray's own autoscaler with its provider of pretended machines: every node is a raylet of this machine that the
autoscaler starts and ends. Nodes come for the backlog, its workers run on all of them, nodes go; the table is exact.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from kblam_ray import KnowledgeBase
from kblam_ray.errors import TableNotFoundError
from tests.chaos.cluster import ROOT, ray_environment, ray_start
from tests.processes import START_S, free_port, kill_tree, wait_for_port

IDLE_MINUTES = 0.1
NODE_CPUS = 2
MOST_S = 600
WORTH_NAMING = 0.2
"""A node worked if its workers used such a share of the busiest node's seconds: starting is not working."""


def cluster_config(gcs_address: str, most_nodes: int) -> dict[str, Any]:
    """What the autoscaler is told: a head that takes no workers' place, and up to `most_nodes` nodes."""
    worker = {"resources": {"CPU": NODE_CPUS, "object_store_memory": 120_000_000}, "node_config": {}}
    commands = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        **{f"{when}_commands": [] for when in commands},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "cluster_name": "pretended",
        "max_workers": most_nodes,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "launch_multiple": True,
            "use_node_id_as_ip": True,  # all of them have the address of this machine
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "encoder": {**worker, "min_workers": 0, "max_workers": most_nodes},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }


def start_head(home: Path, most_nodes: int) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """A head with the autoscaler, and the environment of a job on it."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    (home / "cluster.json").write_text(json.dumps(cluster_config(address, most_nodes)))
    environment = ray_environment()
    command = ray_start("--head", f"--port={port}", "--num-cpus=1", "--object-store-memory=300000000")
    command += [f"--autoscaling-config={home / 'cluster.json'}", f"--temp-dir={home / 'ray'}"]
    # Only the first version of the autoscaler has a provider of pretended machines.
    pretended = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0"}
    with (home / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env={**environment, **pretended}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_port(port, head)
        deadline = time.monotonic() + START_S
        while not look(head):
            assert time.monotonic() < deadline, "the head's raylet does not come up"
            time.sleep(0.1)
    except BaseException:
        kill_tree(head)
        raise
    return head, {**environment, "RAY_ADDRESS": address}


def look(head: subprocess.Popen[bytes]) -> dict[int, float]:
    """Seconds of CPU that the job's workers of each node have used by now, by the node's raylet; 0: none works yet."""
    found: dict[int, float] = {}
    workers: list[tuple[int, float]] = []
    for process in psutil.Process(head.pid).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(process.pid, 0.0)
            elif process.cmdline()[0].startswith("ray::Map"):
                times = process.cpu_times()
                workers.append((process.ppid(), times.user + times.system))
    for raylet, seconds in workers:
        if raylet in found:
            found[raylet] += seconds
    return found


def value_of(at: int) -> str:
    """Some 500 letters: of short texts a single worker embeds all before the autoscaler has started a node."""
    return f"value {at}: " + ", ".join(f"entry {(at + 1) * number % 9_973} of part {number}" for number in range(1, 21))


def write_facts(folder: Path, num_facts: int, num_files: int) -> None:
    """Facts whose names and values all differ, spread over files."""
    folder.mkdir()
    for number in range(num_files):
        with (folder / f"{number:03}.jsonl").open("w", encoding="utf-8") as file:
            for at in range(number, num_facts, num_files):
                file.write(json.dumps({"entity": f"thing {at}", "property": "code", "value": value_of(at)}) + "\n")


def is_exact(kb: str, num_facts: int) -> bool:
    facts = KnowledgeBase.open(kb).snapshot().facts
    found = set(zip(facts["entity"].to_pylist(), facts["value"].to_pylist(), strict=True))
    return len(facts) == num_facts and found == {(f"thing {at}", value_of(at)) for at in range(num_facts)}


def run(num_facts: int, most_nodes: int, home: Path) -> dict[str, Any]:
    """Watch a folder in which a backlog appears; what was seen of nodes and work, second by second, and of the table.

    The job goes on watching until the last node is gone, so it is the end of the work that lets them go, not the job's.
    """
    (home / "in").mkdir()
    head, environment = start_head(home, most_nodes)
    kb = str(home / "kb")
    command = [sys.executable, str(ROOT / "jobs" / "refresh_kb.py"), "--kb", kb, "--input", str(home / "in")]
    command += ["--encoder", "hashing:64", "--num-workers", str(NODE_CPUS * most_nodes)]
    timeline: list[tuple[float, int, int]] = []
    cpu_s: dict[int, float] = {}
    job = None
    try:
        with (home / "job.out").open("wb") as out, (home / "job.err").open("wb") as err:
            job = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        time.sleep(5)
        nodes_before = len(look(head))
        write_facts(home / "backlog", num_facts, 20)
        time.sleep(1)  # so that all of them have stood still when they appear, and are one backlog
        (home / "backlog").rename(home / "in" / "backlog")
        began = time.monotonic()
        served_s = None
        while (now_s := time.monotonic() - began) < MOST_S:
            nodes = look(head)
            cpu_s.update({raylet: max(seconds, cpu_s.get(raylet, 0.0)) for raylet, seconds in nodes.items()})
            timeline.append((round(now_s, 1), len(nodes), sum(seconds > 0 for seconds in nodes.values())))
            if served_s is None and num_facts_of(kb) >= num_facts:
                served_s = now_s
            if job.poll() is not None or (served_s is not None and len(nodes) <= 1):
                break
            time.sleep(1)
        is_watching = job.poll() is None
        job.terminate()
        job.wait(60)
    finally:
        if job is not None and job.poll() is None:
            kill_tree(job)
        kill_tree(head)
    lines = (home / "job.out").read_text(encoding="utf-8").splitlines()
    return {
        "facts": num_facts,
        "exact": is_exact(kb, num_facts),
        "job": json.loads(lines[-1]) if lines else {"error": (home / "job.err").read_text(encoding="utf-8")[-2_000:]},
        "committed_s": served_s and round(served_s, 1),
        "gone_s": timeline[-1][0],
        "is_watching_when_gone": is_watching,
        "nodes": {"before": nodes_before, "most": max(nodes for _, nodes, _ in timeline), "after": timeline[-1][1]},
        "nodes_that_worked": sum(seconds > WORTH_NAMING * max(cpu_s.values()) for seconds in cpu_s.values()),
        "cpu_s_of_nodes": [round(seconds, 1) for seconds in cpu_s.values()],
        "timeline": timeline,
    }


def num_facts_of(kb: str) -> int:
    """How many facts a table has; 0: there is none."""
    try:
        return KnowledgeBase.open(kb).num_facts
    except TableNotFoundError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=200_000)
    parser.add_argument("--nodes", type=int, default=3, help="most nodes beside the head")
    parser.add_argument("--output", type=Path, help="a file for the whole report")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    home = Path(tempfile.mkdtemp(prefix="grow-"))
    try:
        report = run(asked.facts, asked.nodes, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if asked.output:
        asked.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "timeline"}))
    nodes = report["nodes"]
    has_scaled = nodes["most"] > nodes["before"] == nodes["after"] == 1 and report["nodes_that_worked"] > 1
    return 0 if report["exact"] and has_scaled and report["is_watching_when_gone"] else 1


if __name__ == "__main__":
    sys.exit(main())
