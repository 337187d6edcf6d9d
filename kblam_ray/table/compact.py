"""Rewrite small and outdated files as few sorted ones with one row per fact; nothing that a reader sees changes.

Superseded rows go; a delete row stays until it is older than the retention, because a write that began before the
delete may still be on its way, and only the delete row keeps its rows from winning. Rows are copied with their
`updated_at` and `write_id`, so it does not matter what is committed between reading and committing: an append is
ordered by its own times, and of rows that two compactions doubled either is the same row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kblam_ray.errors import InputError, StorageError
from kblam_ray.table.live import Winners, find_winners
from kblam_ray.table.log import WRITE_WINDOW_H, DataFile, TableLog, replace_parts
from kblam_ray.table.part import PartFile, write_part
from kblam_ray.table.schema import SCHEMA, new_write_id

TARGET_FILE_BYTES = 128 * 2**20
"""Size of a compacted file; memory holds about four times as much while one is written."""

RETENTION_H = WRITE_WINDOW_H + 24
"""Hours that delete rows stay; a day longer than a write may take, for clocks that disagree."""

_HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Rewrite:
    """Files to replace, and the files that replace them: written, not committed."""

    replaced: Sequence[DataFile]
    parts: Sequence[PartFile]
    began_at_s: float


def compact(uri: str, *, target_file_bytes: int = TARGET_FILE_BYTES, retention_h: float = RETENTION_H) -> int:
    """Merge small files and drop superseded rows, in one commit, or in none if there is nothing to gain.

    Args:
        target_file_bytes: files smaller than half of it are merged.
        retention_h: hours that delete rows stay. Less than the default only where nothing else writes meanwhile.

    Returns:
        The version that holds the result: the newest one, if nothing was committed.

    Raises:
        TableNotFoundError, TableError, StorageError: see `TableLog.open`; the table is as before.
    """
    if target_file_bytes <= 0 or retention_h < 0:
        raise InputError("a negative size or retention", where=uri, help="give a positive file size and hours >= 0")
    log = TableLog.open(uri)
    rewrite = rewrite_files(log, target_file_bytes=target_file_bytes, retention_h=retention_h)
    return log.version if rewrite is None else commit_rewrite(log.uri, rewrite)


def rewrite_files(log: TableLog, *, target_file_bytes: int, retention_h: float) -> Rewrite | None:
    """Write the compacted files of a version beside the table's, not committed; None if there is nothing to gain."""
    began_at_s = time.time()
    winners = find_winners(log)
    is_kept_M = winners.is_upsert_M | (winners.updated_at_M > began_at_s * 1e6 - retention_h * _HOUR_US)
    kept_of_file = np.bincount(winners.file_M[is_kept_M], minlength=len(log.files))
    outdated = kept_of_file < winners.rows_of_file
    small = np.array([2 * file.size_bytes < target_file_bytes for file in log.files], bool)
    chosen = np.flatnonzero(outdated | small)
    if not len(chosen):
        return None
    rows_to_keep = winners.select(is_kept_M & np.isin(winners.file_M, chosen))
    row_bytes = sum(log.files[i].size_bytes for i in chosen) / winners.rows_of_file[chosen].sum()
    num_parts = -(-int(len(rows_to_keep) * row_bytes) // target_file_bytes)
    if not outdated.any() and num_parts >= len(chosen):
        return None
    parts = _write_sorted(log, rows_to_keep, num_parts)
    return Rewrite([log.files[i] for i in chosen], parts, began_at_s)


def commit_rewrite(uri: str, rewrite: Rewrite) -> int:
    """Put the rewritten files in the place of the old ones, unless another compaction has replaced those meanwhile.

    Returns:
        The version that holds the rewrite, or the newest one where another compaction was first.

    Raises:
        StorageError: the commit failed, or the compaction took longer than delete rows are sure to stay.
    """
    log = TableLog.open(uri)
    if not {file.path for file in rewrite.replaced} <= {file.path for file in log.files}:
        # What was written stays unnamed until vacuum. Were it committed all the same, rows would only be doubled.
        return log.version
    if time.time() - rewrite.began_at_s > WRITE_WINDOW_H * 3_600:
        raise StorageError(
            f"the compaction took longer than {WRITE_WINDOW_H} hours",
            where=uri,
            help="run it again; the table is as before",
        )
    return replace_parts(log, rewrite.parts, rewrite.replaced, new_write_id())


def _write_sorted(log: TableLog, rows: Winners, num_parts: int) -> list[PartFile]:
    positions = np.arange(len(rows))
    return [
        write_part(log.uri, rows.select(run).read_sorted(SCHEMA.names))
        for run in np.array_split(positions, max(1, num_parts))
        if len(run)
    ]
