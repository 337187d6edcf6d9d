"""What shall be served and what is: the words between replicas and the registry.

The registry says which knowledge bases are wanted; each replica serves them and reports what it serves. A report is a
lease: a process that has not reported for `lease_s` is taken for gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Status = Literal["loading", "ready", "unreachable", "failed", "unloaded"]
"""loading: the first version is on its way; ready: served; unreachable: the last good version is served, the table
cannot be read; failed: nothing can be served, `error` says why; unloaded: for want of memory, loaded when asked."""

Role = Literal["answerer", "gateway", "writer"]


@dataclass(frozen=True)
class KbSpec:
    """A knowledge base that is wanted.

    Attributes:
        version: the one to stay at (a pin); None follows the newest.
        at_least: a version known to be committed: who serves an older one and is not pinned asks the table now.
    """

    uri: str
    version: int | None = None
    at_least: int | None = None


@dataclass(frozen=True)
class Wanted:
    """All that is wanted. Another `revision` says that something changed, no more."""

    revision: int = 0
    knowledge_bases: Mapping[str, KbSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class TableFound:
    """A table that can be served: where it is, its encoder's name, the version asked for and the newest one."""

    uri: str
    encoder: str
    version: int
    newest: int


@dataclass(frozen=True)
class KbReport:
    """What one replica serves of one knowledge base.

    Attributes:
        uri, pinned: of the spec that it goes by.
        version: served; None before the first.
        latest_version: newest that it has seen in the table.
        nbytes: memory of the version served.
        refresh_s: how long the last change of version took; None before the first.
        lag_s: how long a newer version has been known and not served; 0 when up to date.
    """

    uri: str
    pinned: int | None
    version: int | None
    latest_version: int | None
    num_facts: int | None
    encoder: str | None
    status: Status
    error: str | None = None
    nbytes: int = 0
    refresh_s: float | None = None
    lag_s: float = 0.0


@dataclass(frozen=True)
class ProcessReport:
    """What a process says of itself at least every third of a lease.

    Attributes:
        wanted: what it was last told: a registry that was killed learns from it what was wanted.
        metrics: Prometheus text of the process.
    """

    process_id: str
    role: Role
    knowledge_bases: Mapping[str, KbReport] = field(default_factory=dict)
    wanted: Wanted | None = None
    metrics: str = ""


@dataclass(frozen=True)
class KbDescription:
    """A knowledge base as the server shows it: over all replicas.

    Attributes:
        version: that every replica serves, the oldest of them; None before the first.
        lag_s: of the replica that is furthest behind.
    """

    name: str
    uri: str
    version: int | None
    latest_version: int | None
    pinned: bool
    num_facts: int | None
    encoder: str | None
    status: Status
    lag_s: float
    error: str | None = None


@dataclass(frozen=True)
class Overview:
    """What the registry knows: knowledge bases by name, processes by role, and their metrics (process id to text)."""

    wanted: Wanted
    knowledge_bases: Mapping[str, KbDescription]
    processes: Mapping[str, Role]
    metrics: Mapping[str, str]
    is_settled: bool = True
    """False for a lease's time after a registry was started: processes may be missing."""


class RegistryLike(Protocol):
    """The registry, or whatever stands for it in another process."""

    async def report(self, report: ProcessReport) -> None:
        """Take or renew the lease of a process."""

    async def leave(self, process_id: str) -> None:
        """Give a lease back."""

    async def wanted(self, known: int | None = None, timeout_s: float = 0.0) -> Wanted:
        """What is wanted; where its revision is `known`, wait up to `timeout_s` for another."""

    async def put(self, name: str, uri: str, version: int | None) -> Wanted:
        """Want a knowledge base from now on, at a version (None: the newest); durable when it returns.

        Raises:
            StorageError: the state cannot be written; nothing has changed.
        """

    async def remove(self, name: str) -> Wanted:
        """Want it no more. NotServedError if there is none of that name; StorageError as in `put`."""

    async def committed(self, name: str, version: int) -> None:
        """Somebody committed a version: replicas that follow shall fetch it now."""

    async def wait_served(self, name: str, version: int, timeout_s: float) -> bool:
        """Whether every live answerer serves `version` (a newer one too, unless pinned) within the time."""

    async def describe(self) -> Overview:
        """All that is known."""
