"""The real server as a user runs it: `jobs/serve.py` in a process of its own, found and hurt by its processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from tests.processes import free_port

ROOT = Path(__file__).parents[2]
MODEL = "kblam-demo"
START_S = 200
"""A machine that others use, too, takes minutes."""

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, timeout_s: float = 60) -> T:
    """What `look` gives as soon as it gives something; it may fail to reach a server meanwhile."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not in {timeout_s} s: {what}")


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.address = process, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.address, timeout=90)

    def ask(self, question: str, kb: str = "capitals", **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=question_body(question, kb, **body))

    def health(self) -> dict[str, Any]:
        return dict(self.http.get("/health").json())

    def kb(self, name: str = "capitals") -> dict[str, Any]:
        return dict(self.http.get(f"/v1/knowledge_bases/{name}").json())

    def processes(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas; the names of those that work or start have more behind."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = process.cmdline()[0]
            except (psutil.Error, IndexError):
                continue
            if title.startswith("ray::ServeReplica:") and title.split(":")[4].split(".")[0] == deployment:
                found.append(process)
        return found

    def samples(self, metric: str, role: str) -> dict[str, float]:
        """A metric of all processes of a role, by process."""
        found: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{metric}{{") and f'process="{role}-' in line:
                process = line.partition('process="')[2].partition('"')[0]
                found[process] = found.get(process, 0) + float(line.rpartition(" ")[2])
        return found

    def stop(self, timeout_s: float = 90) -> dict[str, Any]:
        """Take it down as a scheduler does; its summary."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        assert stdout.strip(), stderr
        return {"returncode": self.process.returncode, **json.loads(stdout.splitlines()[-1])}


def question_body(question: str, kb: str = "capitals", **body: Any) -> dict[str, Any]:
    return {"model": f"{MODEL}:{kb}", "messages": [{"role": "user", "content": question}], **body}


def start_server(*flags: str, **environment: str) -> Server:
    """A server that was started; `wait_until_ready` says when it answers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return Server(process, port)


def wait_until_ready(server: Server, num_replicas: int = 1) -> None:
    def is_ready() -> bool:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended: {server.process.communicate()}")
        try:
            return server.health()["replicas"] == num_replicas
        except ValueError:  # Serve's proxy answers before the gateway does
            return False

    eventually(is_ready, "a server that answers", START_S)


@contextmanager
def running_server(*flags: str, num_replicas: int = 1, **environment: str) -> Iterator[Server]:
    server = start_server(*flags, **environment)
    try:
        wait_until_ready(server, num_replicas)
        yield server
    finally:
        server.http.close()
        if server.process.poll() is None:
            server.stop()


class Gate:
    """A TCP proxy on loopback that can be shut: what is behind it seems to be down."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target = ("127.0.0.1", target_port)
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Let everything through."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse new connections and end those that there are."""
        assert self._listener is not None
        for one in (self._listener, *self._connections):
            # Closing alone does not wake a thread that waits in it.
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self._connections |= {client, server}
            for here, there in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(here, there), daemon=True).start()

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                there.sendall(data)
        for one in (here, there):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._connections -= {here, there}
