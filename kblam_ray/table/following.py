"""Follow a table: know cheaply whether there is a newer version, and read only the commits that are new."""

from __future__ import annotations

import os
from collections.abc import Hashable

import deltalake
import pyarrow.fs as pafs

from kblam_ray import storage
from kblam_ray.errors import TableError
from kblam_ray.table.log import TableLog
from kblam_ray.table.opening import check_location, delta_errors, read_info


class TableFollower:
    """The newest version of one table, looked at again and again; one thread at a time.

    A look that finds nothing new asks whether two small files of the log are there, and reads neither.

    Attributes:
        uri: normalised.
        log: the newest version seen, None before the first look. It stays as it is when later looks find newer ones;
            it is for reading only.
        history: another number whenever the table is not what was seen before with commits added: it was made anew,
            or set back from a backup. Only versions of one history can be compared.

    Raises:
        InputError: a location that no table can have.
    """

    def __init__(self, uri: str) -> None:
        self.uri = check_location(uri)
        self.log: TableLog | None = None
        self.history = 0
        self._stamp: Hashable | None = None

    def look(self) -> TableLog:
        """The newest version of the table that is there now.

        Raises:
            TableNotFoundError, TableError, StorageError: see `TableLog.open`. What was seen before stays known.
        """
        known = self.log
        if known is None:
            return self._open()
        if self._stamp is None or _stamp(self.uri, known.version) != self._stamp:
            return self._open()
        if _stamp(self.uri, known.version + 1) is None:
            return known
        return self._advance(known) or self._open()

    def _advance(self, known: TableLog) -> TableLog | None:
        """The newest version, read from the commits after `known`; None if the table was exchanged meanwhile."""
        try:
            with delta_errors(self.uri):
                known.delta.update_incremental()
        except TableError:
            return None  # opened anew, the log says itself what is wrong with it
        log = _readable(self.uri, known.delta)
        stamp = _stamp(self.uri, log.version)
        # As long as the old commit stands, nothing that was read after it belongs to another table.
        if _stamp(self.uri, known.version) != self._stamp:
            return None
        self.log, self._stamp = log, stamp
        return log

    def _open(self) -> TableLog:
        log, stamp = TableLog.open(self.uri), None
        stamped: int | None = None
        while stamped != log.version:
            stamped, stamp = log.version, _stamp(self.uri, log.version)
            # Read again, after the stamp: a table exchanged in between is then found at the next look.
            log = TableLog.open(self.uri)
        known = self.log
        if known is not None and not self._continues(known, log):
            self.history += 1
        elif known is not None and log.version == known.version:
            self._stamp = stamp
            return known
        self.log, self._stamp = _readable(self.uri, log.delta), stamp
        return self.log

    def _continues(self, known: TableLog, log: TableLog) -> bool:
        # The log forgets commits after 30 days; one that is another file now was never added to the same table.
        is_same = log.table_id == known.table_id and log.version >= known.version
        return is_same and _stamp(self.uri, known.version) in (None, self._stamp)


def _readable(uri: str, delta: deltalake.DeltaTable) -> TableLog:
    """The version that `delta` is at, which stays readable when `delta` moves on."""
    with delta_errors(uri):
        log = TableLog(uri, delta, read_info(uri, delta))
        log.files  # noqa: B018 - read now: later they are those of another version
        log.table_id  # noqa: B018
    return log


def _stamp(uri: str, version: int) -> Hashable | None:
    """What tells a commit's file from any other that could stand in its place; None where there is none."""
    place = storage.join(uri, "_delta_log", f"{version:020d}.json")
    with storage.storage_errors(place):
        files, path = storage.filesystem(place)
        try:
            if isinstance(files, pafs.LocalFileSystem):
                found = os.stat(path)
                return found.st_ino, found.st_size, found.st_mtime_ns
            with files.open_input_file(path) as file:
                return tuple(sorted(file.metadata().items()))
        except FileNotFoundError:
            return None
