"""Facts in memory against one version of a table: what a write of them must do, and the files that do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from kblam_ray.facts.fact import Fact, Identity, content_hash, fact_id, key_text
from kblam_ray.table.live import find_winners, read_live
from kblam_ray.table.log import TableLog
from kblam_ray.table.part import PartFile, write_part
from kblam_ray.table.plan import (
    CollidingRowsError,
    WriteMode,
    WritePlan,
    collision,
    index_facts,
    plan_write,
    refuse_collisions_with_live,
)
from kblam_ray.table.schema import SCHEMA, delete_rows, upsert_rows

FACTS_PER_PART = 50_000
"""Facts in one file of a write from memory."""

DELETES_PER_PART = 500_000

_IDENTITY_COLUMNS = ["fact_id", "entity", "property", "value"]
_PLANNED_COLUMNS = ["content_hash", *_IDENTITY_COLUMNS]

_NOTHING_LIVE = pa.schema([SCHEMA.field(name) for name in _PLANNED_COLUMNS]).empty_table()


def plan_facts(facts: Sequence[Fact], identity: Identity, log: TableLog | None, mode: WriteMode) -> WritePlan:
    """Compare facts with what is live in a version; of several facts with one identity the last counts.

    Args:
        log: the version; None: there is no table yet.

    Raises:
        FactIdCollisionError: two different facts share one id.
        StorageError: the version cannot be read.
    """
    index = index_facts(facts, identity)
    ids = index["fact_id"].to_numpy()
    live = _NOTHING_LIVE
    if log:
        # A sync has to know of every live fact whether it is among the given ones.
        live = find_winners(log, fact_ids=ids if mode == "upsert" else None).live().read_sorted(_PLANNED_COLUMNS)
    try:
        plan = plan_write(index, live, mode)
    except CollidingRowsError as error:
        first, second = error.rows
        raise collision(facts[first], facts[second], identity) from None
    if len(plan.changed):
        replaced = live.filter(pa.array(np.isin(live["fact_id"].to_numpy(), ids[plan.changed])))
        refuse_collisions_with_live([facts[row] for row in plan.changed], [replaced], identity)
    return plan


def texts_of(facts: Sequence[Fact]) -> list[str]:
    """The distinct texts to embed: key texts, then value texts, each in the order of first use."""
    keys = (key_text(fact.entity, fact.property) for fact in facts)
    return list(dict.fromkeys([*keys, *(fact.value for fact in facts)]))


def write_upserts(
    uri: str,
    facts: Sequence[Fact],
    identity: Identity,
    embeddings: Mapping[str, np.ndarray],
    updated_at: int,
    write_id: str,
) -> list[PartFile]:
    """Write facts, each identity at most once, as files under the table that no commit names yet.

    Args:
        embeddings: of every text of `texts_of(facts)`, float [P].
        updated_at, write_id: see `upsert_rows`.

    Raises:
        InputError: an embedding that float16 cannot hold.
        StorageError: the place cannot be written.
    """
    parts = []
    for start in range(0, len(facts), FACTS_PER_PART):
        batch = facts[start : start + FACTS_PER_PART]
        rows = upsert_rows(
            fact_ids=[fact_id(fact, identity) for fact in batch],
            entities=[fact.entity for fact in batch],
            properties=[fact.property for fact in batch],
            values=[fact.value for fact in batch],
            metadata=[fact.metadata for fact in batch],
            content_hashes=[content_hash(fact) for fact in batch],
            key_embeddings_MP=np.stack([embeddings[key_text(fact.entity, fact.property)] for fact in batch]),
            value_embeddings_MP=np.stack([embeddings[fact.value] for fact in batch]),
            updated_at=updated_at,
            write_id=write_id,
        )
        parts.append(write_part(uri, rows))
    return parts


def write_deletes(
    table: str | TableLog,
    version: int | None,
    fact_ids: np.ndarray,
    identity: Identity,
    updated_at: int,
    write_id: str,
) -> list[PartFile]:
    """Write delete rows for live facts of a version, which keep the identity of what they delete.

    Args:
        version: None: that of `table`, or its newest.
        fact_ids: int64, of live facts.
    """
    if not len(fact_ids):
        return []
    uri = table if isinstance(table, str) else table.uri
    gone = pa.concat_tables(read_live(table, version, columns=_IDENTITY_COLUMNS, fact_ids=fact_ids))
    return [
        write_part(
            uri,
            delete_rows(
                fact_ids=rows["fact_id"],
                entities=rows["entity"],
                properties=rows["property"],
                values=rows["value"] if "value" in identity.split(",") else None,
                updated_at=updated_at,
                write_id=write_id,
            ),
        )
        for rows in (gone.slice(start, DELETES_PER_PART) for start in range(0, len(gone), DELETES_PER_PART))
    ]
