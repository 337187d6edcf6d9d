"""Decide what a write must do: which facts are new, changed, unchanged, given twice, or gone.

The decision needs no texts, only hashes: 32 bytes per row of input, so ten million rows are planned in
a few hundred megabytes. Rows are told apart by their position in the input, and of two rows for one
fact the later wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import pyarrow as pa

from kblam_ray.errors import FactIdCollisionError
from kblam_ray.facts.fact import Fact, Identity, content_hash, fact_id, identity_fields

WriteMode = Literal["upsert", "sync"]
"""`upsert` adds and changes; `sync` also deletes the facts that the input lacks."""

INDEX_SCHEMA = pa.schema(
    [
        ("fact_id", pa.int64()),
        ("content_hash", pa.binary(16)),
        ("identity_hash", pa.uint64()),
    ]
)
"""What the plan needs to know of a row; `identity_hash` tells two identities with one fact_id apart."""


@dataclass(frozen=True)
class WritePlan:
    """What a write will do. Row numbers are positions in the index, in ascending order."""

    added: np.ndarray
    changed: np.ndarray
    deleted_ids: np.ndarray
    unchanged: int
    duplicates: int

    @property
    def written(self) -> np.ndarray:
        """Row numbers of the facts to embed and write, ascending."""
        return np.sort(np.concatenate([self.added, self.changed]))

    @property
    def is_empty(self) -> bool:
        return not (len(self.added) or len(self.changed) or len(self.deleted_ids))


def index_facts(facts: Iterable[Fact], identity: Identity) -> pa.Table:
    """One row of INDEX_SCHEMA per fact, in the order given."""
    ids, contents, identities = [], [], []
    for fact in facts:
        ids.append(fact_id(fact, identity))
        contents.append(bytes.fromhex(content_hash(fact)))
        identities.append(_identity_hash(identity_fields(fact, identity)))
    return pa.table([ids, contents, identities], schema=INDEX_SCHEMA)


def _identity_hash(fields: tuple[str, ...]) -> int:
    # Lengths first: fields joined by a separator alone are what fact_id hashes, and may coincide.
    data = ("".join(f"{len(field)}:" for field in fields) + "".join(fields)).encode("utf-8")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def plan_write(index: pa.Table, live: pa.Table, mode: WriteMode) -> WritePlan:
    """Compare the input's index with the table's live facts.

    Args:
        index: INDEX_SCHEMA, one row per input row, in input order.
        live: `fact_id` int64 ascending and `content_hash` string of the table's live facts.
        mode: see WriteMode.

    Raises:
        FactIdCollision: two rows of the input share an id and not their identity.
    """
    ids_N = index["fact_id"].to_numpy()
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    _refuse_collision(index, order_N, sorted_N)
    is_last_N = np.append(sorted_N[1:] != sorted_N[:-1], True)[: len(sorted_N)]
    winners_W, winner_ids_W = order_N[is_last_N], sorted_N[is_last_N]

    live_ids_M = live["fact_id"].to_numpy()
    known_W, at_W = _find(winner_ids_W, live_ids_M)
    same_W = known_W.copy()
    contents_N2 = _as_words(index["content_hash"])
    live_contents_M2 = _hex_as_words(live["content_hash"])
    same_W[known_W] = (contents_N2[winners_W[known_W]] == live_contents_M2[at_W[known_W]]).all(axis=1)

    deleted_ids = np.empty(0, np.int64)
    if mode == "sync":
        kept_M, _ = _find(live_ids_M, winner_ids_W)
        deleted_ids = live_ids_M[~kept_M]
    return WritePlan(
        added=np.sort(winners_W[~known_W]),
        changed=np.sort(winners_W[known_W & ~same_W]),
        deleted_ids=deleted_ids,
        unchanged=int(same_W.sum()),
        duplicates=len(ids_N) - len(winners_W),
    )


class CollidingRowsError(FactIdCollisionError):
    """Two rows of one input collide; `rows` are their positions, so that the caller can name the facts."""

    rows: tuple[int, int] = (0, 0)


def _refuse_collision(index: pa.Table, order_N: np.ndarray, sorted_N: np.ndarray) -> None:
    identities_N = index["identity_hash"].to_numpy()[order_N]
    clash = np.flatnonzero((sorted_N[1:] == sorted_N[:-1]) & (identities_N[1:] != identities_N[:-1]))
    if len(clash):
        first, second = sorted(int(row) for row in order_N[clash[0] : clash[0] + 2])
        error = CollidingRowsError(
            f"rows {first + 1} and {second + 1} are different facts with one fact_id {sorted_N[clash[0]]}",
            help=COLLISION_HELP,
        )
        error.rows = (first, second)
        raise error


COLLISION_HELP = "rename the entity or the property of one of them (a control character in a name is the usual cause)"


def collision(first: Fact, second: Fact, identity: Identity) -> FactIdCollisionError:
    """The error that names two facts of different identity and one id."""
    return FactIdCollisionError(
        f"two different facts have one fact_id {fact_id(first, identity)}: "
        f"{identity_fields(first, identity)!r} and {identity_fields(second, identity)!r}",
        help=COLLISION_HELP,
    )


def refuse_collisions_with_live(facts: Sequence[Fact], live_rows: Iterable[pa.Table], identity: Identity) -> None:
    """Check facts that replace live rows: each must be the same identity as the row it replaces.

    Args:
        facts: the facts that the plan calls changed.
        live_rows: live rows of the table with fact_id, entity, property and value, those of `facts` among them.
    """
    by_id = {fact_id(fact, identity): fact for fact in facts}
    for rows in live_rows:
        for id_, *texts in zip(
            *(rows[name].to_pylist() for name in ("fact_id", "entity", "property", "value")), strict=True
        ):
            fact = by_id.get(id_)
            there = Fact(*texts)
            if fact and identity_fields(fact, identity) != identity_fields(there, identity):
                raise collision(there, fact, identity)


def _find(needles: np.ndarray, haystack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each needle: whether the ascending haystack holds it, and where."""
    at = np.searchsorted(haystack, needles)
    found = np.zeros(len(needles), bool)
    inside = at < len(haystack)
    found[inside] = haystack[at[inside]] == needles[inside]
    return found, at


def _as_words(hashes: pa.ChunkedArray) -> np.ndarray:
    """16-byte hashes as uint64 [N, 2], which NumPy compares at memory speed."""
    array = hashes.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.binary(16))
    if not len(array):
        return np.empty((0, 2), np.uint64)
    data = np.frombuffer(array.buffers()[1], np.uint64)
    return data[array.offset * 2 : (array.offset + len(array)) * 2].reshape(-1, 2)


def _hex_as_words(hashes: pa.ChunkedArray) -> np.ndarray:
    text = "".join(hashes.to_pylist())
    return np.frombuffer(bytes.fromhex(text), np.uint64).reshape(-1, 2)
