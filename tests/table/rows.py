"""Write rows with times of the test's choosing straight to a table, as a writer with another clock would."""

from __future__ import annotations

import numpy as np
from fake_encoder import DIM, FakeEncoder, embedding

from kblam_ray.facts.fact import Fact, content_hash, fact_id, key_text
from kblam_ray.table.log import commit_parts
from kblam_ray.table.part import PartFile, write_part
from kblam_ray.table.schema import TableInfo, delete_rows, new_write_id, upsert_rows

INFO = TableInfo(encoder=FakeEncoder().spec)


def stack(texts: list[str]) -> np.ndarray:
    return np.stack([embedding(text) for text in texts]) if texts else np.empty((0, DIM), np.float16)


def upsert_part(uri: str, facts: list[Fact], updated_at: int, write_id: str) -> PartFile:
    rows = upsert_rows(
        fact_ids=[fact_id(fact) for fact in facts],
        entities=[fact.entity for fact in facts],
        properties=[fact.property for fact in facts],
        values=[fact.value for fact in facts],
        metadata=[fact.metadata for fact in facts],
        content_hashes=[content_hash(fact) for fact in facts],
        key_embeddings_MP=stack([key_text(fact.entity, fact.property) for fact in facts]),
        value_embeddings_MP=stack([fact.value for fact in facts]),
        updated_at=updated_at,
        write_id=write_id,
    )
    return write_part(uri, rows)


def delete_part(uri: str, facts: list[Fact], updated_at: int, write_id: str) -> PartFile:
    rows = delete_rows(
        fact_ids=[fact_id(fact) for fact in facts],
        entities=[fact.entity for fact in facts],
        properties=[fact.property for fact in facts],
        updated_at=updated_at,
        write_id=write_id,
    )
    return write_part(uri, rows)


def commit_upserts(uri: str, facts: list[Fact], updated_at: int, write_id: str | None = None) -> int:
    write_id = write_id or new_write_id()
    return commit_parts(uri, INFO, [upsert_part(uri, facts, updated_at, write_id)], write_id)


def commit_deletes(uri: str, facts: list[Fact], updated_at: int, write_id: str | None = None) -> int:
    write_id = write_id or new_write_id()
    return commit_parts(uri, INFO, [delete_part(uri, facts, updated_at, write_id)], write_id)


def contents(snapshot) -> dict[tuple[str, str], str]:
    """What a snapshot says: (entity, property) -> value, after checking that its parts agree with each other."""
    rows = snapshot.facts.to_pylist()
    assert len(rows) == snapshot.num_facts
    ids = [row["fact_id"] for row in rows]
    assert ids == sorted(set(ids)) == snapshot.fact_ids_M.tolist()
    for row in rows:
        fact = Fact(row["entity"], row["property"], row["value"], row["metadata"])
        assert row["fact_id"] == fact_id(fact)
        assert row["content_hash"] == content_hash(fact)
    keys = stack([key_text(row["entity"], row["property"]) for row in rows])
    np.testing.assert_array_equal(snapshot.key_embeddings_MP, keys)
    np.testing.assert_array_equal(snapshot.value_embeddings_MP, stack([row["value"] for row in rows]))
    return {(row["entity"], row["property"]): row["value"] for row in rows}


def applied(before: dict, changes) -> dict:
    """`before` with `changes` applied, after checking that they delete nothing that is not there."""
    ids = {fact_id(Fact(*name, "-")): name for name in before}
    after = dict(before)
    for deleted in changes.deleted_ids.tolist():
        del after[ids[deleted]]
    return {**after, **contents(changes.upserts)}
