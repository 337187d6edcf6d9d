"""From what a caller gives (embeddings, ids, texts) to a checked chunk; everything that a memory holds came this way.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kblam_ray.attention.memory import fact_texts
from kblam_ray.attention.memory.chunk import Chunk
from kblam_ray.attention.memory.embeddings import as_embeddings, first_bad_row
from kblam_ray.errors import EmbeddingError, InputError

if TYPE_CHECKING:
    import pyarrow as pa


def checked_chunk(
    dim: int,
    keys_MP: Any,
    values_MP: Any,
    facts: Any,
    fact_ids: Any,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    is_loaded: bool,
) -> Chunk:
    """A chunk of M >= 0 facts.

    Args:
        dim: P, the numbers of an embedding that the adapter reads.
        keys_MP, values_MP, dtype, device: see `embeddings.as_embeddings`.
        facts: see `fact_texts.as_table`, or None.
        fact_ids: int64 [M]; None: the facts' fact_id, else 0 to M-1.
        is_loaded: see `Chunk`.

    Raises:
        EmbeddingError: embeddings of another shape or type, of different types, or not finite.
        InputError: ids or facts that do not fit.
    """
    keys_MP = as_embeddings(keys_MP, "key", dtype=dtype, device=device)
    values_MP = as_embeddings(values_MP, "value", dtype=dtype, device=device)
    _check_shapes(dim, keys_MP, values_MP)
    table = None if facts is None else fact_texts.as_table(facts)
    ids = _ids(len(keys_MP), table, fact_ids)
    _check_finite("key", keys_MP, ids, table)
    _check_finite("value", values_MP, ids, table)
    return Chunk(keys_MP, values_MP, ids, table and fact_texts.texts_of(table), is_loaded=is_loaded)


def split_chunk(chunk: Chunk, rows: int) -> list[Chunk]:
    """The same facts in chunks of `rows`, over the same memory."""
    return [
        Chunk(
            chunk.keys_MP[start : start + rows],
            chunk.values_MP[start : start + rows],
            chunk.fact_ids[start : start + rows],
            None if chunk.facts is None else chunk.facts.slice(start, rows),
            is_loaded=chunk.is_loaded,
        )
        for start in range(0, chunk.num_rows, rows)
    ]


def _check_shapes(dim: int, keys_MP: torch.Tensor, values_MP: torch.Tensor) -> None:
    for name, embeddings_MP in (("key", keys_MP), ("value", values_MP)):
        if embeddings_MP.shape[1] != dim:
            raise EmbeddingError(
                f"the {name} embeddings have {embeddings_MP.shape[1]} numbers each, the adapter reads {dim}",
                help="use the encoder that the adapter was made for",
            )
    if len(keys_MP) != len(values_MP):
        raise EmbeddingError(
            f"{len(keys_MP)} key embeddings and {len(values_MP)} value embeddings", help="give one of each per fact"
        )
    if keys_MP.dtype != values_MP.dtype:
        raise EmbeddingError(
            f"the key embeddings are {keys_MP.dtype}, the value embeddings {values_MP.dtype}",
            help="give both in one type, or say with dtype= what to keep them as",
        )


def _ids(num_facts: int, table: pa.Table | None, given: Any) -> np.ndarray:
    if table is not None and table.num_rows != num_facts:
        raise InputError(f"{table.num_rows} facts and {num_facts} embeddings", help="give one row of facts for each")
    in_table = table is not None and "fact_id" in table.column_names
    own = fact_texts.as_fact_ids(table["fact_id"]) if table is not None and in_table else None
    if given is None:
        ids = np.arange(num_facts) if own is None else own
    else:
        ids = fact_texts.as_fact_ids(given)
        if own is not None and not np.array_equal(ids, own):
            raise InputError("fact_ids are others than the fact_id of the facts", help="give one of the two")
    if len(ids) != num_facts:
        raise InputError(f"{len(ids)} fact ids and {num_facts} embeddings", help="give one id for each")
    fact_texts.check_distinct(ids)
    return ids


def _check_finite(name: str, embeddings_MP: torch.Tensor, ids: np.ndarray, table: pa.Table | None) -> None:
    row = first_bad_row(embeddings_MP)
    if row is None:
        return
    text = ""
    if table is not None:
        fact = table.slice(row, 1).to_pylist()[0]
        text = f": the {fact['property']} of {fact['entity']}"
    dtype = str(embeddings_MP.dtype).removeprefix("torch.")
    raise EmbeddingError(
        f"a {name} embedding has a number that is not finite in {dtype}",
        where=f"row {row}, fact {ids[row]}{text}",
        help="embed that fact again: embeddings have a norm near 1; float16 holds numbers up to 65504",
    )
