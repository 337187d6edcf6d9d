"""Serves the web page: static files beside this module, with the headers that keep foreign scripts out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response

CONTENT_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "conversation.js": "text/javascript; charset=utf-8",
    "editor.js": "text/javascript; charset=utf-8",
    "facts.js": "text/javascript; charset=utf-8",
    "key.js": "text/javascript; charset=utf-8",
    "knowledge.js": "text/javascript; charset=utf-8",
    "parts.js": "text/javascript; charset=utf-8",
    "turn.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The files of the page; nothing else in this folder is served."""

# Trusted Types: the browser itself refuses to make HTML of text, so a fact that holds HTML stays text.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    # A changed page is seen at once; an unchanged one costs a 304.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def mount_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files at `/page/...`, GET and HEAD, outside the OpenAPI schema and without a key.

    Raises:
        FileNotFoundError: the package was installed without the page's files.
    """
    folder = Path(__file__).parent
    for name, content_type in CONTENT_TYPES.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        answer = _file((folder / name).read_bytes(), content_type)
        app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False)


def _file(content: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}

    async def answer(request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=content_type, headers=headers)

    return answer
