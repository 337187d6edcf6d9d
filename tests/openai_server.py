"""A server on loopback that speaks OpenAI's embeddings protocol, over real sockets, with scripted faults.

Embeddings are a function of the text alone, so that a test can say which text a vector belongs to. Faults are
taken from a queue, one per request, before the request is answered; a request without one is answered well.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np

KEY = "sk-test"
DIMS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}

Kind = Literal[
    "status",
    "drop",
    "drop_midway",
    "cut_json",
    "shuffle",
    "missing",
    "doubled_index",
    "not_finite",
    "wrong_dim",
    "stall",
]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    `status` answers with `status`, `headers` and OpenAI's error body; the others answer as their name says.
    """

    kind: Kind
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    message: str = "scripted"


def rate_limited(retry_after: str | None = None) -> Fault:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Fault("status", 429, headers, "rate_limit_exceeded", "Rate limit reached")


def server_error(status: int = 500) -> Fault:
    return Fault("status", status)


def no_quota() -> Fault:
    return Fault("status", 429, {}, "insufficient_quota", "You exceeded your current quota")


def vector_of(text: str, dim: int) -> np.ndarray:
    """The embedding of a text: float32 [P], of length 1."""
    seed = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")
    vector_P = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return vector_P / np.linalg.norm(vector_P)


class OpenAIServer:
    """The server; `with OpenAIServer() as server:` runs it.

    Attributes:
        faults: what to do to the next requests, first come first served.
        always: a fault for every request without one from the queue.
        answered: how often each text was in an answer that was sent whole.
        requests: the bodies of all requests, failed ones too.
        headers: the headers of all requests.
        paths: the paths of all requests.
        max_text_tokens: words in a text beyond which the server refuses, as the real one does by tokens.
        tells_count: whether that refusal says how many tokens there were.
        release: what `stall` waits for.
    """

    def __init__(self) -> None:
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.answered: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.max_text_tokens = 8192
        self.tells_count = True
        self.release = threading.Event()
        self.lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def base_url(self) -> str:
        """What OPENAI_BASE_URL is to be; Azure's endpoint is `address`."""
        return f"{self.address}/v1"

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: OpenAIServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a test reads `requests`."""

    def do_POST(self) -> None:
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.requests.append(body)
            owner.headers.append({name.lower(): value for name, value in self.headers.items()})
            owner.paths.append(self.path)
            fault = owner.faults.popleft() if owner.faults else owner.always
        if KEY not in (self.headers.get("api-key"), (self.headers.get("Authorization") or "").removeprefix("Bearer ")):
            return self._fail(401, "invalid_api_key", "Incorrect API key provided")
        if fault is not None and fault.kind == "status":
            return self._fail(fault.status, fault.code, fault.message, fault.headers)
        if fault is not None and fault.kind == "stall":
            owner.release.wait()
            return self._hang_up()
        if fault is not None and fault.kind == "drop":
            return self._hang_up()
        texts = body["input"]
        if body["model"] not in DIMS:
            return self._fail(404, "model_not_found", f"The model {body['model']} does not exist")
        if not all(isinstance(text, str) and text for text in texts) or len(texts) > 2048:
            return self._fail(400, None, "'$.input' is invalid.")
        longest = max(len(text.split()) for text in texts)
        if longest > owner.max_text_tokens:
            limit = f"This model's maximum context length is {owner.max_text_tokens} tokens"
            return self._fail(
                400, None, f"{limit}, however you requested {longest} tokens." if owner.tells_count else limit
            )
        return self._answer(body, texts, fault.kind if fault else None)

    def _answer(self, body: dict[str, Any], texts: list[str], fault: str | None) -> None:
        owner = self.server.owner
        dim = body.get("dimensions", DIMS[body["model"]])
        data = []
        for index, text in enumerate(texts):
            vector_P = vector_of(text, dim - 1 if fault == "wrong_dim" else dim)
            if fault == "not_finite":
                vector_P[0] = np.nan
            numbers: Any = base64.b64encode(vector_P.astype("<f4").tobytes()).decode()
            if body.get("encoding_format") != "base64":
                numbers = vector_P.tolist()
            data.append(
                {"object": "embedding", "index": 0 if fault == "doubled_index" else index, "embedding": numbers}
            )
        if fault == "shuffle":
            data.reverse()
        if fault == "missing":
            data = data[::2]
        tokens = sum(len(text.split()) for text in texts)
        answer = {
            "object": "list",
            "data": data,
            "model": body["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        payload = json.dumps(answer).encode()
        if fault == "cut_json":
            payload = payload[: len(payload) // 2]
        if fault in (None, "shuffle", "missing"):
            with owner.lock:
                owner.answered.update(texts[item["index"]] for item in data)
        self._send(200, payload, {}, cut=fault == "drop_midway")

    def _fail(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": code or "invalid_request_error", "param": None, "code": code}
        self._send(status, json.dumps({"error": error}).encode(), headers or {})

    def _send(self, status: int, payload: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut:
            self.wfile.write(payload[: len(payload) // 2])
            return self._hang_up()
        self.wfile.write(payload)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
