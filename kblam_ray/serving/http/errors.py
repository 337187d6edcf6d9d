"""What goes wrong becomes a status and OpenAI's error body, the same for every cause and path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from kblam_ray import errors as e
from kblam_ray.serving.http.schema.errors import ErrorBody, ErrorDetail

STATUSES: Mapping[type[e.KblamError], int] = {
    e.AuthenticationError: 401,
    e.PermissionDeniedError: 403,
    e.NotServedError: 404,
    e.TableNotFoundError: 404,
    e.ConflictError: 409,
    e.TooLargeError: 413,
    e.OverloadedError: 429,
    # The caller can mend none of these, though whoever runs the server can.
    e.MissingDependencyError: 503,
    e.EncoderAuthenticationError: 503,
    e.InputError: 400,
    e.KblamError: 503,
}
"""The most specific class counts."""

UNSUPPORTED = "unsupported_parameter"
UNKNOWN = "unknown_parameter"
INVALID_VALUE = "invalid_value"
INVALID_TYPE = "invalid_type"
MISSING = "missing_parameter"

MAX_MESSAGE_CHARS = 2_000

_WRONG_SHAPE = re.compile(r".*_(type|parsing|from_float|attributes_type)$|string_unicode$")
"""pydantic's names for values of another type than asked for; all the others are values that are not accepted."""

_PARAMETER = re.compile(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*")


class RefusedError(HTTPException):
    """An error of ours where the framework lets nothing but its own exceptions through: while it reads a body."""

    def __init__(self, error: e.KblamError) -> None:
        super().__init__(status_of(error), str(error))
        self.error = error


def status_of(error: e.KblamError) -> int:
    """The HTTP status of an error."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def body_of(error: e.KblamError, *, code: str | None = None, param: str | None = None) -> ErrorBody:
    """OpenAI's body for an error.

    Args:
        code: instead of the error's own.
        param: the request's parameter that is to blame; told from the error's `where` otherwise.
    """
    if param is None and error.where and _PARAMETER.fullmatch(error.where):
        param = error.where
    detail = ErrorDetail(
        message=_shown(str(error)), type=_type_of(status_of(error)), param=param, code=code or error.code
    )
    body = ErrorBody(error=detail)
    if isinstance(error, e.NotServedInTimeError):
        # Beside `error` as in the answer of a write that is served; inside it for clients that keep only that.
        body.kb_version = detail.kb_version = error.kb_version
    return body


def response_to(error: e.KblamError, retry_after_s: int, *, code: str | None = None) -> Response:
    """The whole response to an error, with `Retry-After` where asking again may help."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after_s)
    return _respond(status, body_of(error, code=code), headers)


def internal_error() -> Response:
    """The response to a defect of ours; what it was stands in the log only."""
    detail = ErrorDetail(
        message="the server failed; its log says how", type="server_error", param=None, code="internal"
    )
    return _respond(500, ErrorBody(error=detail))


def install_handlers(app: FastAPI, retry_after_s: int) -> None:
    """Have `app` answer every error with OpenAI's body."""

    async def on_ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, e.KblamError)
        return response_to(error, retry_after_s)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors())

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, RefusedError):
            return response_to(error.error, retry_after_s)
        return _of_status(request, error)

    app.add_exception_handler(e.KblamError, on_ours)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def _invalid(problems: Sequence[Mapping[str, Any]]) -> Response:
    first = problems[0]
    kind, location = str(first["type"]), first["loc"]
    param = _path(location[1:] if location[0] in ("body", "query", "path") else location)
    status, code = 400, INVALID_VALUE
    if kind == "extra_forbidden":
        code = UNKNOWN
        message = f"there is no parameter `{param}`"
    elif kind == UNSUPPORTED:
        code = UNSUPPORTED
        message = f"`{param}`: {first['msg']}"
    elif kind == "missing":
        status, code = 422, MISSING
        message = f"`{param}` is missing" if param else "a JSON body is missing"
    else:
        if _WRONG_SHAPE.match(kind):
            status, code = 422, INVALID_TYPE
        message = f"`{param}`: {first['msg']}" if param else f"the body: {first['msg']}"
    further = f" ({len(problems) - 1:,} further problems)" if len(problems) > 1 else ""
    detail = ErrorDetail(message=_shown(message + further), type=_type_of(status), param=param or None, code=code)
    return _respond(status, ErrorBody(error=detail))


def _of_status(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    code: str | None = None
    message = str(error.detail)
    if error.status_code == 404:
        message, code = f"there is nothing at {request.url.path}", "not_found"
    elif error.status_code == 405:
        allowed = _allowed(request)
        headers["Allow"] = ", ".join(allowed)
        message = f"{request.url.path} does not take {request.method}, only {', '.join(allowed)}"
        code = "method_not_allowed"
    detail = ErrorDetail(message=_shown(message), type=_type_of(error.status_code), param=None, code=code)
    return _respond(error.status_code, ErrorBody(error=detail), headers)


def _allowed(request: Request) -> list[str]:
    """All methods of a path: the framework names those of the first route only."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(dict(request.scope))[0] != Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path[:200]


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def _shown(message: str) -> str:
    """A message that can be encoded and is not as long as what it complains about."""
    text = message.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}..."


def _respond(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    content = body.model_dump_json(exclude_unset=True)
    return Response(content, status, headers, media_type="application/json")
