"""How a request comes to its endpoint: the key first, then the parameters' names, then the body; each strictly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from kblam_ray.errors import InputError, KblamError
from kblam_ray.serving.http.access import Access
from kblam_ray.serving.http.errors import UNKNOWN, RefusedError
from kblam_ray.serving.http.services import services_of


class UnknownParameterError(InputError):
    """A parameter of the query that there is not, or one that is given twice."""

    code = UNKNOWN


class JsonRequest(Request):
    """A request whose body is JSON as the standard has it: no NaN, UTF-8 only, whole characters, sane depth."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False, cache_strings="keys")
        except ValueError as error:
            reason = f"the body is not JSON: {error}"
            raise RefusedError(InputError(reason, where="body", help="send one JSON object in UTF-8")) from None


class _Guarded(APIRoute):
    """A route that needs a key and takes the parameters that it documents."""

    access: ClassVar[Access]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = {each.alias for each in self.dependant.query_params}

        async def guarded(request: Request) -> Response:
            given = [value for name, value in request.scope["headers"] if name == b"authorization"]
            services_of(request).keys.check(given, self.access)
            _check_query(request, known)
            if self.body_field is not None:
                _check_content_type(request)
            return await handle(JsonRequest(request.scope, request.receive))

        return guarded


class AskingRoute(_Guarded):
    """A route for every key."""

    access = "ask"


class WritingRoute(_Guarded):
    """A route for admin keys."""

    access = "write"


def asking_router(tag: str) -> APIRouter:
    """A router of endpoints for every key."""
    return APIRouter(route_class=AskingRoute, tags=[tag])


def writing_router(tag: str) -> APIRouter:
    """A router of endpoints for admin keys."""
    return APIRouter(route_class=WritingRoute, tags=[tag])


def _check_query(request: Request, known: set[str]) -> None:
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in known or name in seen:
            what = "given twice" if name in seen else "unknown"
            help = f"this endpoint takes {', '.join(sorted(known)) or 'none'}"
            shown = name if name.isidentifier() and len(name) <= 64 else None
            raise UnknownParameterError(f"a query parameter that is {what}", where=shown, help=help)
        seen.add(name)


def _check_content_type(request: Request) -> None:
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        error: KblamError = InputError(
            "the body is not declared as JSON", where="Content-Type", help="send Content-Type: application/json"
        )
        raise error
