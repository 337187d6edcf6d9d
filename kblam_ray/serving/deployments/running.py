"""The application of a server on a Serve instance: started, looked at, drained, and taken down again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Application
from ray.serve.exceptions import RayServeException

from kblam_ray import errors
from kblam_ray.errors import KblamError, UnavailableError
from kblam_ray.serving.deployments.application import LOGGING
from kblam_ray.serving.http.access import is_loopback
from kblam_ray.serving.settings import ServeSettings

CALL_S = 30.0
"""Longest time for a call to the gateways besides the one that waits for requests."""

_OURS = re.compile(r"^(?:kblam_ray(?:\.\w+)*\.)?(\w+Error): (.+?)\. Help: (.+)$", re.MULTILINE)


@contextmanager
def running(application: Application, settings: ServeSettings) -> Iterator[Any]:
    """The handle of the application's gateways while it runs, on the cluster's Serve or on one started for it.

    Raises:
        KblamError: the application's own error, where that kept it from starting.
        UnavailableError: another reason.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    is_theirs = bool(serve.status().proxies)
    try:
        try:
            if not is_theirs:
                where = "HeadOnly" if is_loopback(settings.host) else "EveryNode"
                options = {"host": settings.host, "port": settings.port}
                serve.start(proxy_location=where, http_options=options, logging_config=LOGGING)
            handle = serve.run(application, name=settings.app_name, route_prefix="/", logging_config=LOGGING)
        except (RuntimeError, TimeoutError, RayServeException, RayError) as error:
            raise _why(error) from error
        yield handle
    finally:
        if is_theirs:
            serve.delete(settings.app_name)
        else:
            serve.shutdown()


def require_running(name: str) -> None:
    """Raises UnavailableError if there is no application of that name any more."""
    try:
        applications = serve.status().applications
    except (RayError, RayServeException) as error:
        raise UnavailableError(
            f"Ray Serve is gone: {type(error).__name__}", where=name, help="see Ray's logs, and start again"
        ) from error
    if name not in applications:
        raise UnavailableError("the application is gone", where=name, help="somebody deleted it; start again")


def drained(name: str, handle: Any, timeout_s: float, *, delete_after_s: float | None = None) -> dict[str, Any]:
    """Turn new requests away and wait for those that run; what was served, and what is left when the time is over.

    Args:
        name: of the application.
        handle: of its gateways.
        delete_after_s: when to have Serve take the application down and finish what still runs, for a caller who may
            be killed while he waits. Serve answers new requests then, with 404.

    Raises:
        UnavailableError: the gateways do not answer.
    """
    try:
        knowledge_bases = handle.serves.remote().result(timeout_s=CALL_S)
        with ThreadPoolExecutor(1) as pool:
            draining = pool.submit(lambda: handle.broadcast("drain", timeout_s).results(timeout_s=timeout_s + CALL_S))
            _, is_waiting = wait([draining], timeout=delete_after_s)
            if is_waiting:
                serve.delete(name, _blocking=False)
            gateways = draining.result()
    except (RayError, RayServeException, TimeoutError, KblamError) as error:
        raise UnavailableError(
            f"the gateways cannot be asked to stop: {type(error).__name__}",
            where="gateways",
            help="requests that ran were cut off; clients may repeat them",
        ) from error
    return {
        "requests": sum(gateway["served"] for gateway in gateways),
        "unfinished": sum(gateway["left"] for gateway in gateways),
        "knowledge_bases": knowledge_bases,
    }


def _why(error: Exception) -> KblamError:
    """What kept an application from starting: our own error out of the traceback that Serve gives as text."""
    found = _OURS.findall(str(error))
    kind = getattr(errors, found[-1][0], None) if found else None
    if isinstance(kind, type) and issubclass(kind, KblamError):
        _, what, help = found[-1]
        return kind(what, help=help)
    return UnavailableError(
        f"the application does not start: {str(error).strip()[-2000:]}",
        where="Ray Serve",
        help="see the replicas' logs: ray logs, or /tmp/ray/session_latest/logs/serve",
    )
