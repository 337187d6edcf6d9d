"""The body of every error, and how the OpenAPI document says which an operation gives."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kblam_ray.serving.http.schema.base import ResponseBody


class ErrorDetail(ResponseBody):
    """What went wrong."""

    message: str = Field(description="what happened, where, and what to do")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error")
    param: str | None = Field(description="the parameter to blame, as in messages[0].content")
    code: str | None = Field(description="short and stable, for programs")
    kb_version: int = Field(0, description="of a write that is committed and not served everywhere yet")


class ErrorBody(ResponseBody):
    """Every answer that is not 2xx."""

    error: ErrorDetail
    kb_version: int = Field(0, description="of a write that is committed and not served everywhere yet")


_MEANINGS = {
    400: "Not JSON, an unknown parameter, or a value that is not supported or out of range.",
    401: "No key, or an unknown one.",
    403: "The key may not do this.",
    404: "No model, knowledge base, version or fact of that name.",
    409: "Not with what is served now: pinned, or the version is not reached yet.",
    413: "Larger than the server takes.",
    422: "A parameter is missing or of another type.",
    429: "As many requests wait as may; ask again after Retry-After.",
    503: "No answer now: no replica, a store or an encoder that does not answer, or out of time.",
}

_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}, "required": True}}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that may give these statuses."""
    documented: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        documented[status] = {"model": ErrorBody, "description": _MEANINGS[status]}
        if status in _HEADERS:
            documented[status]["headers"] = _HEADERS[status]
    return documented
