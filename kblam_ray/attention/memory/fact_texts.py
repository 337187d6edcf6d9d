"""Which facts are meant, and what they say: fact ids in any form, and the table of texts that citations are read from.

Shape legend: M facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    Raises:
        InputError: they are neither, or lack entity, property or value.
    """
    import pyarrow as pa

    if isinstance(given, pa.Table):
        table = given
    else:
        try:
            rows = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row) for row in given]
            schema = None if rows else pa.schema([(name, pa.string()) for name in COLUMNS])
            table = pa.Table.from_pylist(rows, schema)
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise InputError(
                f"the facts are not rows of a table: {error}", help="give a pyarrow Table, or a list of dicts"
            ) from None
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise InputError(
            f"the facts lack {', '.join(missing)}",
            where=f"columns {', '.join(table.column_names)}",
            help="give entity, property and value of each fact, or no facts at all",
        )
    return table


def texts_of(table: pa.Table) -> pa.Table:
    """The columns that are kept."""
    return table.select([name for name in COLUMNS if name in table.column_names])


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of texts one below the other; a column that one lacks is null there."""
    import pyarrow as pa

    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def take(table: pa.Table, positions: np.ndarray) -> pa.Table:
    """A copy of some rows, that keeps nothing of the rest alive."""
    import pyarrow as pa

    return table.take(pa.array(positions))
