"""A cluster of several Ray nodes and an S3 endpoint, all processes of this machine that can be hurt and replaced."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.processes import START_S, free_port, kill_tree, wait_for_port
from tests.serving.serve_samples import Gate

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def ray_environment() -> dict[str, str]:
    """The environment of a cluster of its own on this machine, whatever else runs here."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_enable_worker_prestart": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    return environment


def ray_start(*flags: str) -> list[str]:
    """The command that starts a node on ports of its own, and stays until it is ended."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
    command += ["--include-log-monitor=false", *flags]
    if "--head" in flags:
        command += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
    return command


class Endpoint:
    """The S3 endpoint, and a door in front of it that can be shut.

    Args:
        journal: the file that the endpoint keeps, from one process of it to the next.

    Attributes:
        address: of the door, for all that is tested.
        direct: of the endpoint itself, for who sets up and checks.
    """

    def __init__(self, journal: Path) -> None:
        self._port, self._journal = free_port(), journal
        self._hurting = threading.Lock()
        self.direct = f"http://127.0.0.1:{self._port}"
        self.process = self._start()
        self._gate = Gate(self._port)
        self.address = f"http://127.0.0.1:{self._gate.port}"
        self._gate.open()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "endpoint.py"), str(self._port), str(self._journal)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_port(self._port, process)
        return process

    def kill(self, seconds: float) -> None:
        """SIGKILL it, whatever it is doing, and start it again after a while with what it had answered for."""
        with self._hurting:
            self.process.kill()
            self.process.wait()
            self._gate.shut()
            time.sleep(seconds)
            self.process = self._start()
            self._gate.open()

    def cut(self, seconds: float) -> None:
        """Break all connections, whatever is on its way in them, and take none for a while.

        The next commit after that breaks off, too, done or not: by chance alone this comes about once in a hundred.
        """
        with self._hurting:
            self.process.send_signal(signal.SIGUSR1)
            self._gate.shut()
            time.sleep(seconds)
            self._gate.open()

    def pause(self, seconds: float) -> None:
        """Stand still for a while: requests are taken and not answered."""
        with self._hurting:
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.process.send_signal(signal.SIGCONT)

    def client(self) -> Any:
        """A boto3 client that goes past the door."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.direct,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def stop(self) -> None:
        with self._hurting:
            self._gate.shut()
            kill_tree(self.process)


class Cluster:
    """A head without work for others, and nodes that come and go; stopped by the ids of its own processes.

    Args:
        num_nodes: nodes beside the head.
        num_cpus: logical CPUs of each.
    """

    def __init__(self, num_nodes: int = 2, num_cpus: int = 2) -> None:
        self._num_cpus = num_cpus
        self._changing = threading.RLock()
        self._is_stopped = False
        self.nodes: list[subprocess.Popen[bytes]] = []
        # Ray's sockets lie below it, and a socket's path must be short.
        self.home = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.endpoint = Endpoint(self.home / "objects")
        self.environment = {
            **ray_environment(),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "10",
            "AWS_ENDPOINT_URL": self.endpoint.address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.head = self._start(f"--port={self._port}", "--head", "--num-cpus=1", f"--temp-dir={self.home}")
        try:
            wait_for_port(self._port, self.head)
            for _ in range(num_nodes):
                self.add_node()
        except BaseException:
            self.stop()
            raise

    @property
    def driver_environment(self) -> dict[str, str]:
        """For a program that works on the cluster."""
        return {**self.environment, "RAY_ADDRESS": self.address}

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        command = ray_start("--object-store-memory=120000000", "--min-worker-port=0", "--max-worker-port=0", *flags)
        with (self.home / f"node-{len(list(self.home.glob('node-*')))}.log").open("wb") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def add_node(self) -> None:
        """Another node; work goes to it when it has joined. None when the cluster is being stopped."""
        with self._changing:
            if not self._is_stopped:
                self.nodes.append(self._start(f"--address={self.address}", f"--num-cpus={self._num_cpus}"))

    def kill_node(self, number: int) -> str:
        """SIGKILL a node with all its processes, and start another in its place."""
        with self._changing:
            self.nodes = [node for node in self.nodes if node.poll() is None]
            if self._is_stopped or not self.nodes:
                return ""
            node = self.nodes.pop(number % len(self.nodes))
            count = kill_tree(node)
            self.add_node()
        return f"a node and its {count} processes"

    def workers(self) -> list[tuple[psutil.Process, str]]:
        """The processes that work for somebody now, with what they call themselves."""
        found = []
        for node in (self.head, *self.nodes):
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(node.pid).children(recursive=True):
                    with suppress(psutil.Error, IndexError):
                        title = child.cmdline()[0]
                        if title.startswith("ray::") and not title.startswith("ray::IDLE"):
                            found.append((child, title.removeprefix("ray::")))
        return sorted(found, key=lambda one: one[0].pid)

    def kill_worker(self, generator: random.Random, wanted: str, over: threading.Event) -> str:
        """SIGKILL one of the workers whose title holds `wanted`, waiting for one to be there until all is over."""
        # The next job may take long to start its workers.
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and not over.is_set():
            if found := [one for one in self.workers() if wanted in one[1]]:
                process, title = generator.choice(found)
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    return f"worker {title[:60]}"
            time.sleep(0.05)
        return ""

    def mend(self) -> None:
        """Start again what has ended, so that the next run finds a whole cluster."""
        assert self.head.poll() is None, "the head ended"
        with self._changing:
            for node in [node for node in self.nodes if node.poll() is not None]:
                self.nodes.remove(node)
                self.add_node()

    def stop(self, keep: Path | None = None) -> None:
        """End all of it and forget its files, but for the logs of Ray and of servers, if a folder for them is given."""
        with self._changing:
            self._is_stopped = True
            for node in (*self.nodes, self.head):
                kill_tree(node)
        self.endpoint.stop()
        for logs in self.home.glob("session_2*/logs") if keep else ():
            shutil.copytree(logs, keep / f"ray-{self._port}", symlinks=True, dirs_exist_ok=True)
        for log in self.home.glob("server-*.err") if keep else ():
            shutil.copy(log, keep)
        shutil.rmtree(self.home, ignore_errors=True)
