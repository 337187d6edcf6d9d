"""Take up a few files in this process: plan, embed what is new with an encoder that stays loaded, commit."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from kblam_ray import storage
from kblam_ray.encoders import EncoderOptions, EncoderSettings, encoder_spec, load_encoder
from kblam_ray.encoders.base import Encoder, EncoderSpec
from kblam_ray.errors import InputError, KblamError
from kblam_ray.facts import Fact, RejectedRow, write_rejected
from kblam_ray.facts.fact import DEFAULT_IDENTITY, fact_id
from kblam_ray.table.live import find_winners
from kblam_ray.table.log import TableLog, commit, next_updated_at
from kblam_ray.table.pipeline.run import DEFAULT_ENCODER
from kblam_ray.table.plan import WritePlan
from kblam_ray.table.refresh.history import History
from kblam_ray.table.refresh.ledger import WRITE_PREFIX, Verdict
from kblam_ray.table.refresh.reading import ReadBatch, read_batch
from kblam_ray.table.refresh.settings import RefreshSettings
from kblam_ray.table.refresh.sources import SourceFile, Sources
from kblam_ray.table.schema import TableInfo
from kblam_ray.table.writing import plan_facts, texts_of, write_deletes, write_upserts

MAX_REPLANS = 5
"""How often a plan is made again before its commit because another refresh committed meanwhile."""

_MAX_KEPT_EMBEDDINGS = 50_000


Limit = frozenset[int] | None
"""Of a file in dispute, the `updated_at` of the rows that it may put right; None: it may write over any row."""

Disputed = Callable[[], frozenset[str]]
"""The files in dispute as the ledger now knows: they have to be taken up together."""


@dataclass
class Outcome:
    """What became of the files of one refresh.

    Attributes:
        version: that holds the commit; None if there was nothing to write.
        taken: files that the table is in step with, by the commit or because nothing differed.
        refused, moved: as in `ReadBatch`.
        rejected_path: where the rows are that are no facts; None if there were none.
    """

    version: int | None = None
    taken: list[SourceFile] = field(default_factory=list)
    refused: dict[SourceFile, KblamError] = field(default_factory=dict)
    moved: list[SourceFile] = field(default_factory=list)
    added: int = 0
    changed: int = 0
    deleted: int = 0
    texts_embedded: int = 0
    rows_rejected: int = 0
    rejected_path: str | None = None


class Resident:
    """Takes up small batches. The encoder is loaded when it is first needed and stays."""

    def __init__(self, settings: RefreshSettings, history: History, sources: Sources) -> None:
        self._settings, self._history, self._sources = settings, history, sources
        self._asked: EncoderSpec | None = None
        self._spec: EncoderSpec | None = None  # of the encoder and of the embeddings
        self._encoder: Encoder | None = None
        self._embeddings: dict[str, np.ndarray] = {}

    def encoder(self) -> Encoder:
        """The encoder of the table, or of the one that will be made.

        Raises:
            EncoderError, EncoderNotFoundError: it cannot be had.
        """
        return self._encoder_of(self.info(self._history.log).encoder)

    def _encoder_of(self, spec: EncoderSpec) -> Encoder:
        if self._encoder is None or not _is_same(spec, self._spec):
            self._forget_others_than(spec)
            name = self._settings.encoder or spec.name
            self._encoder = load_encoder(EncoderSettings(name=name, expected_revision=spec.revision, **self._options()))
        return self._encoder

    def _forget_others_than(self, spec: EncoderSpec) -> None:
        """Another program may have made the table, or made it anew, with another encoder than the one in memory."""
        if not _is_same(spec, self._spec):
            self._spec, self._encoder, self._embeddings = spec, None, {}

    def info(self, log: TableLog | None) -> TableInfo:
        """What a version says that its table is made with, or, without one, what it will be made with.

        Raises:
            EncoderMismatchError, TableError: another encoder or identity was asked for than the table's.
        """
        if self._asked is None and (self._settings.encoder or log is None):
            self._asked = encoder_spec(self._settings.encoder or DEFAULT_ENCODER, **self._options())
        there = log.info if log else TableInfo(encoder=self._asked, identity=DEFAULT_IDENTITY)
        identity = self._settings.identity or there.identity
        asked = TableInfo(encoder=self._asked if self._settings.encoder else there.encoder, identity=identity)
        if log:
            log.info.require_same(asked, log.uri)
        return asked

    def _options(self) -> dict[str, Any]:
        return self._settings.model_dump(include=set(EncoderOptions.model_fields))

    def take_up(self, files: Sequence[SourceFile], *, sync: bool, disputed: Disputed) -> Outcome | None:
        """Bring the table in step with files, in one commit, or in none if nothing differs.

        Args:
            files: in the order in which they count; with `sync` all of the sources.
            sync: whether facts that are in no file go.
            disputed: nothing is done if one that is not among `files` has come into dispute.

        Returns:
            None: it is too much for this process, and nothing was done.

        Raises:
            FactIdCollisionError: facts of the files collide.
            InputError: a sync of files that hold no facts at all.
            StorageError, EncoderError: the machinery failed; the table is as before.
        """
        batch = read_batch(files, self._sources, self._settings.on_error)
        if batch is None:
            return None
        outcome = Outcome(refused=batch.refused, moved=batch.moved)
        if sync and len(batch.facts) < len(files):
            return outcome  # facts of a file that cannot be read must not go
        if sync and not any(batch.facts.values()):
            raise InputError(
                "the input holds no facts, so a sync would delete the whole table",
                where=", ".join(self._settings.input),
                help="check the input; to empty a table on purpose, delete the facts or the table",
            )
        if batch.facts and not self._commit(batch, outcome, sync, disputed):
            return None
        return outcome

    def _commit(self, batch: ReadBatch, outcome: Outcome, sync: bool, disputed: Disputed) -> bool:
        """Plan and commit what was read; False if there are too many texts to embed here."""
        history = self._history
        known_until = history.ledger.last_seen
        for tries_left in reversed(range(MAX_REPLANS)):
            log, base = history.look(), history.base
            if history.ledger.last_seen > known_until:
                # Another refresh committed since the files were read: are they still what they were?
                self._drop_moved(batch, outcome)
                known_until = history.ledger.last_seen
            if not batch.facts or (sync and outcome.moved):
                return True
            if not sync and disputed() - {file.uri for file in batch.facts}:
                return True  # those must be read together with these
            files = [file for file in batch.facts if sync or self._verdict(file) is not Verdict.DONE]
            facts = [fact for file in files for fact in batch.facts[file]]
            info = self.info(log)
            plan = plan_facts(facts, info.identity, log, "sync" if sync else "upsert")
            if not sync:
                limits = [limit for file in files for limit in [self._limit(file)] * len(batch.facts[file])]
                plan = restricted(plan, facts, limits, info, log)
            written = [facts[row] for row in plan.written]
            if not self._embed(texts_of(written), info.encoder, outcome):
                return False
            history.look()
            if (history.ledger.last_seen <= base and _is_one_table(log, history.log)) or not tries_left:
                break
        tags = {file.uri: file.tag for file in files}
        # Before the commit: once it says that the files are taken up, nobody reads them for their bad rows again.
        self._write_rejected([row for row in batch.rejected if row.file in tags], outcome)
        outcome.taken = list(batch.facts)
        if plan.is_empty:
            history.observe(tags, base, complete=sync)
            return True
        write_id = WRITE_PREFIX + uuid.uuid4().hex
        updated_at = next_updated_at(history.log or history.uri)
        parts = write_upserts(history.uri, written, info.identity, self._embeddings, updated_at, write_id)
        if log is not None:
            parts += write_deletes(log, None, plan.deleted_ids, info.identity, updated_at, write_id)
        said = history.saying(tags, base, complete=sync, updated_at=updated_at)
        outcome.version = commit(history.uri, info, parts, write_id, said).version
        history.committed()
        outcome.added, outcome.changed = len(plan.added), len(plan.changed)
        outcome.deleted = len(plan.deleted_ids)
        return True

    def _write_rejected(self, rows: list[RejectedRow], outcome: Outcome) -> None:
        if not rows:
            return
        # Named after what it holds: a commit that is tried again writes the same file.
        digest = blake2b(repr(rows).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
        place = storage.beside(self._history.uri, "rejected", f"{digest}.jsonl")
        write_rejected(rows, place)
        outcome.rows_rejected, outcome.rejected_path = len(rows), place
        print(f"refresh: {len(rows)} rows rejected: {place}", file=sys.stderr, flush=True)

    def _verdict(self, file: SourceFile) -> Verdict:
        return self._history.ledger.verdict(file.uri, file.tag)

    def _limit(self, file: SourceFile) -> Limit:
        return self._history.ledger.stamps(file.uri) if self._verdict(file) is Verdict.DISPUTED else None

    def _drop_moved(self, batch: ReadBatch, outcome: Outcome) -> None:
        for file in list(batch.facts):
            if not file.is_still(self._sources.look_at(file.uri)):
                del batch.facts[file]
                outcome.moved.append(file)

    def _embed(self, texts: list[str], spec: EncoderSpec, outcome: Outcome) -> bool:
        self._forget_others_than(spec)
        new = [text for text in texts if text not in self._embeddings]
        if len(new) > self._settings.small_texts:
            return False
        if len(self._embeddings) + len(new) > _MAX_KEPT_EMBEDDINGS:
            self._embeddings = {text: self._embeddings[text] for text in texts if text in self._embeddings}
        if new:
            self._embeddings.update(zip(new, self._encoder_of(spec).encode(new), strict=True))
            outcome.texts_embedded += len(new)
        return True


def _is_same(spec: EncoderSpec, other: EncoderSpec | None) -> bool:
    # By what is inside, as in `TableInfo.require_same`: one encoder may go by several names.
    return other is not None and (spec.revision, spec.dim) == (other.revision, other.dim)


def _is_one_table(log: TableLog | None, now: TableLog | None) -> bool:
    """Whether two looks saw one table, or both none: a plan for one table says nothing of another."""
    return (log and log.table_id) == (now and now.table_id)


def restricted(
    plan: WritePlan, facts: Sequence[Fact], limits: Sequence[Limit], info: TableInfo, log: TableLog | None
) -> WritePlan:
    """The plan without the facts that a file in dispute may not put right; see `may_write`."""

    def allowed(rows: np.ndarray) -> np.ndarray:
        ids = np.array([fact_id(facts[row], info.identity) for row in rows], np.int64)
        return rows[may_write(ids, [limits[row] for row in rows], log)]

    return replace(plan, added=allowed(plan.added), changed=allowed(plan.changed))


def may_write(ids_W: np.ndarray, limits_W: Sequence[Limit], log: TableLog | None) -> np.ndarray:
    """Whether each planned fact may be written over its row in a version, whose file may be in dispute: bool [W].

    A file in dispute was taken up already: only what the refreshes wrote that crossed may be put right. What others
    wrote since, or was taken up later, stays.

    Args:
        limits_W: of each fact the `updated_at` of the rows that may be written over; None: any.
    """
    may_W = np.ones(len(ids_W), bool)
    limited = [row for row, limit in enumerate(limits_W) if limit is not None]
    if log is None or not limited:
        return may_W
    winners = find_winners(log, fact_ids=ids_W[limited])
    place = {int(id_): at for at, id_ in enumerate(winners.fact_ids_M)}
    for row in limited:
        at, limit = place.get(int(ids_W[row])), limits_W[row]
        if at is not None and limit is not None:
            is_of_refresh = winners.write_ids_M[at].as_py().startswith(WRITE_PREFIX)
            may_W[row] = is_of_refresh and int(winners.updated_at_M[at]) in limit
    return may_W
