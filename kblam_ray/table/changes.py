"""What differs between two versions of a table, found by reading only what was added between them.

The log tells which files brought new rows after the older version; files that a compaction rearranged are not
among them. Only facts with a row in those files can differ, so those are looked up in both versions. Where the log
or a file of it is gone, where another program removed rows, and when going backwards, the whole rule columns of
both versions are compared instead: the same answer, read from more bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kblam_ray import storage
from kblam_ray.errors import DataFileGoneError
from kblam_ray.table.commits import read_commits
from kblam_ray.table.live import Winners, combined, find_winners, resolve
from kblam_ray.table.log import TableLog
from kblam_ray.table.part import open_part, part_errors
from kblam_ray.table.snapshot import Snapshot


@dataclass(frozen=True)
class Changes:
    """What makes the live facts of `from_version` those of `to_version`.

    Attributes:
        upserts: facts that are new, or whose live row is another one; a Snapshot of `to_version` with these only.
        deleted_ids: int64, ascending; facts live in `from_version` and not in `to_version`.
    """

    from_version: int
    to_version: int
    upserts: Snapshot
    deleted_ids: np.ndarray

    @property
    def is_empty(self) -> bool:
        return not (self.upserts.num_facts or len(self.deleted_ids))


def find_changes(uri: str, from_version: int, to_version: int, known: Sequence[TableLog] = ()) -> Changes:
    """What happened to the live facts from one version to another, which may be the older one (rollback).

    Args:
        known: versions of this table that are open already.

    Raises:
        TableNotFoundError: the table lacks one of the versions.
        StorageError: a version's files are gone.
    """
    opened = {log.version: log for log in known}
    new = opened.get(to_version) or TableLog.open(uri, to_version)
    old = new if from_version == to_version else opened.get(from_version) or TableLog.open(uri, from_version)
    paths = _added_paths(new.uri, from_version, to_version)
    if paths is not None and _are_all_newer(paths, old, new):
        # The usual case, cheap however large the table: what was added wins, so nothing else need be read.
        added = resolve(new, [file for file in new.files if file.path in paths])
        before = find_winners(old, fact_ids=added.fact_ids_M[~added.is_upsert_M]).live()
        upserts, deleted_ids = added.live(), before.fact_ids_M
    else:
        suspects = None if paths is None else _ids_in(new.uri, paths)
        before = find_winners(old, fact_ids=suspects).live()
        after = find_winners(new, fact_ids=suspects).live()
        upserts = after.select(~_same_rows(after, before))
        deleted_ids = np.setdiff1d(before.fact_ids_M, after.fact_ids_M, assume_unique=True)
    return Changes(from_version, to_version, Snapshot(upserts), deleted_ids)


def _added_paths(uri: str, from_version: int, to_version: int) -> set[str] | None:
    """The files that brought rows after `from_version`; None where the log cannot tell, or rows were taken back."""
    if to_version < from_version:
        return None
    commits = read_commits(uri, range(from_version + 1, to_version + 1))
    if commits is None or any(commit.removed_data for commit in commits):
        return None
    return {path for commit in commits for path in commit.added}


def _are_all_newer(paths: set[str], old: TableLog, new: TableLog) -> bool:
    """Whether the added files are part of `new` and each of their rows is newer than every row of `old`."""
    oldest = {file.path: file.min_updated_at for file in new.files if file.path in paths}
    times = [time for time in oldest.values() if time is not None]
    return len(times) == len(paths) and (not times or min(times) > old.newest_updated_at())


def _ids_in(uri: str, paths: set[str]) -> np.ndarray | None:
    """The fact ids in files of the table, ascending; None if a file is gone."""
    files, root = storage.filesystem(uri)
    ids = [np.empty(0, np.int64)]
    for path in sorted(paths):
        try:
            part = open_part(files, root, path)
        except DataFileGoneError:
            return None
        with part_errors(f"{root}/{path}"):
            ids.append(part.read(columns=["fact_id"])["fact_id"].to_numpy())
    return np.unique(np.concatenate(ids))


def _same_rows(after: Winners, before: Winners) -> np.ndarray:
    """For each fact of `after`, whether `before` has it with the very same row."""
    if not len(before):
        return np.zeros(len(after), bool)
    at_M = np.minimum(np.searchsorted(before.fact_ids_M, after.fact_ids_M), len(before) - 1)
    there = before.select(at_M)
    write_codes = combined(pa.chunked_array([after.write_ids_M, there.write_ids_M])).indices.to_numpy()
    return (
        (there.fact_ids_M == after.fact_ids_M)
        & (there.updated_at_M == after.updated_at_M)
        & (write_codes[: len(after)] == write_codes[len(after) :])
    )
