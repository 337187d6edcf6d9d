"""An S3 endpoint in a process of its own: `python endpoint.py PORT`; one request that changes something at a time.

A real store never keeps half of an upload and decides one by one who is first with a conditional put. The server that
stands in for it here does neither by itself, so both are seen to before a request reaches it.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any


class OneAtATime:
    """A WSGI application in front of another: bodies are read whole, and changes wait for each other."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._changing = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._application(environ, start_response)
        announced = environ.get("CONTENT_LENGTH")
        is_chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "")
        try:
            # Without either there is no body, and reading would wait for the client's next request.
            body = environ["wsgi.input"].read(int(announced or -1)) if announced or is_chunked else b""
        except OSError:
            body = b""
        if announced and len(body) < int(announced):
            start_response("400 Bad Request", [("Content-Length", "0")])
            return [b""]
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        with self._changing:
            return self._application(environ, start_response)


def main(port: int) -> None:
    """Serve on loopback until the process ends."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # one connection, and one thread, for many requests
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
