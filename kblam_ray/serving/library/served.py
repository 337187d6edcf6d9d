"""What one name serves: the memory, what went wrong last, how far it is behind; and the report of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kblam_ray.errors import EncoderMismatchError
from kblam_ray.serving.library.fetcher import Sighting
from kblam_ray.serving.library.kept import Kept
from kblam_ray.serving.library.shelf import NoRoomError, Shelf
from kblam_ray.serving.wanted import KbReport, KbSpec, Status


@dataclass(eq=False)
class Served:
    """A knowledge base by its name. Lives on one event loop; times are the loop's clock, in seconds.

    Attributes:
        shelf: of its table; None for a location that no table can have.
        kept: what requests get; switching it is one assignment.
        behind_since: since when a newer version is known and not served.
        num_failures: in a row.
        num_waiting: requests that wait for something else than what is served.
        poked: there may be news.
        changed: set, and replaced, at each switch, failure and recovery.
    """

    name: str
    spec: KbSpec
    shelf: Shelf | None
    kept: Kept | None = None
    status: Status = "loading"
    error: str | None = None
    latest_version: int | None = None
    encoder: str | None = None
    num_facts: int | None = None
    refresh_s: float | None = None
    behind_since: float | None = None
    num_failures: int = 0
    num_waiting: int = 0
    poked: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def version(self) -> int | None:
        return None if self.kept is None else self.kept.version

    @property
    def may_rest(self) -> bool:
        """Whether nobody needs it: unloaded for want of memory, and not asked for."""
        return self.status == "unloaded" and not self.num_waiting

    def move(self, spec: KbSpec, now: float) -> None:
        """Go by another spec of the same table."""
        pin_moved = spec.version != self.spec.version
        is_behind = spec.version is None and (spec.at_least or 0) > (self.version or 0)
        has_news = spec.at_least != self.spec.at_least and is_behind
        self.spec = spec
        if has_news and self.status != "unloaded":
            self.fall_behind(now)
        if has_news or pin_moved:
            self.poked.set()

    def saw(self, seen: Sighting) -> int:
        """Take note of the newest version; returns the one to serve."""
        self.latest_version, self.encoder = seen.log.version, seen.log.info.encoder.name
        return seen.log.version if self.spec.version is None else self.spec.version

    def serves(self, version: int, history: int) -> bool:
        return self.kept is not None and (self.kept.version, self.kept.history) == (version, history)

    def fall_behind(self, now: float) -> None:
        if self.behind_since is None:
            self.behind_since = now

    def switch(self, kept: Kept, now: float) -> None:
        """Serve `kept` from now on."""
        before = self.kept
        if before is not None:
            kept.last_asked = max(kept.last_asked, before.last_asked)
            self.refresh_s = now - (self.behind_since or now)
        self.kept = kept
        self.num_facts = kept.memory.num_facts

    def recover(self) -> bool:
        """Up to date, and the table can be read. Returns whether that is news."""
        was_well = self.status == "ready"
        self.status, self.error, self.num_failures, self.behind_since = "ready", None, 0, None
        return not was_well

    def fail(self, error: BaseException) -> bool:
        """What went wrong at this try. Returns whether that is news."""
        before = self.status, self.error
        if isinstance(error, NoRoomError):
            self.unload()
            return True
        self.num_failures += 1
        if isinstance(error, EncoderMismatchError):
            self.kept = None  # another table stands there now: what is served is of none
        self.status = "failed" if self.kept is None else "unreachable"
        self.error = str(error) or repr(error)
        return before != (self.status, self.error)

    def unload(self) -> None:
        """Let go of the memory until somebody asks."""
        self.kept, self.status, self.error, self.behind_since = None, "unloaded", None, None

    def report(self, now: float) -> KbReport:
        return KbReport(
            uri=self.spec.uri,
            pinned=self.spec.version,
            version=self.version,
            latest_version=self.latest_version,
            num_facts=self.num_facts,
            encoder=self.encoder,
            status=self.status,
            error=self.error,
            nbytes=0 if self.kept is None else self.kept.nbytes,
            refresh_s=self.refresh_s,
            lag_s=0.0 if self.behind_since is None else now - self.behind_since,
        )
