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
from kblam_ray.table.part import PartFile, write_parts
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


def compact(
    uri: str,
    *,
    target_file_bytes: int = TARGET_FILE_BYTES,
    retention_h: float = RETENTION_H,
    min_dead: float = 0.0,
) -> int:
    """Merge small files and drop superseded rows, in one commit, or in none if there is nothing to gain.

    Args:
        target_file_bytes: files smaller than half of it are merged.
        retention_h: hours that delete rows stay. Less than the default only where nothing else writes meanwhile.
        min_dead: while a smaller share of the table's rows would go, only what is worth it is rewritten: files of
            which so large a share is superseded, and of the small ones the smaller. What was replaced takes its room
            until vacuum, so whoever compacts often should rewrite little.

    Returns:
        The version that holds the result: the newest one, if nothing was committed.

    Raises:
        TableNotFoundError, TableError, StorageError: see `TableLog.open`; the table is as before.
    """
    if target_file_bytes <= 0 or retention_h < 0:
        raise InputError("a negative size or retention", where=uri, help="give a positive file size and hours >= 0")
    log = TableLog.open(uri)
    rewrite = rewrite_files(log, target_file_bytes=target_file_bytes, retention_h=retention_h, min_dead=min_dead)
    return log.version if rewrite is None else commit_rewrite(log.uri, rewrite)


def rewrite_files(
    log: TableLog, *, target_file_bytes: int, retention_h: float, min_dead: float = 0.0
) -> Rewrite | None:
    """Write the compacted files of a version beside the table's, not committed; None if there is nothing to gain."""
    began_at_s = time.time()
    winners = find_winners(log)
    is_kept_M = _is_kept(winners, retention_h)
    small = np.array([2 * file.size_bytes < target_file_bytes for file in log.files], bool)
    is_thrifty = removable_share(winners, retention_h) < min_dead
    if is_thrifty:
        # Superseded rows stay in some files, so delete rows stay, too: without them those would be live again.
        is_kept_M = np.ones(len(winners), bool)
        small = _smaller_ones(np.array([file.size_bytes for file in log.files]), small)
    dead_of_file = winners.rows_of_file - np.bincount(winners.file_M[is_kept_M], minlength=len(log.files))
    outdated = dead_of_file > 0
    if is_thrifty:
        outdated &= dead_of_file >= min_dead * winners.rows_of_file
    chosen = np.flatnonzero(outdated | small)
    if not len(chosen):
        return None
    rows_to_keep = winners.select(is_kept_M & np.isin(winners.file_M, chosen))
    # Another program may have written files without a row.
    row_bytes = sum(log.files[i].size_bytes for i in chosen) / max(1, winners.rows_of_file[chosen].sum())
    num_parts = -(-int(len(rows_to_keep) * row_bytes) // target_file_bytes)
    if not outdated.any() and num_parts >= len(chosen):
        return None
    parts = _write_sorted(log, rows_to_keep, num_parts)
    return Rewrite([log.files[i] for i in chosen], parts, began_at_s)


def removable_share(winners: Winners, retention_h: float = RETENTION_H) -> float:
    """Which share of a version's rows a compaction would remove: 0 to 1, delete rows that must stay not among them."""
    num_rows = int(winners.rows_of_file.sum())
    return 1 - int(_is_kept(winners, retention_h).sum()) / max(1, num_rows)


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


def _is_kept(winners: Winners, retention_h: float) -> np.ndarray:
    """Of each winner whether a compaction now keeps it: bool [M]."""
    return winners.is_upsert_M | (winners.updated_at_M > time.time() * 1e6 - retention_h * _HOUR_US)


def _smaller_ones(sizes_F: np.ndarray, small_F: np.ndarray) -> np.ndarray:
    """Of the small files the smaller half, and on as long as the next one is no larger than those: bool [F].

    So of many files a row is rewritten about as often as the table doubles, and not whenever some small files have come
    together; of three or four there is little to choose from.
    """
    at = np.flatnonzero(small_F)
    at = at[np.argsort(sizes_F[at], kind="stable")]
    together = np.cumsum(sizes_F[at])
    count = max(2, -(-len(at) // 2))
    while count < len(at) and sizes_F[at[count]] <= together[count - 1]:
        count += 1
    chosen_F = np.zeros(len(small_F), bool)
    chosen_F[at[:count]] = True
    return chosen_F


def _write_sorted(log: TableLog, rows: Winners, num_parts: int) -> list[PartFile]:
    positions = np.arange(len(rows))
    runs = (run for run in np.array_split(positions, max(1, num_parts)) if len(run))
    return write_parts(log.uri, (rows.select(run).read_sorted(SCHEMA.names) for run in runs))
