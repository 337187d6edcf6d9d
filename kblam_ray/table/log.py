"""Open a table at a version, see its files without reading them, and commit parts in one atomic step.

Commits are blind appends: writers never conflict, because which row of a fact is live follows from the rows
themselves (`live.py`). A commit carries its write id as a Delta transaction, so that a retry after an uncertain
outcome (a dropped connection) finds its version and does not commit twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction, create_table_with_add_actions

from kblam_ray import storage
from kblam_ray.errors import InputError, StorageError, TableError, TableNotFoundError
from kblam_ray.table.commits import find_write
from kblam_ray.table.opening import check_location, open_delta, read_info, reason
from kblam_ray.table.part import PartFile, is_own_name, open_part, part_errors
from kblam_ray.table.schema import SCHEMA, TableInfo

WRITE_WINDOW_H = 144
"""Hours from a write's `updated_at` to its commit. Delete rows and uncommitted files are kept a day longer, so that no
write can bring back a fact that was deleted meanwhile, or lose its files to vacuum."""

_COMMIT_ATTEMPTS = 5
_MAX_COMMIT_RETRIES = 1_000
_HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of one version and its ranges; None where another program wrote it without statistics.

    Times are microseconds since 1970. Another program may state them in whole milliseconds, rounded down; the largest
    is then taken to be the last microsecond of its millisecond.
    """

    path: str
    size_bytes: int
    num_rows: int | None
    min_id: int | None
    max_id: int | None
    min_updated_at: int | None
    max_updated_at: int | None


class TableLog:
    """One version of one table: what it is made with and the files it consists of."""

    def __init__(self, uri: str, delta: deltalake.DeltaTable, info: TableInfo) -> None:
        self.uri, self.delta, self.info = uri, delta, info
        self.version: int = delta.version()

    @classmethod
    def open(cls, uri: str, version: int | None = None) -> TableLog:
        """Open the table at `uri` at `version`, by default the newest.

        Raises:
            TableNotFoundError: there is no table, or it lacks the version.
            TableError: a Delta table that is not ours, or of a newer format, or with a damaged log.
            StorageError: the store does not answer or refuses.
        """
        uri = check_location(uri)
        delta = open_delta(uri, version)
        return cls(uri, delta, read_info(uri, delta))

    @classmethod
    def open_if_exists(cls, uri: str) -> TableLog | None:
        """The newest version of the table at `uri`, or None where there is no table yet."""
        try:
            return cls.open(uri)
        except TableNotFoundError:
            return None

    @cached_property
    def files(self) -> list[DataFile]:
        """The data files of this version, in no particular order."""
        actions = pa.table(self.delta.get_add_actions(flatten=True))

        def column(name: str) -> list:
            if name not in actions.column_names:
                return [None] * len(actions)
            values = actions[name]
            return (values.cast(pa.int64()) if pa.types.is_timestamp(values.type) else values).to_pylist()

        names = ("path", "size_bytes", "num_records", "min.fact_id", "max.fact_id", "min.updated_at", "max.updated_at")
        return [_widened(DataFile(*row)) for row in zip(*map(column, names), strict=True)]

    @property
    def size_bytes(self) -> int:
        """Of all data files: about what the facts take in memory."""
        return sum(file.size_bytes for file in self.files)

    @cached_property
    def table_id(self) -> str:
        """What tells this table from others, at whatever place and time."""
        return str(self.delta.metadata().id)

    def newest_updated_at(self) -> int:
        """The largest `updated_at` of any row, microseconds since 1970; 0 for a table without rows."""
        known = [file.max_updated_at for file in self.files if file.max_updated_at is not None]
        return max([0, *known, *(self._read_newest(file) for file in self.files if file.max_updated_at is None)])

    def _read_newest(self, file: DataFile) -> int:
        files, root = storage.filesystem(self.uri)
        with part_errors(f"{root}/{file.path}"):
            times = open_part(files, root, file.path).read(columns=["updated_at"])["updated_at"]
        return pc.max(times.cast(SCHEMA.field("updated_at").type).cast(pa.int64())).as_py() or 0

    def holds(self, write_id: str) -> bool:
        """Whether this version includes the write."""
        return self.delta.transaction_version(write_id) is not None


def as_log(table: str | TableLog, version: int | None = None) -> TableLog:
    """`table` itself, or the table at that URI opened at `version`."""
    return table if isinstance(table, TableLog) else TableLog.open(table, version)


def newest_updated_at(table: str | TableLog) -> int:
    """The largest `updated_at` of any row, microseconds since 1970, from the log alone."""
    return as_log(table).newest_updated_at()


def next_updated_at(table: str | TableLog) -> int:
    """The `updated_at` of a write that begins now, microseconds since 1970: now, and after every row of the table.

    There need not be a table at the URI yet.
    """
    log = TableLog.open_if_exists(table) if isinstance(table, str) else table
    now = time.time_ns() // 1_000
    return now if log is None else max(now, log.newest_updated_at() + 1)


def commit_parts(
    uri: str, info: TableInfo, parts: Sequence[PartFile], write_id: str, metadata: Mapping[str, Any] | None = None
) -> int:
    """Make `parts` part of the table in one atomic commit, creating the table if there is none.

    Calling it again with the same `write_id` commits nothing and returns the same version.

    Returns:
        The version that holds the write, read back from the log.

    Raises: as for `commit`.
    """
    return commit(uri, info, parts, write_id, metadata).version


