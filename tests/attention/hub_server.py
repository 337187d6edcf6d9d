"""A server on loopback that answers like the Hugging Face hub, as far as downloads of small files go."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `repositories` (name -> file name -> bytes) and notes the paths `asked` for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._refuse(403, "Forbidden")

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        else:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _describe(self, name: str, rest: list[str]) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            return self._refuse(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if rest[:1] == ["tree"]:
            return self._send_json(
                [{"type": "file", "path": path, "size": len(data), "oid": _tag(data)} for path, data in files.items()]
            )
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        return self._send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def _send_file(self, name: str, revision: str, path: str) -> None:
        data = self.hub.repositories.get(name, {}).get(path)
        if data is None or revision not in ("main", COMMIT):
            return self._refuse(404, "EntryNotFound")
        return self._send(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{_tag(data)}"'})

    def _send_json(self, answer: Any) -> None:
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code, "Content-Type": "application/json"}, status)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
