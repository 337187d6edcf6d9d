"""The knowledge base as Python sees it: open it at a version, read it, change it, keep it tidy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kblam_ray.encoders.base import Encoder, EncoderSpec
from kblam_ray.encoders.load import encoder_spec, load_encoder
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import TableError, TableNotFoundError
from kblam_ray.facts.fact import DEFAULT_IDENTITY, Fact, Identity, fact_id
from kblam_ray.table.changes import Changes, find_changes
from kblam_ray.table.compact import RETENTION_H, TARGET_FILE_BYTES, compact
from kblam_ray.table.given import FactLike, facts_from, identities_from
from kblam_ray.table.live import find_winners
from kblam_ray.table.log import TableLog, commit, next_updated_at
from kblam_ray.table.opening import check_location
from kblam_ray.table.part import PartFile, write_part
from kblam_ray.table.plan import refuse_collisions_with_live
from kblam_ray.table.schema import TableInfo, delete_rows, new_write_id
from kblam_ray.table.snapshot import Snapshot, read_snapshot
from kblam_ray.table.vacuum import vacuum
from kblam_ray.table.writing import plan_facts, texts_of, write_upserts

EncoderLike = Encoder | EncoderSettings | str
"""A loaded encoder, or the name or settings to load it with when it is first needed."""


@dataclass(frozen=True)
class WriteOutcome:
    """The version that holds a write, and how many facts it concerned; of several rows for one fact the last counts."""

    version: int
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0


class KnowledgeBase:
    """A handle on one version of a table of embedded facts; see `create` and `open`.

    The handle stays at its version until it writes, or until `refresh`. Opened with a version it is pinned there: it
    reads that version and does not write.
    """

    _log: TableLog | None
    _num_facts: int | None
    _known: tuple[TableLog, ...] = ()

    def __init__(self, uri: str, info: TableInfo, log: TableLog | None, encoder: EncoderLike, *, pinned: bool) -> None:
        self.uri = uri
        self.info = info
        self.pinned = pinned
        self._encoder = encoder
        self._move_to(log)

    @classmethod
    def create(cls, uri: str, encoder: EncoderLike, *, identity: Identity = DEFAULT_IDENTITY) -> KnowledgeBase:
        """A knowledge base that does not exist yet; the first facts upserted make version 0. Writes nothing.

        Args:
            uri: a local path or `s3://bucket/prefix`.
            encoder: makes all its embeddings, now and later.
            identity: what tells two facts apart.

        Raises:
            TableError: there is a table at `uri` already.
            EncoderNotFoundError: no such encoder.
        """
        uri = check_location(uri)
        log = TableLog.open_if_exists(uri)
        if log is not None:
            raise TableError("there is a table already", where=uri, help="open it, or choose another location")
        spec = encoder.spec if isinstance(encoder, Encoder) else encoder_spec(encoder)
        return cls(uri, TableInfo(encoder=spec, identity=identity), None, encoder, pinned=False)

    @classmethod
    def open(cls, uri: str, version: int | None = None, *, encoder: EncoderLike | None = None) -> KnowledgeBase:
        """Open an existing knowledge base at its newest version, or pinned at `version`.

        Args:
            encoder: what to embed new facts with; by default the table's encoder is loaded by name when needed.

        Raises:
            TableNotFoundError: there is no table, or it lacks the version.
            TableError: the table is not one of ours.
            EncoderMismatchError: `encoder` is not the table's.
            StorageError: the store does not answer.
        """
        log = TableLog.open(uri, version)
        if isinstance(encoder, Encoder):
            log.info.require_same(TableInfo(encoder=encoder.spec, identity=log.info.identity), log.uri)
        return cls(log.uri, log.info, log, encoder or log.info.encoder.name, pinned=version is not None)

    @classmethod
    def at(cls, log: TableLog, known: Sequence[TableLog] = ()) -> KnowledgeBase:
        """A handle pinned at a version that was opened before, whose log is not read again.

        Args:
            known: other versions of the same table, which `changes` does not open again either.
        """
        kb = cls(log.uri, log.info, log, log.info.encoder.name, pinned=True)
        kb._known = (log, *known)
        return kb

    @property
    def version(self) -> int | None:
        """The table version that this handle reads; None before the first facts."""
        return None if self._log is None else self._log.version

    @property
    def num_facts(self) -> int:
        """Live facts of this version."""
        if self._num_facts is None:
            self._num_facts = 0 if self._log is None else len(find_winners(self._log).live())
        return self._num_facts

    @property
    def encoder(self) -> EncoderSpec:
        """Name, revision and dimension of the encoder of every embedding."""
        return self.info.encoder

    @property
    def table_id(self) -> str | None:
        """What tells this table from others, at whatever place and time; None before the first facts."""
        return None if self._log is None else self._log.table_id

    def refresh(self) -> int | None:
        """Move to the newest version and return it.

        Raises:
            TableError: the handle is pinned.
        """
        self._refuse_pinned("refresh")
        self._move_to(self._newest())
        return self.version

    def snapshot(self, version: int | None = None) -> Snapshot:
        """Facts and embeddings of `version`, by default this handle's.

        Raises:
            TableNotFoundError: no such version, or no facts yet.
        """
        if version is None:
            return read_snapshot(self._existing())
        return read_snapshot(self.uri, version)

    def changes(self, from_version: int, to_version: int) -> Changes:
        """What turns the live facts of one version into those of another; the other way round for a rollback."""
        return find_changes(self.uri, from_version, to_version, self._known)

    def upsert(self, facts: Iterable[FactLike]) -> int:
        """Add facts and replace those whose text or metadata changed; only these are embedded.

        Of several rows for one fact the last counts.

        Returns:
            The version that holds the facts: this one, if nothing changed.

        Raises:
            BadRowError: an item is not a fact.
            FactIdCollisionError: two different facts share one id.
            EncoderError: the encoder failed; nothing was written.
            StorageError: the store failed; nothing is visible.
        """
        return self.write(facts).version

    def write(self, facts: Iterable[FactLike]) -> WriteOutcome:
        """What `upsert` does, and how many facts were new, changed and unchanged."""
        self._refuse_pinned("write")
        given = facts_from(facts)
        self._move_to(self._newest())
        plan = plan_facts(given, self.info.identity, self._log, "upsert")
        version = (
            self._existing().version if plan.is_empty else self._commit_facts([given[row] for row in plan.written])
        )
        return WriteOutcome(version, len(plan.added), len(plan.changed), plan.unchanged)

    def delete(self, identities: Iterable[FactLike]) -> int:
        """Delete facts named by (entity, property), or by all three texts in a multi-valued table.

        Facts that are not live are passed over.

        Returns:
            The version without the facts: this one, if none of them was live.

        Raises:
            BadRowError: an item does not name a fact.
            TableNotFoundError: there are no facts yet.
        """
        return self.remove(identities).version

    def remove(self, identities: Iterable[FactLike] = (), *, fact_ids: Iterable[int] = ()) -> WriteOutcome:
        """What `delete` does, for facts named by their ids, too; and how many were deleted, in one commit.

        Raises:
            BadRowError, TableNotFoundError: see `delete`.
        """
        self._refuse_pinned("delete")
        self._move_to(self._newest())
        log = self._existing()
        named = identities_from(identities, self.info.identity)
        ids = np.array([*(fact_id(fact, self.info.identity) for fact in named), *fact_ids], np.int64)
        columns = ["fact_id", "entity", "property", "value"]
        rows = find_winners(log, fact_ids=np.unique(ids)).live().read_sorted(columns)
        if not len(rows):
            return WriteOutcome(log.version)
        refuse_collisions_with_live(named, [rows], self.info.identity)
        write_id = new_write_id()
        deletes = delete_rows(
            fact_ids=rows["fact_id"],
            entities=rows["entity"],
            properties=rows["property"],
            values=rows["value"] if "value" in self.info.identity.split(",") else None,
            updated_at=next_updated_at(log),
            write_id=write_id,
        )
        return WriteOutcome(self._commit([write_part(self.uri, deletes)], write_id), deleted=len(rows))

    def compact(self, *, target_file_bytes: int = TARGET_FILE_BYTES, retention_h: float = RETENTION_H) -> int:
        """Rewrite small and outdated files as few sorted ones; returns the version that holds the result.

        Reading, snapshots and changes give the same before and after; see `kblam_ray.table.compact`.
        """
        self._refuse_pinned("compact")
        version = compact(self.uri, target_file_bytes=target_file_bytes, retention_h=retention_h)
        self._move_to(TableLog.open(self.uri, version))
        return version

    def vacuum(self, retention_h: int = RETENTION_H, *, allow_short: bool = False) -> list[str]:
        """Remove the files of versions older than `retention_h` hours; see `kblam_ray.table.vacuum`."""
        self._refuse_pinned("vacuum")
        removed = vacuum(self.uri, retention_h, allow_short=allow_short)
        self.refresh()
        return removed

    def _move_to(self, log: TableLog | None) -> None:
        self._log = log
        self._num_facts = None

    def _existing(self) -> TableLog:
        if self._log is None:
            raise TableNotFoundError("there is no table yet", where=self.uri, help="upsert the first facts")
        return self._log

    def _newest(self) -> TableLog | None:
        log = TableLog.open_if_exists(self.uri)
        if log is not None:
            log.info.require_same(self.info, self.uri)
        return log

    def _refuse_pinned(self, action: str) -> None:
        if self.pinned:
            raise TableError(
                f"cannot {action} through a handle that is pinned at version {self.version}",
                where=self.uri,
                help="open the knowledge base without a version to change it",
            )

    def _commit_facts(self, facts: list[Fact]) -> int:
        texts = texts_of(facts)
        embeddings = dict(zip(texts, self._loaded_encoder().encode(texts), strict=True))
        # Embedding may take long; asking for the time afterwards keeps the span from `updated_at` to commit short.
        updated_at, write_id = next_updated_at(self._log or self.uri), new_write_id()
        parts = write_upserts(self.uri, facts, self.info.identity, embeddings, updated_at, write_id)
        return self._commit(parts, write_id)

    def _commit(self, parts: list[PartFile], write_id: str) -> int:
        log = commit(self.uri, self.info, parts, write_id)
        self._move_to(log)
        return log.version

    def _loaded_encoder(self) -> Encoder:
        if not isinstance(self._encoder, Encoder):
            encoder = load_encoder(self._encoder)
            self.info.require_same(TableInfo(encoder=encoder.spec, identity=self.info.identity), self.uri)
            self._encoder = encoder
        return self._encoder