def commit(
    uri: str, info: TableInfo, parts: Sequence[PartFile], write_id: str, metadata: Mapping[str, Any] | None = None
) -> TableLog:
    """`commit_parts`, returning the table opened at the version that holds the write.

    Args:
        metadata: further words for the commit's entry in the log, JSON by name; see `Commit.info`.

    Raises:
        EncoderMismatchError: the table has another encoder.
        TableError: the table has another identity rule, or the write began too long ago.
        StorageError: the commit failed; the table is as before.
    """
    uri = check_location(uri)
    if not parts:
        raise InputError("a commit without files", where=uri, help="commit at least one part")
    _refuse_old(uri, parts)
    actions: list[AddAction] = [_add_action(part) for part in parts]
    failure: Exception | None = None
    for _ in range(_COMMIT_ATTEMPTS):
        log = TableLog.open_if_exists(uri)
        if log is not None:
            log.info.require_same(info, uri)
            if log.holds(write_id):
                return _at_write(log, write_id)
        try:
            if log is None:
                _create(uri, info, actions, write_id, metadata)
            else:
                _append(log, actions, write_id, metadata)
        except (DeltaError, OSError) as error:
            # Lost a race to create the table, or the answer to a commit that landed: the next look at the log tells.
            failure = error
    log = TableLog.open_if_exists(uri)
    if log is not None and log.holds(write_id):
        return _at_write(log, write_id)
    raise _failed(uri, failure) from failure


def replace_parts(log: TableLog, parts: Sequence[PartFile], replaced: Sequence[DataFile], write_id: str) -> int:
    """Put `parts` in the place of the files `replaced`, whose rows they hold: one commit that changes no fact.

    Raises:
        StorageError: the commit failed; the table is as before.
    """
    now_ms = time.time_ns() // 1_000_000
    adds = [_add_action(part, data_change=False) for part in parts]
    removes = [RemoveAction(file.path, False, now_ms, file.size_bytes, {}) for file in replaced]
    failure: Exception | None = None
    try:
        _append(log, [*adds, *removes], write_id)
    except (DeltaError, OSError) as error:
        failure = error
    newest = TableLog.open(log.uri)
    if newest.holds(write_id):
        return _at_write(newest, write_id).version
    raise _failed(log.uri, failure) from failure


def _create(
    uri: str, info: TableInfo, actions: list[AddAction], write_id: str, metadata: Mapping[str, Any] | None
) -> None:
    create_table_with_add_actions(
        uri,
        deltalake.Schema.from_arrow(SCHEMA),
        actions,
        mode="error",
        description=info.model_dump_json(),
        storage_options=storage.delta_storage_options(uri),
        # Of two creators deltalake would commit the slower one's as version 1, description and all: the table would
        # then say the wrong encoder. Without a retry the slower one fails, looks again, and finds a table.
        commit_properties=_properties(write_id, metadata, max_retries=0),
    )


def _append(
    log: TableLog,
    actions: Sequence[AddAction | RemoveAction],
    write_id: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    properties = _properties(write_id, metadata)
    log.delta.create_write_transaction([*actions], "append", SCHEMA, commit_properties=properties)


def _properties(
    write_id: str, metadata: Mapping[str, Any] | None, *, max_retries: int = _MAX_COMMIT_RETRIES
) -> CommitProperties:
    return CommitProperties(
        custom_metadata=dict(metadata or {}),
        app_transactions=[Transaction(write_id, 1)],
        max_commit_retries=max_retries,
    )


def _failed(uri: str, failure: Exception | None) -> StorageError:
    return StorageError(
        f"the commit failed: {reason(failure) if failure else 'it is not in the log'}",
        where=uri,
        help="the table is as before; run again when the store answers and can be written",
    )


def _widened(file: DataFile) -> DataFile:
    if file.max_updated_at is None or file.max_updated_at % 1_000 or is_own_name(file.path):
        return file
    return replace(file, max_updated_at=file.max_updated_at + 999)


def _at_write(log: TableLog, write_id: str) -> TableLog:
    version = find_write(log.uri, write_id, newest=log.version)
    found = log if version in (None, log.version) else TableLog.open(log.uri, version)
    folder = storage.join(log.uri, "_delta_log")
    with storage.storage_errors(log.uri):
        for path in (storage.join(folder, f"{found.version:020}.json"), folder, log.uri):
            # Long after the write its entry may have gone into a checkpoint, written by one who read it.
            with suppress(FileNotFoundError):
                storage.sync(path)
    return found


def _add_action(part: PartFile, data_change: bool = True) -> AddAction:
    return AddAction(part.path, part.size_bytes, {}, part.modified_at_ms, data_change, part.stats)


def _refuse_old(uri: str, parts: Sequence[PartFile]) -> None:
    age_h = (time.time_ns() // 1_000 - min(part.min_updated_at for part in parts)) / _HOUR_US
    if age_h > WRITE_WINDOW_H:
        raise TableError(
            f"the write began {age_h:.0f} hours ago: facts deleted since then could come back",
            where=uri,
            help=f"run it again; from beginning to commit a write may take {WRITE_WINDOW_H} hours",
        )
