"""Keep the table tidy beside the refreshes: compact when it is worthwhile, vacuum now and then, in a thread."""

from __future__ import annotations

import threading
import time

from kblam_ray.errors import KblamError
from kblam_ray.table.compact import TARGET_FILE_BYTES, compact, removable_share
from kblam_ray.table.live import find_winners
from kblam_ray.table.log import TableLog
from kblam_ray.table.pipeline.spool import remove_old_spools
from kblam_ray.table.refresh.report import Report
from kblam_ray.table.refresh.settings import RefreshSettings
from kblam_ray.table.vacuum import vacuum

MIN_ROWS_COUNTED = 10_000
"""A smaller table is not compacted for its superseded rows alone."""

_COUNT_AGAIN_AT = 1.25
"""Superseded rows are counted, which reads a column of the table, when the rows have grown by so much."""

_TRY_AGAIN_S = 300.0
_REST_S = 5.0


class Upkeep:
    """Decides when, and does one thing at a time. Reading and writing go on meanwhile: neither conflicts with it."""

    def __init__(self, uri: str, settings: RefreshSettings, report: Report) -> None:
        self._uri, self._settings, self._report = uri, settings, report
        self._thread: threading.Thread | None = None
        self._counted_rows = 0
        self._not_before = 0.0

    def consider(self, log: TableLog | None) -> None:
        """Begin in the background what is due, unless something is under way."""
        if log is None or self.is_busy or time.monotonic() < self._not_before:
            return
        if self._is_due(log):
            self._thread = threading.Thread(target=self._try, name="refresh-upkeep", daemon=True)
            self._thread.start()

    def run(self, log: TableLog | None) -> None:
        """Do what is due, here and now; a failure is said and no more, for the table is as it was."""
        if log is not None and self._is_due(log):
            self._try()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def finish(self, timeout_s: float) -> None:
        """Wait for what is under way; what is not done then is abandoned, and the table is as before."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _is_due(self, log: TableLog) -> bool:
        return self._vacuum_is_due() or self._compaction_may_help(log)

    def _vacuum_is_due(self) -> bool:
        every_s = self._settings.vacuum_every_h * 3_600
        return every_s > 0 and time.time() - self._report.vacuumed_at > every_s

    def _compaction_may_help(self, log: TableLog) -> bool:
        if not self._settings.compact_files:
            return False
        small = sum(2 * file.size_bytes < TARGET_FILE_BYTES for file in log.files)
        if small >= max(2, self._settings.compact_files):
            return True
        num_rows = _num_rows(log)
        return num_rows >= MIN_ROWS_COUNTED and num_rows > _COUNT_AGAIN_AT * self._counted_rows

    def _try(self) -> None:
        try:
            log = TableLog.open(self._uri)
            if self._compaction_may_help(log) and self._is_worthwhile(log):
                version = compact(self._uri, min_dead=self._settings.compact_dead)
                if version != log.version:
                    self._report.compacted(version)
                self._counted_rows = _num_rows(TableLog.open(self._uri))
            if self._vacuum_is_due():
                self._report.vacuumed_files += len(vacuum(self._uri, self._settings.retention_h))
                remove_old_spools(self._uri)
                self._report.vacuumed_at = time.time()
        except KblamError as error:
            self._report.say(f"tidying failed, the table is as it was: {error}")
            self._not_before = time.monotonic() + _TRY_AGAIN_S
        else:
            self._not_before = time.monotonic() + _REST_S

    def _is_worthwhile(self, log: TableLog) -> bool:
        small = sum(2 * file.size_bytes < TARGET_FILE_BYTES for file in log.files)
        if small >= max(2, self._settings.compact_files):
            return True
        winners = find_winners(log)
        self._counted_rows = int(winners.rows_of_file.sum())
        return removable_share(winners) >= self._settings.compact_dead


def _num_rows(log: TableLog) -> int:
    return sum(file.num_rows or 0 for file in log.files)
