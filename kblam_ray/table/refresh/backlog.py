"""Take up many files or large ones: by the Ray Data pipeline, whose pool of encoders grows with the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kblam_ray.errors import KblamError
from kblam_ray.table.log import TableLog
from kblam_ray.table.pipeline.run import EmbedSettings, Increment, embed
from kblam_ray.table.pipeline.scan import FILE_SHIFT, Scan
from kblam_ray.table.refresh.history import History
from kblam_ray.table.refresh.ledger import NO_TABLE, WRITE_PREFIX, Taken, Verdict
from kblam_ray.table.refresh.settings import RefreshSettings
from kblam_ray.table.refresh.sources import SourceFile, Sources
from kblam_ray.table.refresh.taking import ANY_TIME, Outcome, may_write


class _PutAsideError(Exception):
    """Files of the batch cannot be taken up now; nothing was written."""

    def __init__(self, refused: dict[SourceFile, KblamError], moved: list[SourceFile]) -> None:
        super().__init__()
        self.refused, self.moved = refused, moved


def take_up_backlog(
    files: Sequence[SourceFile], settings: RefreshSettings, history: History, sources: Sources, *, sync: bool
) -> Outcome:
    """Bring the table in step with files by one run of the pipeline; without those that cannot be read, if any.

    Args:
        files: in the order in which they count; with `sync` all of the sources.
        sync: whether facts that are in no file go; none go when a file cannot be read.

    Raises:
        FactIdCollisionError: facts of the files collide.
        StorageError, EncoderError, RayStartError: the machinery failed; the table is as before.
    """
    outcome = Outcome()
    left = list(files)
    while left:
        try:
            summary = embed(
                _embed_settings(settings, left, sync),
                [file.as_input() for file in left],
                _step(left, settings, history, sources, sync),
            )
        except _PutAsideError as error:
            outcome.refused.update(error.refused)
            outcome.moved.extend(error.moved)
            if sync:
                return outcome
            left = [file for file in left if file not in error.refused and file not in error.moved]
            continue
        outcome.taken = left
        outcome.version = summary["version"] if summary["committed"] else None
        outcome.added, outcome.changed = summary["added"], summary["changed"]
        outcome.deleted, outcome.texts_embedded = summary["deleted"], summary["texts_embedded"]
        if not summary["committed"] and summary["version"] is not None:
            history.look()
            history.ledger.observe({file.uri: file.tag for file in left}, summary["version"], complete=sync)
        break
    return outcome


def _embed_settings(settings: RefreshSettings, files: Sequence[SourceFile], sync: bool) -> EmbedSettings:
    same = settings.model_dump(include=set(EmbedSettings.model_fields) - {"input", "mode"})
    return EmbedSettings(input=[file.uri for file in files], mode="sync" if sync else "upsert", **same)


def _step(
    files: list[SourceFile], settings: RefreshSettings, history: History, sources: Sources, sync: bool
) -> Increment:
    ledger = history.ledger
    disputed = [not sync and ledger.verdict(file.uri, file.tag) is Verdict.DISPUTED for file in files]
    until_F = np.array(
        [ledger.until(file.uri) if known else ANY_TIME for file, known in zip(files, disputed, strict=True)], np.int64
    )

    def metadata(version: int | None, updated_at: int) -> Mapping[str, Any]:
        base = NO_TABLE if version is None else version
        tags = {file.uri: file.tag for file in files}
        return Taken(version=base, base=base, files=tags, complete=sync, updated_at=updated_at).metadata()

    def scanned(scan: Scan) -> None:
        moved = [file for file in files if (now := sources.look_at(file.uri)) is None or now.tag != file.tag]
        refused: dict[SourceFile, KblamError] = {
            files[number]: row.to_error()
            for number, row in scan.first_refused(settings.on_error).items()
            if files[number] not in moved
        }
        if moved or refused:
            raise _PutAsideError(refused, moved)

    def may(scan: Scan, rows: np.ndarray, version: int | None) -> np.ndarray:
        until_W = until_F[scan.index["seq"].to_numpy()[rows] >> FILE_SHIFT]
        if version is None or not (until_W < ANY_TIME).any():
            return np.ones(len(rows), bool)
        ids_W = scan.index["fact_id"].to_numpy()[rows]
        return may_write(ids_W, until_W, TableLog.open(history.uri, version))

    return Increment(WRITE_PREFIX, metadata, scanned, may)
