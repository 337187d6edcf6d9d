"""An S3 endpoint that can be killed, in a process of its own: `python endpoint.py PORT JOURNAL`.

A real store never keeps half of an upload, decides one by one who is first with a conditional put, and has what it
acknowledged when it is back. The server that stands in for it here does none of that by itself. So bodies are read
whole before a request reaches it, requests wait for each other, and what a change left behind stands in a journal
before it is answered; the next process begins with that. Multipart uploads that were not finished die with a process.

SIGUSR1 makes it lose the next commit to a table's log: the connection is closed, and whoever asked cannot know whether
it was done before.
"""

from __future__ import annotations

import io
import pickle
import signal
import socket
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

UPLOAD_S = 0.3
"""How long the upload of a table's file goes on after others can see it: its writer can be hit before it commits."""


class Journal:
    """A file of buckets and of objects as each change left them; a last record that was cut off is none.

    Args:
        path: of the file, there or not; what it says is put into the server's memory.
    """

    def __init__(self, path: Path) -> None:
        self._store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                whole = self._replay(file)
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)

    def _replay(self, file: BinaryIO) -> int:
        whole = 0
        while True:
            try:
                bucket, name, kept = pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return whole
            whole = file.tell()
            if bucket not in self._store.buckets:
                self._store.create_bucket(bucket, "us-east-1")
            if name is None:
                continue
            keys = self._store.buckets[bucket].keys
            if name in keys:
                keys.pop(name)
            if kept is not None:
                keys[name] = kept

    def add(self, bucket: str, names: Iterable[str | None]) -> None:
        """Keep what there is now under these names of a bucket; None: that there is the bucket."""
        keys = self._store.buckets[bucket].keys
        for name in names:
            pickle.dump((bucket, name, name and keys.get(name)), self._file)
        # The process is what dies here, not the machine: the operating system's memory will do.
        self._file.flush()


class Careful:
    """A WSGI application in front of another: whole bodies, one request at a time, changes kept before an answer."""

    def __init__(self, application: Callable[..., Iterable[bytes]], journal: Journal) -> None:
        self._application, self._journal = application, journal
        self._one_at_a_time = threading.Lock()
        self._is_to_lose_a_commit, self._num_commits = False, 0

    def lose_a_commit(self) -> None:
        """The next one: it is done and not answered, or it is not done, in turns with the commits before it."""
        self._is_to_lose_a_commit = True

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        announced = environ.get("CONTENT_LENGTH")
        is_chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "")
        try:
            # Without either there is no body, and reading would wait for the client's next request.
            body = environ["wsgi.input"].read(int(announced or -1)) if announced or is_chunked else b""
        except OSError:
            body = None
        if body is None or len(body) < int(announced or 0):
            start_response("400 Bad Request", [("Content-Length", "0")])
            return [b""]
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        told: list[str] = []

        def note(status: str, headers: Any, *rest: Any) -> Any:
            told.append(status)
            return start_response(status, headers, *rest)

        # Reads wait, too: what is not in the journal yet must not be seen.
        with self._one_at_a_time:
            is_lost = self._is_lost(environ)
            if is_lost and self._num_commits % 2 == 0:
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            answer = list(self._application(environ, note))
            if told and told[0].startswith("2"):
                self._keep(environ, body)
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and "/part-" in environ["PATH_INFO"]:
            time.sleep(UPLOAD_S)
        return answer

    def _is_lost(self, environ: dict[str, Any]) -> bool:
        """Whether a request is the commit that is to be lost; its connection is closed then."""
        if not is_commit(environ):
            return False
        self._num_commits += 1
        is_lost, self._is_to_lose_a_commit = self._is_to_lose_a_commit, False
        if is_lost:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return is_lost

    def _keep(self, environ: dict[str, Any], body: bytes) -> None:
        # WSGI gives the bytes of a path as Latin-1.
        path = environ["PATH_INFO"].encode("latin-1").decode()
        bucket, _, name = path.lstrip("/").partition("/")
        match environ["REQUEST_METHOD"], bool(name):
            case (("PUT" | "POST" | "DELETE"), True):
                self._journal.add(bucket, [name])
            case "PUT", False:
                self._journal.add(bucket, [None])
            case "POST", False:  # many deletions in one request
                found = ET.fromstring(body).iter()
                self._journal.add(bucket, [element.text for element in found if element.tag.endswith("Key")])


def is_commit(environ: dict[str, Any]) -> bool:
    """Whether a request makes a version of a table."""
    path = environ["PATH_INFO"]
    return environ["REQUEST_METHOD"] == "PUT" and "/_delta_log/" in path and path.endswith(".json")


def main(port: int, journal: Path) -> None:
    """Serve on loopback until the process ends."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # one connection, and one thread, for many requests
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = Careful(DomainDispatcherApplication(create_backend_app), Journal(journal))
    signal.signal(signal.SIGUSR1, lambda *_: application.lose_a_commit())
    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
