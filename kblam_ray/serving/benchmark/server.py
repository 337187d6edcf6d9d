"""A server of its own for a benchmark: `jobs/serve.py`'s work in a process of its own, taken down at the end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kblam_ray.errors import UnavailableError

START_S = 300

_PROGRAM = """
from kblam_ray.job import main
from kblam_ray.serving.job import serve
from kblam_ray.serving.settings import ServeSettings
main("serve", ServeSettings, serve)
"""


@contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """The address of a server that answers, with these flags of `jobs/serve.py` and a free port.

    Raises:
        UnavailableError: it ended, or does not answer in time.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", _PROGRAM, *flags, "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield _when_it_answers(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


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
