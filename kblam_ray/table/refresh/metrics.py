"""A refresh's numbers for Prometheus, where they are asked for."""

from __future__ import annotations

import time
from typing import Any

from kblam_ray.errors import InputError, MissingDependencyError

_LAG_BUCKETS_S = (0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 86_400)


class RefreshMetrics:
    """The metrics `kblam_refresh_*`, by the label `kb`, served on a port of their own.

    Args:
        kb: the table's URI.
        host, port: where they are served; port 0 takes a free one.

    Attributes:
        port: that they are served on.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
        InputError: the port is taken.
    """

    def __init__(self, kb: str, host: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
        except ImportError as error:
            raise MissingDependencyError(
                "prometheus_client is not installed", where="--metrics-port", help='pip install "kblam-ray[serve]"'
            ) from error
        registry = CollectorRegistry()

        def made(kind: Any, name: str, about: str, *labels: str, **options: Any) -> Any:
            return kind(f"kblam_refresh_{name}", about, ["kb", *labels], registry=registry, **options)

        self._kb = kb
        self._lag = made(
            Histogram,
            "lag_seconds",
            "From a file's modification, or its move to its place, to the commit that took it up.",
            buckets=_LAG_BUCKETS_S,
        )
        self._seconds = made(Histogram, "seconds", "Time of a refresh that committed.", buckets=_LAG_BUCKETS_S)
        self._waiting = made(Gauge, "waiting_files", "Files that are changed and not taken up yet.")
        self._oldest = made(
            Gauge, "oldest_waiting_seconds", "How long ago the oldest waiting file was modified or moved to its place."
        )
        self._refused = made(Gauge, "refused_files", "Files kept out because they cannot be read.")
        self._version = made(Gauge, "kb_version", "Newest version of the table.")
        self._last_look = made(Gauge, "last_look_timestamp_seconds", "When the sources were last listed, Unix time.")
        self._refreshes = made(Counter, "refreshes", "Commits.")
        self._facts = made(Counter, "facts", "Facts committed, by what was done to them.", "what")
        self._texts = made(Counter, "texts_embedded", "Texts embedded.")
        self._failures = made(Counter, "failures", "Tries that failed, by the error's code.", "code")
        self._compactions = made(Counter, "compactions", "Compactions that committed.")
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise InputError(
                f"metrics cannot be served: {error}", where=f"{host}:{port}", help="choose another --metrics-port"
            ) from error
        self.port: int = self._server.server_port
        for metric in (self._waiting, self._oldest, self._refused, self._version, self._refreshes, self._texts):
            metric.labels(kb=kb)
        # Computed when it is asked for: nobody looks while a batch is taken up, and its files grow older meanwhile.
        self._oldest_at_s: float | None = None
        self._oldest.labels(kb=kb).set_function(self._oldest_age_s)

    def looked(
        self, *, at_s: float, waiting: int, oldest_at_s: float | None, refused: int, version: int | None
    ) -> None:
        """The sources and the table were looked at.

        Args:
            at_s: when, Unix time.
            waiting: number of files that are changed and not taken up yet.
            oldest_at_s: since when the oldest of them is as it is, Unix time; None if none waits.
        """
        self._last_look.labels(kb=self._kb).set(at_s)
        self._waiting.labels(kb=self._kb).set(waiting)
        self._oldest_at_s = oldest_at_s
        self._refused.labels(kb=self._kb).set(refused)
        self._version.labels(kb=self._kb).set(-1 if version is None else version)

    def took_up(self, *, waiting: int) -> None:
        """A batch ended; so many files are left of those that the last look found."""
        self._waiting.labels(kb=self._kb).set(waiting)
        if not waiting:
            self._oldest_at_s = None

    def committed(self, *, seconds: float, lags_s: list[float], facts: dict[str, int], texts: int) -> None:
        """A refresh committed."""
        self._refreshes.labels(kb=self._kb).inc()
        self._seconds.labels(kb=self._kb).observe(seconds)
        self._texts.labels(kb=self._kb).inc(texts)
        for lag_s in lags_s:
            self._lag.labels(kb=self._kb).observe(lag_s)
        for what, count in facts.items():
            self._facts.labels(kb=self._kb, what=what).inc(count)

    def failed(self, code: str, num: int = 1) -> None:
        """So many tries failed, or files were refused."""
        self._failures.labels(kb=self._kb, code=code).inc(num)

    def compacted(self) -> None:
        """A compaction committed."""
        self._compactions.labels(kb=self._kb).inc()

    def _oldest_age_s(self) -> float:
        at_s = self._oldest_at_s
        # A clock of another machine may be ahead of ours.
        return 0.0 if at_s is None else max(0.0, time.time() - at_s)

    def close(self) -> None:
        """Serve them no longer."""
        self._server.shutdown()
        self._server.server_close()
