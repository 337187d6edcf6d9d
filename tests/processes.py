"""Ports and processes of this machine: free ports, waiting until somebody listens, ending a process with its kin."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import ExitStack, closing, suppress
from typing import Any

import psutil

START_S = 120


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def free_port() -> int:
    return free_ports(1)[0]


def wait_for_port(port: int, process: subprocess.Popen[Any]) -> None:
    """Until a process listens; it is a failure if it ends before, or takes too long."""
    deadline = time.monotonic() + START_S
    while True:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} does not listen"
        time.sleep(0.1)


def kill_tree(process: subprocess.Popen[Any]) -> int:
    """SIGKILL a process and all that it started; returns how many there were."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in found:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(found, timeout=20)
    return 1 + len(found)
