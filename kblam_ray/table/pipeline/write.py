"""Join facts with the embeddings of their texts and write the table's Parquet files, on the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kblam_ray.facts.fact import Fact, fact_id
from kblam_ray.table.part import PartFile, write_part
from kblam_ray.table.pipeline.reports import reporting, reports
from kblam_ray.table.pipeline.scan import TASK_CPUS, Block, fetch_rows
from kblam_ray.table.pipeline.spool import read_vectors
from kblam_ray.table.pipeline.work import Work, ranges
from kblam_ray.table.schema import upsert_rows

if TYPE_CHECKING:
    from ray import ObjectRef

PART_EMBEDDING_BYTES = 64_000_000
"""Embeddings in one Parquet file; a worker holds about four times as much while it writes one."""

FACT_COLUMNS = ["fact_id", "entity", "property", "value", "metadata", "content_hash"]


@dataclass(frozen=True)
class Stamp:
    """What every row of one write carries: the order of writes is (updated_at, write_id)."""

    updated_at: int
    write_id: str


@dataclass(frozen=True)
class WrittenFacts:
    """The files of a write, not yet committed, and what tells its keys apart.

    Attributes:
        key_ids_W: int64, one number per key text (facts of one entity and property share it).
        key_digests_W: uint64, equal for equal key embeddings.
    """

    parts: list[PartFile]
    fact_ids_W: np.ndarray
    key_ids_W: np.ndarray
    key_digests_W: np.ndarray


NO_FACTS = WrittenFacts([], np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))


def write_facts_to_parts(blocks: Sequence[Block], work: Work, kb_uri: str, dim: int, stamp: Stamp) -> WrittenFacts:
    """Write every fact of the work, with its two embeddings, as Parquet files under the table."""
    import ray

    rows_per_part = max(1, PART_EMBEDDING_BYTES // (4 * dim))
    runs = ranges(work.text_bytes_W, rows_per_part)
    written = ray.data.from_items(runs, override_num_blocks=len(runs)).map_batches(
        _write_one_part,
        batch_size=1,
        fn_kwargs={
            "blocks": list(blocks),
            "work_ref": ray.put(work),
            "kb_uri": kb_uri,
            "dim": dim,
            "stamp": stamp,
        },
        num_cpus=TASK_CPUS,
    )
    found = [NO_FACTS, *reports(written)]
    return WrittenFacts(
        parts=[part for facts in found for part in facts.parts],
        fact_ids_W=np.concatenate([facts.fact_ids_W for facts in found]),
        key_ids_W=np.concatenate([facts.key_ids_W for facts in found]),
        key_digests_W=np.concatenate([facts.key_digests_W for facts in found]),
    )


@reporting
def _write_one_part(
    batch: dict[str, np.ndarray], blocks: list[Block], work_ref: ObjectRef, kb_uri: str, dim: int, stamp: Stamp
) -> WrittenFacts:
    import ray

    work: Work = ray.get(work_ref)
    part = slice(int(batch["start"][0]), int(batch["stop"][0]))
    facts = fetch_rows(blocks, work.block_W[part], work.row_W[part], FACT_COLUMNS)
    keys_BP, values_BP = gather_embeddings(work, work.text_ids_W2[part], dim)
    fact_ids = facts["fact_id"].to_numpy()
    rows = upsert_rows(
        fact_ids=fact_ids,
        entities=facts["entity"],
        properties=facts["property"],
        values=facts["value"],
        metadata=facts["metadata"],
        content_hashes=[content.hex() for content in facts["content_hash"].to_pylist()],
        key_embeddings_MP=keys_BP,
        value_embeddings_MP=values_BP,
        updated_at=stamp.updated_at,
        write_id=stamp.write_id,
    )
    return WrittenFacts([write_part(kb_uri, rows)], fact_ids, key_ids(facts), key_digests(keys_BP))


def gather_embeddings(work: Work, text_ids_B2: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Key and value embeddings of a batch from the spool: two float16 [B, P]. Holds one spool file at a time."""
    ids, inverse = np.unique(text_ids_B2, return_inverse=True)
    inverse_B2 = inverse.reshape(text_ids_B2.shape)
    vectors_UP = np.empty((len(ids), dim), np.float16)
    files_U, rows_U = work.file_D[ids], work.place_D[ids]
    for number in np.unique(files_U):
        at = np.flatnonzero(files_U == number)
        vectors_UP[at] = read_vectors(work.files[number], dim)[rows_U[at]]
    return vectors_UP[inverse_B2[:, 0]], vectors_UP[inverse_B2[:, 1]]


def key_ids(rows: pa.Table) -> np.ndarray:
    """int64 per row, equal where entity and property are."""
    names = zip(rows["entity"].to_pylist(), rows["property"].to_pylist(), strict=True)
    return np.array([fact_id(Fact(entity, name, "")) for entity, name in names], np.int64)


def key_digests(embeddings_MP: np.ndarray) -> np.ndarray:
    """64 bits per embedding, equal for equal embeddings: a sum of its numbers' bits with fixed odd weights."""
    weights_P = np.random.default_rng(0).integers(0, 2**64, embeddings_MP.shape[1], np.uint64) | np.uint64(1)
    bits_MP = np.ascontiguousarray(embeddings_MP, np.float16).view(np.uint16)
    digests_M = np.empty(len(bits_MP), np.uint64)
    for start in range(0, len(bits_MP), 4_096):  # widening to 64 bits a few rows at a time
        rows = slice(start, start + 4_096)
        digests_M[rows] = (bits_MP[rows].astype(np.uint64) * weights_P).sum(axis=1, dtype=np.uint64)
    return digests_M
