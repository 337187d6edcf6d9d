"""What a table stores: its columns, its description, and how embeddings become bytes and back.

Shape legend: M facts, P encoder dim. Embeddings are stored as binary, P little-endian float16 each: half the
size of float32 lists and several times faster to load, and Delta has no 16-bit float.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from kblam_ray.encoders.base import EncoderSpec
from kblam_ray.errors import EncoderMismatchError, InputError, TableError
from kblam_ray.facts.fact import DEFAULT_IDENTITY, Identity

FORMAT_VERSION = 1
"""The newest layout of a table that this code reads and writes."""

UPSERT, DELETE = "upsert", "delete"
"""The two values of the column `op`."""

EMBEDDING_DTYPE = np.dtype("<f2")

EMBEDDING_COLUMNS = ("key_embedding", "value_embedding")

FACT_COLUMNS = ("fact_id", "entity", "property", "value", "metadata", "content_hash", "updated_at")
"""What readers see of a live row besides its embeddings."""

SCHEMA = pa.schema(
    [
        pa.field("fact_id", pa.int64()),
        pa.field("op", pa.string()),
        pa.field("entity", pa.string()),
        pa.field("property", pa.string()),
        pa.field("value", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("content_hash", pa.string()),
        pa.field("key_embedding", pa.binary()),
        pa.field("value_embedding", pa.binary()),
        pa.field("updated_at", pa.timestamp("us", tz="UTC")),
        pa.field("write_id", pa.string()),
    ]
)


class TableInfo(BaseModel):
    """What a table is made with; JSON in the Delta table's `description`, committed with the first facts."""

    model_config = ConfigDict(frozen=True)

    format_version: int = Field(default=FORMAT_VERSION, description="layout of the table")
    encoder: EncoderSpec = Field(description="the one encoder of every embedding in the table")
    identity: Identity = Field(default=DEFAULT_IDENTITY, description="the fields that tell two facts apart")

    def require_same(self, other: TableInfo, uri: str) -> None:
        """Refuse to write facts made for `other` into this table.

        Raises:
            EncoderMismatchError: another encoder revision or dimension.
            TableError: another identity rule.
        """
        # The revision hashes what is inside: one encoder under another name (a local path) is still that encoder.
        if (self.encoder.revision, self.encoder.dim) != (other.encoder.revision, other.encoder.dim):
            raise EncoderMismatchError(
                f"the table was made with encoder {_describe(self.encoder)}, not {_describe(other.encoder)}",
                where=uri,
                help="use the table's encoder, or write another table: embeddings of two encoders do not compare",
            )
        if self.identity != other.identity:
            raise TableError(
                f"the table's identity rule is {self.identity!r}, not {other.identity!r}",
                where=uri,
                help=f"write with --identity {self.identity}, or write another table",
            )


def _describe(encoder: EncoderSpec) -> str:
    return f"{encoder.name} (revision {encoder.revision}, {encoder.dim} numbers)"


def new_write_id() -> str:
    """A random name for one write; all its rows carry it, and a commit of it happens once."""
    return uuid.uuid4().hex


def pack_embeddings(embeddings_MP: np.ndarray) -> pa.Array:
    """Embeddings [M, P] of any float type as binary [M], P little-endian float16 each.

    Raises:
        InputError: a number that is not finite, or too large for float16.
    """
    if embeddings_MP.ndim != 2:
        raise InputError(f"embeddings have {embeddings_MP.ndim} dimensions", help="give a matrix, one row per fact")
    with np.errstate(over="ignore"):
        halves_MP = np.ascontiguousarray(embeddings_MP, dtype=EMBEDDING_DTYPE)
    bad_M = ~np.isfinite(halves_MP).all(axis=1)
    if bad_M.any():
        row = int(np.argmax(bad_M))
        raise InputError(
            "an embedding has a number that is not finite or exceeds float16 (65504)",
            where=f"row {row} of the batch",
            help="check the encoder's output on that text; embeddings are expected to have a norm near 1",
        )
    num_rows, dim = halves_MP.shape
    width_bytes = dim * EMBEDDING_DTYPE.itemsize
    if num_rows * width_bytes > np.iinfo(np.int32).max:
        raise InputError(
            f"{num_rows} embeddings of {dim} numbers exceed 2 GB in one batch", help="write in smaller batches"
        )
    offsets = np.arange(num_rows + 1, dtype=np.int32) * np.int32(width_bytes)
    return pa.Array.from_buffers(pa.binary(), num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(halves_MP)])


