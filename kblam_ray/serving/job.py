"""Serve knowledge bases until told to stop: checks first, then Ray, Serve and the application, then a graceful end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import InputError, UnavailableError
from kblam_ray.ray_session import start_ray
from kblam_ray.serving.deployments.application import build
from kblam_ray.serving.deployments.running import drained, require_running, running
from kblam_ray.serving.deployments.tables import tables_of
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.settings import ServeSettings
from kblam_ray.table.knowledge_base import KnowledgeBase

ANSWER_S = 60.0
"""Longest time from a running application to its first answer at the address."""

LOOK_S = 5.0
"""How often the application is looked at while the job waits to be stopped."""

CLUSTER_PATIENCE_S = 1.0
"""How long a job on a cluster waits before it leaves the end to Serve: `ray job stop` kills after three seconds."""


def serve(settings: ServeSettings) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT, then finish what runs; the work of `jobs/serve.py`.

    Returns:
        `address`; `requests`, as many as were answered; `unfinished`, as many as the drain cut off; `knowledge_bases`:
        what was served at the end, by name.

    Raises:
        InputError: settings, keys, a table or a port that cannot be used; nothing has been started.
        StorageError: a table's store does not answer.
        RayStartError, UnavailableError: Ray or the application does not start, or has gone.
    """
    Keys.from_environment().check_host(settings.host)
    tables = tables_of(settings.kb)
    for spec in tables.values():
        KnowledgeBase.open(spec.uri)
    is_local = not os.environ.get("RAY_ADDRESS")
    if is_local:
        _require_free(settings.host, settings.port)
    settings = _with_absolute_places(settings, is_local)
    application = build(settings)
    _say("starting Ray and the replicas")
    start_ray()
    address = _address(settings)
    with running(application, settings) as handle:
        _wait_until_it_answers(address)
        _say(f"serving {', '.join(sorted(tables)) or 'no knowledge base yet'} at {address}/ until Ctrl-C or SIGTERM")
        with _stop_signals() as stop:
            while not stop.wait(LOOK_S):
                require_running(settings.app_name)
        _say(f"stopping: what runs has {settings.limits.drain_timeout_s:g} s to finish")
        served = drained(
            settings.app_name,
            handle,
            settings.limits.drain_timeout_s,
            delete_after_s=None if is_local else CLUSTER_PATIENCE_S,
        )
    return {"address": address, **served}


def _with_absolute_places(settings: ServeSettings, is_local: bool) -> ServeSettings:
    """Places that mean the same in other processes, whatever folder they work in."""
    changed: dict[str, Any] = {"kb": [f"{name}={spec.uri}" for name, spec in tables_of(settings.kb).items()]}
    if settings.state_uri is not None:
        changed["state_uri"] = storage.normalize(settings.state_uri)
    if is_local:  # on a cluster, every process has its own copy of the job's folder
        for name in ("base_model", "adapter", "bundle"):
            place = getattr(settings, name)
            if place is not None and Path(place).is_dir():
                changed[name] = str(Path(place).absolute())
    return settings.model_copy(update=changed)


def _require_free(host: str, port: int) -> None:
    """Raises InputError if nothing can listen there. Serve's proxies share ports, and would take half the requests."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
    except OSError as error:
        raise InputError(
            f"nothing can listen at this address: {error.strerror or error}",
            where=f"--host {host} --port {port}",
            help="stop what listens there, or choose another port",
        ) from None


def _address(settings: ServeSettings) -> str:
    # What listens everywhere is called on loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _wait_until_it_answers(address: str) -> None:
    """Return when questions are answered there.

    Raises:
        UnavailableError: not in time.
    """
    deadline = time.monotonic() + ANSWER_S
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError as error:  # refused, 503 while the replicas report, out of time
            last = error
        time.sleep(0.1)
    raise UnavailableError(
        f"the application runs, but does not answer here: {last}",
        where=address,
        help="if Serve ran on this cluster before, it keeps its own host and port: give those",
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. After the block a second SIGTERM changes nothing; Ctrl-C ends at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    on_interrupt = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def _say(text: str) -> None:
    print(f"serve: {text}", file=sys.stderr, flush=True)
