"""Which facts are meant, and what they say: fact ids in any form, and the table of texts that citations are read from.

Shape legend: M facts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kblam_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED = ("entity", "property", "value")
COLUMNS = (*REQUIRED, "metadata")
"""What is kept of a fact besides its id; hashes and times are the table's business."""

_NAMED = 5


def as_fact_ids(given: Any) -> np.ndarray:
    """Fact ids as int64 [M], from an array, tensor, Arrow column or any iterable of whole numbers; not copied if int64.

    Raises:
        InputError: other things than whole numbers of 64 bits.
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().numpy()
    elif not hasattr(given, "__array__"):
        try:
            given = list(given)
        except TypeError:
            given = None
    ids = np.asarray(given)
    if ids.size == 0 and ids.ndim == 1:
        return np.empty(0, np.int64)
    fits = ids.dtype.kind in "iu" and (ids.dtype != np.uint64 or ids.max() <= np.iinfo(np.int64).max)
    if ids.ndim != 1 or not fits:
        raise InputError(
            "fact ids are whole numbers of 64 bits, in one row",
            where=f"got {ids.dtype} with {ids.ndim} dimensions" if given is not None else None,
            help="give an int64 array or a list of int; ids that came as JSON text are converted with int()",
        )
    return frozen(np.ascontiguousarray(ids, np.int64))


def frozen(array: np.ndarray) -> np.ndarray:
    """The array as a view that cannot be written through."""
    view = array.view()
    view.setflags(write=False)
    return view


def is_ascending(ids: np.ndarray) -> bool:
    """Whether ids are ascending, none twice."""
    return bool((ids[1:] > ids[:-1]).all())


def check_distinct(ids: np.ndarray) -> None:
    """Make sure that no fact id comes twice.

    Raises:
        InputError: naming some that do.
    """
    if is_ascending(ids):
        return
    ordered = np.sort(ids)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        raise InputError(
            "fact ids come more than once", where=some(twice), help="give every fact once; its newest row is the one"
        )


def some(ids: Sequence[int] | np.ndarray) -> str:
    """A few of the ids, for a message."""
    shown = ", ".join(str(id_) for id_ in ids[:_NAMED])
    return f"fact {shown}" if len(ids) == 1 else f"{len(ids)} facts: {shown}{', ...' if len(ids) > _NAMED else ''}"


def as_table(given: Any) -> pa.Table:
    """Facts as a table, from an Arrow table or rows: mappings, or dataclasses like `kblam_ray.Fact`.

    Metadata of a row may be a mapping, of which its JSON text is kept.

    Raises:
        InputError: they are neither, or lack entity, property or value.
    """
    import pyarrow as pa

    table = given if isinstance(given, pa.Table) else _table_of_rows(given)
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise InputError(
            f"the facts lack {', '.join(missing)}",
            where=f"columns {', '.join(table.column_names)}",
            help="give entity, property and value of each fact, or no facts at all",
        )
    return table


def _table_of_rows(given: Any) -> pa.Table:
    import pyarrow as pa

    try:
        rows = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row) for row in given]
        for row in rows:
            if isinstance(row.get("metadata"), Mapping):
                row["metadata"] = json.dumps(row["metadata"], ensure_ascii=False)
        # All names that any row has: without a schema, Arrow takes those of the first.
        found = {name for row in rows for name in row} if rows else set(COLUMNS)
        types = {"fact_id": pa.int64(), **dict.fromkeys(COLUMNS, pa.string())}
        return pa.Table.from_pylist(rows, pa.schema([(name, kind) for name, kind in types.items() if name in found]))
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(
            f"the facts are not rows of a table: {error}", help="give a pyarrow Table, or a list of dicts of texts"
        ) from None


def texts_of(table: pa.Table) -> pa.Table:
    """The columns that are kept, as plain texts: others cannot be merged with those of later changes.

    Raises:
        InputError: something else than text, or no text where there must be one.
    """
    import pyarrow as pa

    return pa.table({name: _as_texts(name, table[name]) for name in COLUMNS if name in table.column_names})


def _as_texts(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    readable = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_kind(kind) for is_kind in readable):
        raise InputError(
            f"the {name} of facts is {kind}, not text",
            help="give JSON text" if name == "metadata" else "give texts: the encoder read texts",
        )
    if name in REQUIRED and column.null_count:
        row = column.is_null().index(True).as_py()
        raise InputError(f"a fact has no {name}", where=f"row {row}", help="give entity, property and value of each")
    is_plain = types.is_string(column.type) or types.is_large_string(column.type)
    return column if is_plain else column.cast(pa.string())


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of texts one below the other; a column that one lacks is null there."""
    import pyarrow as pa

    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def take(table: pa.Table, positions: np.ndarray) -> pa.Table:
    """A copy of some rows, that keeps nothing of the rest alive."""
    import pyarrow as pa

    return table.take(pa.array(positions))
