"""What a refresh did and how far behind it is: lines on stderr, a status file, metrics, the summary."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import KblamError, StorageError
from kblam_ray.table.refresh.metrics import RefreshMetrics
from kblam_ray.table.refresh.sources import SourceFile
from kblam_ray.table.refresh.taking import Outcome

STATUS_EVERY_S = 10.0
"""The status file is written after every commit, and otherwise at most so often."""

MAX_NAMED_FILES = 20


@dataclass
class Lag:
    """Seconds from when files came to be as they are to the commits that took them up."""

    last: float | None = None
    max: float | None = None
    num: int = 0
    total: float = 0.0

    def add(self, lags_s: Iterable[float]) -> None:
        """Take in the files of one commit; `last` is the longest of them."""
        lags_s = list(lags_s)
        if not lags_s:
            return
        self.last = max(lags_s)
        self.max = max(self.last, self.max or 0.0)
        self.num, self.total = self.num + len(lags_s), self.total + sum(lags_s)

    def summary(self) -> dict[str, float | None]:
        """`last`, `max` and `mean`, to the millisecond; None before the first file."""
        mean = self.total / self.num if self.num else None
        return {
            name: None if value is None else round(value, 3)
            for name, value in (("last", self.last), ("max", self.max), ("mean", mean))
        }


@dataclass
class Report:
    """Counts of one run, and where they are shown.

    Attributes:
        refused: URI -> why the file is kept out.
        rejected_path: the last file of rows that were left out; those of earlier refreshes lie beside it.
        hindrance: why a sync deletes nothing, None where nothing hinders it.
        empty: inputs that have no file -> why, by URI.
        vacuumed_at: when the table was last vacuumed, seconds since 1970, by whichever run said so in the status file.
    """

    kb_uri: str
    metrics: RefreshMetrics | None = None
    version: int | None = None
    previous_version: int | None = None
    refreshes: int = 0
    files_read: int = 0
    files_waiting: int = 0
    rows_rejected: int = 0
    rejected_path: str | None = None
    added: int = 0
    changed: int = 0
    deleted: int = 0
    texts_embedded: int = 0
    compactions: int = 0
    vacuumed_files: int = 0
    failures: int = 0
    lag: Lag = field(default_factory=Lag)
    refused: dict[str, KblamError] = field(default_factory=dict)
    hindrance: str | None = None
    empty: dict[str, str] = field(default_factory=dict)
    vacuumed_at: float = 0.0
    _troubles: dict[str, str] = field(default_factory=dict)
    _written_at: float = 0.0

    def say(self, text: str) -> None:
        """One line on stderr."""
        print(f"refresh: {text}", file=sys.stderr, flush=True)

    def refuse(self, files: dict[SourceFile, KblamError]) -> None:
        """Files are kept out; said once for each state of each file."""
        for file, error in files.items():
            self.refused[file.uri] = error
            self.say(f"kept out: {error}")
            self.count(error.code)

    def refuse_places(self, places: Mapping[str, KblamError]) -> None:
        """What is at these URIs cannot be looked at; said once, until `forget_refused` is told otherwise."""
        for uri, error in places.items():
            if uri not in self.refused:
                self.say(f"kept out: {error}")
                self.count(error.code)
            self.refused[uri] = error

    def forget_refused(self, still_refused: Collection[str]) -> None:
        """URIs that are not among these are no longer kept out: they went, changed or can be read."""
        self.refused = {uri: error for uri, error in self.refused.items() if uri in still_refused}

    def hindered(self, why: str | None) -> None:
        """Facts of files that are not there are not deleted, and why; None: nothing hinders that. Said once."""
        if why and why != self.hindrance:
            self.say(f"nothing is deleted: {why}")
        self.hindrance = why

    def found_empty(self, inputs: Mapping[str, str]) -> None:
        """These inputs have no file, and why. No error, for files may come; but to a misspelt input they never do."""
        for uri in sorted(inputs.keys() - self.empty.keys()):
            self.say(f"nothing to take up: {inputs[uri]}: {uri}")
        self.empty = dict(inputs)

    def fail(self, error: KblamError, wait_s: float) -> None:
        """A try failed and will be made again; said when the error is another than the last one."""
        self.count(error.code)
        if str(error) != self._troubles.get("refresh"):
            self._troubles["refresh"] = str(error)
            self.say(f"{error} (trying again in {wait_s:.0f} s, and so on)")
        self.write_status("failing", at_once=True)

    def recovered(self) -> None:
        """What failed works again."""
        if self._troubles.pop("refresh", None):
            self.say("works again")

    def note(self, part: str, error: KblamError | None) -> None:
        """A part of the refresh does not work while the others go on; None: it does again. It has been said already."""
        before = self._troubles.pop(part, None)
        if error is not None:
            self._troubles[part] = str(error)
        if before != self._troubles.get(part):
            self.write_status("watching", at_once=True)

    def end(self, error: KblamError) -> None:
        """The run ends with an error; a file that was kept out has been counted by then."""
        self._troubles["run"] = str(error)
        if error.__cause__ not in self.refused.values():
            self.count(error.code)

    def count(self, code: str, num: int = 1) -> None:
        """So many tries failed, or files were kept out."""
        self.failures += num
        if self.metrics:
            self.metrics.failed(code, num)

    def looked(self, waiting: list[SourceFile], version: int | None) -> None:
        """The sources were looked at: so many files wait to be taken up."""
        self.version, self.files_waiting = version, len(waiting)
        if self.metrics:
            oldest_at_s = min((file.since_us / 1e6 for file in waiting), default=None)
            self.metrics.looked(
                at_s=time.time(),
                waiting=len(waiting),
                oldest_at_s=oldest_at_s,
                refused=len(self.refused),
                version=version,
            )

    def took_up(self, outcome: Outcome, since_us: dict[str, int], seconds: float) -> None:
        """A refresh ended, with a commit or because nothing differed.

        Args:
            since_us: since when the files that were new or changed are as they are, by URI.
        """
        now = time.time()
        self.files_read += len(outcome.taken)
        self.files_waiting = max(0, self.files_waiting - len(outcome.taken))
        self.texts_embedded += outcome.texts_embedded
        self.rows_rejected += outcome.rows_rejected
        self.rejected_path = outcome.rejected_path or self.rejected_path
        for file in outcome.taken:
            self.refused.pop(file.uri, None)
        if self.metrics:
            self.metrics.took_up(waiting=self.files_waiting)
        if outcome.version is None:
            return
        self.version = outcome.version
        self.refreshes += 1
        self.added, self.changed = self.added + outcome.added, self.changed + outcome.changed
        self.deleted += outcome.deleted
        # A clock of another machine may be ahead of ours: no commit comes before what it takes up.
        taken = [file.uri for file in outcome.taken if file.uri in since_us]
        lags_s = [max(0.0, now - since_us[uri] / 1e6) for uri in taken]
        self.lag.add(lags_s)
        if self.metrics:
            facts = {"added": outcome.added, "changed": outcome.changed, "deleted": outcome.deleted}
            self.metrics.committed(seconds=seconds, lags_s=lags_s, facts=facts, texts=outcome.texts_embedded)
        lag = f", lag {max(lags_s):.2f} s" if lags_s else ""
        self.say(
            f"version {outcome.version}: {outcome.added} added, {outcome.changed} changed, {outcome.deleted} deleted "
            f"from {len(outcome.taken)} files in {seconds:.2f} s{lag}"
        )
        self.write_status("watching", at_once=True)

    def compacted(self, version: int) -> None:
        """A compaction committed."""
        self.compactions += 1
        self.version = version
        self.say(f"version {version}: compacted")
        if self.metrics:
            self.metrics.compacted()

    def read_status(self) -> None:
        """Learn from an earlier run when the table was last vacuumed."""
        try:
            found = json.loads(storage.read_file(self._status_place()) or b"{}")
            self.vacuumed_at = float(found.get("vacuumed_at") or 0.0)
        except (ValueError, TypeError, AttributeError):
            self.vacuumed_at = 0.0

    def write_status(self, state: str, *, at_once: bool = False) -> None:
        """Replace the status file; a store that is away is no error here, the refresh itself will say so."""
        if not at_once and time.monotonic() - self._written_at < STATUS_EVERY_S:
            return
        self._written_at = time.monotonic()
        status = {
            "kb": self.kb_uri,
            "state": state,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self.summary(),
            "failures": self.failures,
            "trouble": "; ".join(dict.fromkeys(self._troubles.values())) or None,
            "refused": [
                {"file": uri, "code": error.code, "message": str(error)}
                for uri, error in list(self.refused.items())[:MAX_NAMED_FILES]
            ],
            "vacuumed_at": self.vacuumed_at or None,
        }
        try:
            # What an error quotes may be no UTF-8; escaped with a backslash, it is JSON's own way to write it.
            data = json.dumps(status, ensure_ascii=False).encode("utf-8", errors="backslashreplace")
            storage.replace_file(self._status_place(), data)
        except StorageError as error:
            self.say(f"the status file was not written: {error}")

    def summary(self) -> dict[str, Any]:
        """The numbers of the run."""
        return {
            "version": self.version,
            "previous_version": self.previous_version,
            "refreshes": self.refreshes,
            "files_read": self.files_read,
            "files_waiting": self.files_waiting,
            "files_failed": len(self.refused),
            "inputs_without_files": sorted(self.empty),
            "rows_rejected": self.rows_rejected,
            "rejected_path": self.rejected_path,
            "added": self.added,
            "changed": self.changed,
            "deleted": self.deleted,
            "nothing_deleted_because": self.hindrance,
            "texts_embedded": self.texts_embedded,
            "compactions": self.compactions,
            "vacuumed_files": self.vacuumed_files,
            "lag_s": self.lag.summary(),
        }

    def _status_place(self) -> str:
        return storage.beside(self.kb_uri, "refresh", "status.json")