def unpack_embeddings(array: pa.Array | pa.ChunkedArray, dim: int) -> np.ndarray:
    """Binary [M] as float16 [M, P]: a view of the bytes when they lie in one piece, else a copy.

    Raises:
        TableError: an embedding is missing or has not `dim` numbers.
    """
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    views = [_view(chunk, dim) for chunk in chunks if len(chunk)]
    if not views:
        return np.empty((0, dim), EMBEDDING_DTYPE)
    return views[0] if len(views) == 1 else np.concatenate(views)


def _view(chunk: pa.Array, dim: int) -> np.ndarray:
    _, offset_buffer, data_buffer = chunk.buffers()
    # Nothing but the offsets says where a row's bytes begin, so equal spacing is proof that rows have one width.
    offsets = np.frombuffer(offset_buffer, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    width_bytes = dim * EMBEDDING_DTYPE.itemsize
    if chunk.null_count or not (np.diff(offsets) == width_bytes).all():
        raise TableError(
            f"the table holds embeddings that are missing or have not {dim} numbers",
            help="the table was changed by another program; restore an older version or write it again",
        )
    halves = np.frombuffer(data_buffer, EMBEDDING_DTYPE, len(chunk) * dim, offset=int(offsets[0]))
    return halves.reshape(len(chunk), dim)


def upsert_rows(
    *,
    fact_ids: Any,
    entities: Any,
    properties: Any,
    values: Any,
    metadata: Any,
    content_hashes: Any,
    key_embeddings_MP: np.ndarray,
    value_embeddings_MP: np.ndarray,
    updated_at: int,
    write_id: str,
) -> pa.Table:
    """Rows that add or replace M facts, in SCHEMA. Columns may be lists, NumPy or Arrow arrays.

    Args:
        content_hashes: hexadecimal texts, see `kblam_ray.facts.fact.content_hash`.
        key_embeddings_MP: float [M, P], of the key texts.
        value_embeddings_MP: float [M, P], of the value texts.
        updated_at: microseconds since 1970, one for the whole write, see `log.next_updated_at`.
        write_id: see `new_write_id`.

    Raises:
        InputError: an embedding that float16 cannot hold.
    """
    num_rows = len(fact_ids)
    return _table(
        {
            "fact_id": fact_ids,
            "op": _repeat(UPSERT, num_rows),
            "entity": entities,
            "property": properties,
            "value": values,
            "metadata": metadata,
            "content_hash": content_hashes,
            "key_embedding": pack_embeddings(key_embeddings_MP),
            "value_embedding": pack_embeddings(value_embeddings_MP),
            "updated_at": _repeat(updated_at, num_rows),
            "write_id": _repeat(write_id, num_rows),
        }
    )


def delete_rows(
    *,
    fact_ids: Any,
    entities: Any,
    properties: Any,
    values: Any | None = None,
    updated_at: int,
    write_id: str,
) -> pa.Table:
    """Rows that delete M facts, in SCHEMA: the identity stays readable, everything else is null.

    Args:
        values: only where the value is part of the identity.
        updated_at, write_id: as for `upsert_rows`.
    """
    num_rows = len(fact_ids)
    return _table(
        {
            "fact_id": fact_ids,
            "op": _repeat(DELETE, num_rows),
            "entity": entities,
            "property": properties,
            "value": values if values is not None else _repeat(None, num_rows),
            "metadata": _repeat(None, num_rows),
            "content_hash": _repeat(None, num_rows),
            "key_embedding": _repeat(None, num_rows),
            "value_embedding": _repeat(None, num_rows),
            "updated_at": _repeat(updated_at, num_rows),
            "write_id": _repeat(write_id, num_rows),
        }
    )


def _repeat(value: str | int | None, times: int) -> Sequence[Any] | pa.Array:
    return pa.nulls(times) if value is None else pa.repeat(value, times)


def _table(columns: dict[str, Any]) -> pa.Table:
    return pa.table({field.name: _as_column(columns[field.name], field.type) for field in SCHEMA}, schema=SCHEMA)


def _as_column(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values if values.type == kind else values.cast(kind)
    return pa.array(values, kind)
