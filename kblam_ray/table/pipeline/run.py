"""From input files to one commit: scan, plan, encode, write, commit.

    input files --scan--> blocks of facts --plan--> new and changed facts, distinct texts
                                |                               |
                                v                               v
                 Parquet parts <--write-- embeddings <--encode-- texts not embedded yet
                       |
                       +--commit--> the next version, or nothing at all

Everything before the commit can be lost and done again: parts that no commit names are invisible, and the
spool keeps finished embeddings for the next run.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from kblam_ray import storage
from kblam_ray.encoders import EncoderOptions, EncoderSettings, encoder_spec
from kblam_ray.encoders.base import EncoderSpec
from kblam_ray.errors import InputError
from kblam_ray.facts import InputFile, expand_inputs, write_rejected
from kblam_ray.facts.fact import DEFAULT_IDENTITY, Identity
from kblam_ray.job import JobConfig
from kblam_ray.ray_session import require_gpus, start_ray
from kblam_ray.table.live import live_index, read_live
from kblam_ray.table.log import TableLog, commit_parts, next_updated_at
from kblam_ray.table.pipeline import spool
from kblam_ray.table.pipeline.ambiguity import find_ambiguous_keys
from kblam_ray.table.pipeline.encode import EncodeReport, Pool, encode_texts, resume_from
from kblam_ray.table.pipeline.scan import Scan
from kblam_ray.table.pipeline.work import plan_work
from kblam_ray.table.pipeline.write import NO_FACTS, Stamp, WrittenFacts, write_facts_to_parts
from kblam_ray.table.plan import (
    CollidingRowsError,
    WriteMode,
    WritePlan,
    collision,
    plan_write,
    refuse_collisions_with_live,
)
from kblam_ray.table.schema import TableInfo
from kblam_ray.table.writing import write_deletes

DEFAULT_ENCODER = "all-MiniLM-L6-v2"

MAX_SYNC_PASSES = 5
"""A sync that another writer overtook looks again at what the table lacks, at most so often."""

_IDENTITY_COLUMNS = ["fact_id", "entity", "property", "value"]

_NOTHING_LIVE = pa.table({"fact_id": pa.array([], pa.int64()), "content_hash": pa.array([], pa.string())})


class EmbedSettings(JobConfig, EncoderOptions):
    """What `jobs/embed_kb.py` takes."""

    kb: str = Field(description="the table: a local path or s3://bucket/prefix; made if absent")
    input: list[str] = Field(min_length=1, description="facts: a file, directory, glob or s3:// prefix")
    mode: WriteMode = Field("upsert", description="upsert adds and changes; sync also deletes what the input lacks")
    on_error: Literal["fail", "skip"] = Field("fail", description="what a bad row does")
    identity: Identity | None = Field(
        None, description=f"what tells two facts apart (default: the table's, {DEFAULT_IDENTITY} for a new one)"
    )
    encoder: str | None = Field(
        None, description=f"encoder name (default: the table's, {DEFAULT_ENCODER} for a new one)"
    )
    num_workers: int | None = Field(None, ge=1, description="most encoder workers (default: one per CPU)")
    min_workers: int = Field(1, ge=1, description="encoder workers to start with; the pool grows with the backlog")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each encoder worker")


@dataclass(frozen=True)
class Increment:
    """What a caller adds to a run that is one step of a longer work, such as keeping a table in step with its sources.

    Attributes:
        log: the version to plan against, opened; None: there was no table.
        write_prefix: the beginning of the write's id, which every row carries.
        metadata: what the log shall say of the commit, by the version that it was planned against (None: no table) and
            the `updated_at` of its rows.
        scanned: called when the files have been read; what it raises ends the run.
        may_write: which of the planned facts, row numbers of the scan's index, may be written over that version.
    """

    log: TableLog | None
    write_prefix: str
    metadata: Callable[[int | None, int], Mapping[str, Any]]
    scanned: Callable[[Scan], None]
    may_write: Callable[[Scan, np.ndarray, int | None], np.ndarray]


def embed(
    settings: EmbedSettings, files: Sequence[InputFile] | None = None, increment: Increment | None = None
) -> dict[str, Any]:
    """Bring the table up to date with the input; returns the job's summary.

    Args:
        files: the input, in order; by default the files that `settings.input` names.
        increment: what a longer work asks of this step of it.

    There is one commit, or none if nothing changed. Only where another writer commits while a sync works, a further
    commit makes the version that the summary names equal to the input.

    Raises:
        InputError: nothing to read, a bad row (`on_error="fail"`), a wrong encoder or identity for the table, GPUs
            asked for that are not there.
        StorageError, EncoderError: the machinery failed; the table is as it was.
    """
    kb_uri = storage.normalize(settings.kb)
    files = expand_inputs(settings.input) if files is None else files
    log = increment.log if increment else TableLog.open_if_exists(kb_uri)
    encoder_settings, info = _agree_on_encoder(settings, log)
    start_ray()
    require_gpus(settings.gpus_per_worker)
    return _run(settings, kb_uri, Scan(files, info.identity), log, encoder_settings, info, increment)


def _run(
    settings: EmbedSettings,
    kb_uri: str,
    scan: Scan,
    log: TableLog | None,
    encoder_settings: EncoderSettings,
    info: TableInfo,
    increment: Increment | None,
) -> dict[str, Any]:
    if increment:
        increment.scanned(scan)
    scan.refuse_rejected(settings.on_error)
    previous = version = log.version if log else None
    live = live_index(kb_uri, version) if log else _NOTHING_LIVE
    first = plan = _plan(scan, live, settings.mode, info.identity, kb_uri, version, increment)
    if settings.mode == "sync" and not len(scan.index):
        raise InputError(
            "the input holds no facts, so --mode sync would delete the whole table",
            where=", ".join(settings.input),
            help="check the input; to empty a table on purpose, delete the facts or the table",
        )
    rejected_path = None
    if scan.num_rejected:
        rejected_path = storage.beside(kb_uri, "rejected", f"{uuid.uuid4().hex}.jsonl")
        write_rejected(scan.rejected(), rejected_path)
        _say(f"{scan.num_rejected} rows rejected: {rejected_path}")

    report = EncodeReport()
    added = changed = deleted = ambiguous = passes = 0
    num_facts = len(live)
    while not plan.is_empty:
        passes += 1
        base = version
        version, written = _write(settings, kb_uri, scan, plan, encoder_settings, info, report, base, increment)
        added, changed = added + len(plan.added), changed + len(plan.changed)
        deleted += len(plan.deleted_ids)
        num_facts = len(live) + len(plan.added) - len(plan.deleted_ids)
        ambiguous += _report_ambiguity(kb_uri, version, num_facts, written, info.encoder)
        if version == (0 if base is None else base + 1):
            break
        # Another writer committed in between.
        live = live_index(kb_uri, version)
        num_facts = len(live)
        if settings.mode == "upsert":
            break
        if passes == MAX_SYNC_PASSES:
            _say(f"the table is not equal to the input: others wrote to it during each of {passes} attempts")
            break
        plan = _plan(scan, live, settings.mode, info.identity, kb_uri, version, increment)
    _say_what_was_noticed(report)
    return {
        "kb": kb_uri,
        "version": version,
        "previous_version": previous,
        "committed": version != previous,
        "mode": settings.mode,
        "rows_read": scan.num_rows,
        "rows_rejected": scan.num_rejected,
        "rejected_path": rejected_path,
        "duplicates": first.duplicates,
        "added": added,
        "changed": changed,
        "deleted": deleted,
        "unchanged": first.unchanged,
        "texts_embedded": report.texts_embedded,
        "texts_resumed": report.texts_resumed,
        "texts_truncated": report.texts_truncated,
        "texts_with_unknown_tokens": report.texts_with_unknown_tokens,
        "ambiguous_keys": ambiguous,
        "num_facts": num_facts,
        "encoder": info.encoder.name,
        "encoder_revision": info.encoder.revision,
        "tokens": report.tokens,
        "cost_usd": round(report.cost_usd, 6),
    }


def _agree_on_encoder(settings: EmbedSettings, log: TableLog | None) -> tuple[EncoderSettings, TableInfo]:
    """The encoder to use and what the table will say of it, known before any work is done."""
    name = settings.encoder or (log.info.encoder.name if log else DEFAULT_ENCODER)
    options = settings.model_dump(include=set(EncoderOptions.model_fields))
    spec = encoder_spec(name, **options)
    identity = settings.identity or (log.info.identity if log else DEFAULT_IDENTITY)
    info = TableInfo(encoder=spec, identity=identity)
    if log:
        log.info.require_same(info, log.uri)
    # Workers check that their copy is the same one.
    return EncoderSettings(name=name, expected_revision=spec.revision, **options), info


def _plan(
    scan: Scan,
    live: pa.Table,
    mode: WriteMode,
    identity: Identity,
    kb_uri: str,
    version: int | None,
    increment: Increment | None,
) -> WritePlan:
    try:
        plan = plan_write(scan.index, live, mode)
    except CollidingRowsError as error:
        first, second = scan.facts_at(np.asarray(error.rows))
        raise collision(first, second, identity) from None
    if len(plan.changed):
        ids = scan.index["fact_id"].take(plan.changed).to_numpy()
        order = np.argsort(ids)
        for rows in read_live(kb_uri, version, columns=_IDENTITY_COLUMNS, fact_ids=ids):
            at = order[np.searchsorted(ids, rows["fact_id"].to_numpy(), sorter=order)]
            refuse_collisions_with_live(scan.facts_at(plan.changed[at]), [rows], identity)
    if increment:
        added, changed = (rows[increment.may_write(scan, rows, version)] for rows in (plan.added, plan.changed))
        plan = replace(plan, added=added, changed=changed)
    return plan


def _write(
    settings: EmbedSettings,
    kb_uri: str,
    scan: Scan,
    plan: WritePlan,
    encoder_settings: EncoderSettings,
    info: TableInfo,
    report: EncodeReport,
    version: int | None,
    increment: Increment | None,
) -> tuple[int, WrittenFacts]:
    """Encode, write and commit; returns the version that holds the write, and what was written."""
    dim, run_id = info.encoder.dim, uuid.uuid4().hex
    own_spool = spool.spool_uri(kb_uri, info.encoder, run_id)
    leftovers = spool.find_leftovers(kb_uri, info.encoder)
    written = NO_FACTS
    work = None
    report.spooled.clear()
    with spool.given_up_on_failure(own_spool):
        if len(plan.written):
            work = plan_work(scan.index, plan.written)
            work = resume_from(leftovers, work, own_spool, report)
            # What was copied is not needed twice: who tries again and again would fill the place.
            spool.remove_used_up(leftovers, work.encoded_hashes())
            work = encode_texts(scan.blocks, work, encoder_settings, dim, _pool(settings), own_spool, report)
        prefix = increment.write_prefix if increment else ""
        stamp = Stamp(updated_at=next_updated_at(kb_uri), write_id=prefix + run_id)
        if work is not None:
            written = write_facts_to_parts(scan.blocks, work, kb_uri, dim, stamp)
        deletes = write_deletes(kb_uri, version, plan.deleted_ids, info.identity, stamp.updated_at, stamp.write_id)
        metadata = increment.metadata(version, stamp.updated_at) if increment else None
        new_version = commit_parts(kb_uri, info, [*written.parts, *deletes], stamp.write_id, metadata)
    spool.remove_spool(own_spool)
    spool.remove_used_up(leftovers, work.hashes_D if work else None)
    return new_version, written


def _pool(settings: EmbedSettings) -> Pool:
    import ray

    # Whole CPUs of the cluster as it is, or may become when the pool's demand makes it grow.
    most = settings.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    return Pool(min(settings.min_workers, most), most, settings.gpus_per_worker)


def _report_ambiguity(kb_uri: str, version: int, num_facts: int, written: WrittenFacts, encoder: EncoderSpec) -> int:
    found = find_ambiguous_keys(kb_uri, version, num_facts, written, encoder.dim)
    if found.example:
        first, second = found.example
        _say(f"{len(found.fact_ids)} facts share a key embedding with another, such as {first!r} and {second!r}")
    return len(found.fact_ids)


def _say_what_was_noticed(report: EncodeReport) -> None:
    if report.texts_truncated:
        example = _excerpt(report.truncated_example)
        _say(f"{report.texts_truncated} texts are longer than the encoder reads, such as {example}")
    if report.texts_with_unknown_tokens:
        example = _excerpt(report.unknown_example)
        _say(f"{report.texts_with_unknown_tokens} texts have tokens unknown to the encoder, such as {example}")
    if report.texts_resumed:
        _say(f"{report.texts_resumed} texts were embedded by an earlier run and not again")


def _excerpt(text: str | None) -> str:
    text = text or "one of an earlier run"
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _say(note: str) -> None:
    print(f"embed: {note}", file=sys.stderr)
