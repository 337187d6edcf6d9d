"""Remove files that no version within the retention needs, and those that a crashed write left behind."""

from __future__ import annotations

from kblam_ray.errors import InputError
from kblam_ray.table.compact import RETENTION_H
from kblam_ray.table.log import TableLog
from kblam_ray.table.opening import delta_errors

MIN_RETENTION_H = 1

MAX_RETENTION_H = 1_000_000
"""A century; far beyond it deltalake ends the process."""


def vacuum(uri: str, retention_h: int = RETENTION_H, *, allow_short: bool = False) -> list[str]:
    """Delete the data files that were replaced more than `retention_h` hours ago.

    Versions that need a deleted file can no longer be read. Files that no commit names are left behind by crashed
    writes, or belong to a write that has not committed yet: they stay for RETENTION_H whatever `retention_h` says,
    longer than a write may take.

    Args:
        retention_h: hours that old versions stay readable.
        allow_short: permit less than an hour, which also takes files from readers that are at work now.

    Returns:
        Paths of the deleted files, relative to the table; nothing to delete makes no new version.

    Raises:
        InputError: a retention below an hour without `allow_short`, or above MAX_RETENTION_H.
        TableNotFoundError, TableError, StorageError: see `TableLog.open`.
    """
    if retention_h < (0 if allow_short else MIN_RETENTION_H):
        raise InputError(
            f"a retention of {retention_h} hours",
            where=uri,
            help=f"give at least {MIN_RETENTION_H}, or allow_short=True if nothing reads or writes the table now",
        )
    if retention_h > MAX_RETENTION_H:
        raise InputError(f"a retention of {retention_h} hours", where=uri, help=f"give at most {MAX_RETENTION_H}")
    removed = _vacuum(uri, retention_h, with_unnamed=False)
    return sorted({*removed, *_vacuum(uri, max(retention_h, RETENTION_H), with_unnamed=True)})


def _vacuum(uri: str, retention_h: int, *, with_unnamed: bool) -> list[str]:
    log = TableLog.open(uri)

    def run(dry_run: bool) -> list[str]:
        with delta_errors(log.uri):
            return log.delta.vacuum(retention_h, dry_run=dry_run, enforce_retention_duration=False, full=with_unnamed)

    # deltalake commits two versions even when there is nothing to delete.
    return run(dry_run=False) if run(dry_run=True) else []
