"""What a process of the server counts and times, and the Prometheus text of one process or of all.

Every process has its own registry of metrics, and every sample carries the label `process`, so the texts of many
processes join into one exposition without adding anything up: that is for whoever asks Prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from kblam_ray.serving.wanted import Role

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `Metrics.text` and `merged` return."""

REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REFRESH_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
SPEED_BUCKETS = (1, 2.5, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000)

M = TypeVar("M", bound=MetricWrapperBase)

_HEADER = re.compile(r"# (?:HELP|TYPE) (\S+)")
_PROCESS = re.compile(r'[{,]process="((?:[^"\\]|\\.)*)"')


class Labelled(Generic[M]):
    """A family of metrics in one process: `labels` names the one that is meant."""

    def __init__(self, family: M, process_id: str) -> None:
        self._family, self._process_id = family, process_id

    def labels(self, **labels: Any) -> M:
        """The metric of these labels, all of the family's besides `process`; ValueError for others."""
        return self._family.labels(process=self._process_id, **labels)

    def forget(self, **labels: Any) -> None:
        """Drop all metrics of the family that have these labels."""
        self._family.remove_by_labels({"process": self._process_id, **{k: str(v) for k, v in labels.items()}})


class Metrics:
    """The metrics of one process; any thread may use them.

    Args:
        process_id: value of the label `process`.
        role: label of `kblam_process_memory_bytes`, which every process has.

    Attributes:
        requests: answered, by `endpoint` (the route, not the path) and `status`.
        request_seconds: from the first byte in to the last one out, by `endpoint`.
        first_token_seconds: from taking a request to its first piece of text, by `grounding`.
        answer_tokens, prompt_tokens: of all requests.
        tokens_per_second: of each answer, while it was written.
        running_requests, waiting_requests: now.
        kb_version, kb_latest_version, kb_lag_seconds, kb_facts, kb_memory_bytes: now, by `kb`.
        refresh_seconds: how long changes of version took, by `kb`.
        refresh_failures: tries that failed, by `kb`.
        facts_written: by `kb` and `what` (added, changed, unchanged, deleted).
    """

    def __init__(self, process_id: str, role: Role) -> None:
        self._registry, self._process_id = CollectorRegistry(), process_id
        self.requests = self._counter("requests", "Requests answered.", "endpoint", "status")
        self.request_seconds = self._histogram(
            "request_seconds", "Time of a request, first byte in to last byte out.", REQUEST_BUCKETS_S, "endpoint"
        )
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "Time to the first piece of an answer's text.", FIRST_TOKEN_BUCKETS_S, "grounding"
        )
        self.answer_tokens = self._counter("answer_tokens", "Tokens of answers.").labels()
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.").labels()
        self.tokens_per_second = self._histogram(
            "tokens_per_second", "Tokens per second of an answer while it was written.", SPEED_BUCKETS
        ).labels()
        self.running_requests = self._gauge("running_requests", "Requests in work.").labels()
        self.waiting_requests = self._gauge("waiting_requests", "Requests that wait to be worked on.").labels()
        self.kb_version = self._gauge("kb_version", "Version of the knowledge base that is served.", "kb")
        self.kb_latest_version = self._gauge("kb_latest_version", "Newest version seen in the table.", "kb")
        self.kb_lag_seconds = self._gauge(
            "kb_lag_seconds", "How long a newer version has been known and not served; 0 when up to date.", "kb"
        )
        self.kb_facts = self._gauge("kb_facts", "Live facts of the version that is served.", "kb")
        self.kb_memory_bytes = self._gauge("kb_memory_bytes", "Memory of a knowledge base.", "kb")
        self.refresh_seconds = self._histogram(
            "kb_refresh_seconds", "Time from knowing a version to serving it.", REFRESH_BUCKETS_S, "kb"
        )
        self.refresh_failures = self._counter("kb_refresh_failures", "Tries to follow a table that failed.", "kb")
        self.facts_written = self._counter("kb_facts_written", "Facts in writes, by what they did.", "kb", "what")
        self._by_kb: tuple[Labelled[Any], ...] = (
            self.kb_version,
            self.kb_latest_version,
            self.kb_lag_seconds,
            self.kb_facts,
            self.kb_memory_bytes,
            self.refresh_seconds,
            self.refresh_failures,
            self.facts_written,
        )
        self.process_memory_bytes = self._gauge(
            "process_memory_bytes", "Resident memory of a process of the server.", "role"
        ).labels(role=role)
        self._process = psutil.Process()

    def text(self) -> str:
        """All metrics in Prometheus' text format, the memory of the process as it is now."""
        self.process_memory_bytes.set(self._process.memory_info().rss)
        # `_created` (when a counter began) is a second family per metric that nobody asked for.
        return _text(
            {
                name: lines
                for name, lines in _families(generate_latest(self._registry).decode()).items()
                if not name.endswith("_created")
            }
        )

    def forget_kb(self, name: str) -> None:
        """Drop everything that is labelled with a knowledge base that is served no more."""
        for family in self._by_kb:
            family.forget(kb=name)

    def _counter(self, name: str, help: str, *labels: str) -> Labelled[Counter]:
        return self._labelled(Counter(f"kblam_{name}", help, ("process", *labels), registry=self._registry))

    def _gauge(self, name: str, help: str, *labels: str) -> Labelled[Gauge]:
        return self._labelled(Gauge(f"kblam_{name}", help, ("process", *labels), registry=self._registry))

    def _histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Labelled[Histogram]:
        family = Histogram(
            f"kblam_{name}", help, ("process", *labels), registry=self._registry, buckets=tuple(map(float, buckets))
        )
        return self._labelled(family)

    def _labelled(self, family: M) -> Labelled[M]:
        return Labelled(family, self._process_id)


def merged(texts: Iterable[str]) -> str:
    """One exposition of many: each family once, by name, with the samples of all processes, by process.

    Where two texts have a sample of one name and the same labels (a process that was asked and had reported too), the
    text that comes first is taken.
    """
    joined: dict[str, list[str]] = {}
    seen: set[str] = set()
    for text in sorted(texts, key=_process_of):
        for name, lines in _families(text).items():
            own = joined.setdefault(name, [])
            for line in lines:
                is_header = line.startswith("#")
                series = line.split(" ", 3)[1:3] if is_header else line.rpartition(" ")[:1]
                key = " ".join(series)
                if key not in seen:
                    seen.add(key)
                    own.append(line)
    return _text(dict(sorted(joined.items())))


def _process_of(text: str) -> str:
    found = _PROCESS.search(text)
    return found.group(1) if found else ""


def _families(text: str) -> dict[str, list[str]]:
    """Lines of an exposition by family, its headers first."""
    families: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.split("\n"):
        if header := _HEADER.match(line):
            lines = families.setdefault(header.group(1), [])
        elif not line or line.startswith("#"):
            continue
        elif lines is None:
            lines = families.setdefault(re.split(r"[{ ]", line, maxsplit=1)[0], [])
        lines.append(line)
    return families


def _text(families: dict[str, list[str]]) -> str:
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
