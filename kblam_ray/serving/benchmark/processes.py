"""Jobs in processes of their own for a benchmark, a server or a refresh, taken down at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import psutil

from kblam_ray.errors import UnavailableError

START_S = 300

_PROGRAMS = {
    "serve": """
from kblam_ray.job import main
from kblam_ray.serving.job import serve
from kblam_ray.serving.settings import ServeSettings
main("serve", ServeSettings, serve)
""",
    "refresh_kb": """
from kblam_ray.job import main
from kblam_ray.table.refresh.run import refresh
from kblam_ray.table.refresh.settings import RefreshSettings
main("refresh_kb", RefreshSettings, refresh)
""",
}
"""What the scripts in `jobs/` hold, which an installed package does not have."""


@contextmanager
def running_server(*flags: str, one_core: bool = False) -> Iterator[str]:
    """The address of a server that answers, with these flags of `jobs/serve.py` and a free port.

    Args:
        one_core: the answerers have the first core for themselves, every other process of the server the other ones.

    Raises:
        UnavailableError: it ended, or does not answer in time.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", _PROGRAMS["serve"], *flags, "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            address = _when_it_answers(process, f"http://127.0.0.1:{port}", log)
            if one_core:
                _give_one_core(process.pid)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


@contextmanager
def running_refresh(*flags: str) -> Iterator[None]:
    """`jobs/refresh_kb.py` with these flags, until the block ends.

    Raises:
        UnavailableError: it did not run to the end of the block, or failed.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(_refresh_command(flags), stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield
        finally:
            has_ended = process.poll() is not None
            if not has_ended:
                process.send_signal(signal.SIGTERM)
            process.wait()
        if has_ended or process.returncode:
            raise _refresh_failed(log)


def refresh_once(*flags: str) -> None:
    """`jobs/refresh_kb.py --once` with these flags, to its end.

    Raises:
        UnavailableError: it failed.
    """
    with tempfile.TemporaryFile("w+") as log:
        if subprocess.run([*_refresh_command(flags), "--once"], stdout=subprocess.DEVNULL, stderr=log).returncode:
            raise _refresh_failed(log)


def _refresh_command(flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", _PROGRAMS["refresh_kb"], *flags]


def _refresh_failed(log: TextIO) -> UnavailableError:
    log.seek(0)
    told = log.read()[-2000:]
    return UnavailableError(f"the refresh failed: {told}", where="refresh_kb", help="start it by hand")


def _give_one_core(pid: int) -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            is_answerer = "AnswererDeployment" in " ".join(process.cmdline())
            # Every thread that there is: the library's are older than this call.
            for thread in process.threads():
                os.sched_setaffinity(thread.id, [first] if is_answerer else others or [first])


def get(url: str) -> dict[str, Any]:
    """The JSON at an address."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return dict(json.load(answer))


def _when_it_answers(process: subprocess.Popen[bytes], address: str, log: Any) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            get(f"{address}/health")
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return address
    log.seek(0)
    raise UnavailableError(
        f"the server does not answer: {log.read()[-2000:]}", where=address, help="start it by hand: jobs/serve.py"
    )
