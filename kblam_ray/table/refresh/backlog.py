"""Take up many files or large ones: by the Ray Data pipeline, whose pool of encoders grows with the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kblam_ray.errors import KblamError, StorageError
from kblam_ray.table.log import TableLog
from kblam_ray.table.pipeline.run import EmbedSettings, Increment, embed
from kblam_ray.table.pipeline.scan import FILE_SHIFT, Scan
from kblam_ray.table.refresh.history import History
from kblam_ray.table.refresh.ledger import NO_TABLE, WRITE_PREFIX, Verdict
from kblam_ray.table.refresh.settings import RefreshSettings
from kblam_ray.table.refresh.sources import SourceFile, Sources
from kblam_ray.table.refresh.taking import Disputed, Limit, Outcome, may_write

MAX_UNREAD = 3
"""Files that the store does not give before a run begins anew, with a look whether it gives anything at all."""


class _PutAsideError(Exception):
    """Files of the batch cannot be taken up now; nothing was written."""

    def __init__(self, refused: dict[SourceFile, KblamError], moved: list[SourceFile]) -> None:
        super().__init__()
        self.refused, self.moved = refused, moved


class _OthersInDisputeError(Exception):
    """Other files have come into dispute: those must be taken up together with these."""


def take_up_backlog(
    files: Sequence[SourceFile],
    settings: RefreshSettings,
    history: History,
    sources: Sources,
    *,
    sync: bool,
    disputed: Disputed,
) -> Outcome:
    """Bring the table in step with files by one run of the pipeline; without those that cannot be read, if any.

    Args:
        files: in the order in which they count; with `sync` all of the sources.
        sync: whether facts that are in no file go; none go when a file cannot be read.
        disputed: nothing is done if one that is not among `files` has come into dispute.

    Raises:
        FactIdCollisionError: facts of the files collide.
        StorageError, EncoderError, RayStartError: the machinery failed, not a file alone; the table is as before.
    """
    outcome, num_unread = Outcome(), 0
    left = list(files)
    while left:
        try:
            step = _step(left, settings, history, sources, sync, disputed)
            summary = embed(_embed_settings(settings, left, sync), [file.as_input() for file in left], step)
        except _OthersInDisputeError:
            return outcome
        except _PutAsideError as error:
            outcome.refused.update(error.refused)
            outcome.moved.extend(error.moved)
            if sync:
                return outcome
            left = [file for file in left if file not in error.refused and file not in error.moved]
            continue
        except StorageError as error:
            unread = next((file for file in left if file.uri == error.where), None)
            if unread is None:
                raise
            outcome.refused[unread] = error
            num_unread += 1
            if sync or num_unread == MAX_UNREAD:
                return outcome
            left = [file for file in left if file != unread]
            continue
        outcome.taken = left
        outcome.version = summary["version"] if summary["committed"] else None
        if outcome.version is not None:
            history.committed()
        outcome.added, outcome.changed = summary["added"], summary["changed"]
        outcome.deleted, outcome.texts_embedded = summary["deleted"], summary["texts_embedded"]
        outcome.rows_rejected, outcome.rejected_path = summary["rows_rejected"], summary["rejected_path"]
        if not summary["committed"] and summary["version"] is not None:
            history.look()
            history.observe({file.uri: file.tag for file in left}, summary["version"], complete=sync)
        break
    return outcome


def _embed_settings(settings: RefreshSettings, files: Sequence[SourceFile], sync: bool) -> EmbedSettings:
    same = settings.model_dump(include=set(EmbedSettings.model_fields) - {"input", "mode"})
    return EmbedSettings(input=[file.uri for file in files], mode="sync" if sync else "upsert", **same)


def _step(
    files: list[SourceFile],
    settings: RefreshSettings,
    history: History,
    sources: Sources,
    sync: bool,
    disputed: Disputed,
) -> Increment:
    log = history.look()
    if not sync and (others := disputed() - {file.uri for file in files}):
        raise _OthersInDisputeError(others)
    limits: list[Limit] = [
        history.ledger.stamps(file.uri)
        if not sync and history.ledger.verdict(file.uri, file.tag) is Verdict.DISPUTED
        else None
        for file in files
    ]

    def metadata(version: int | None, updated_at: int) -> Mapping[str, Any]:
        base = NO_TABLE if version is None else version
        tags = {file.uri: file.tag for file in files}
        return history.saying(tags, base, complete=sync, updated_at=updated_at)

    def scanned(scan: Scan) -> None:
        moved = [file for file in files if not file.is_still(sources.look_at(file.uri))]
        refused: dict[SourceFile, KblamError] = {
            files[number]: row.to_error()
            for number, row in scan.first_refused(settings.on_error).items()
            if files[number] not in moved
        }
        if moved or refused:
            raise _PutAsideError(refused, moved)

    def may(scan: Scan, rows: np.ndarray, version: int | None) -> np.ndarray:
        if version is None or all(limit is None for limit in limits):
            return np.ones(len(rows), bool)
        numbers = scan.index["seq"].to_numpy()[rows] >> FILE_SHIFT
        ids_W = scan.index["fact_id"].to_numpy()[rows]
        return may_write(ids_W, [limits[number] for number in numbers], TableLog.open(history.uri, version))

    return Increment(log, WRITE_PREFIX, metadata, scanned, may)
