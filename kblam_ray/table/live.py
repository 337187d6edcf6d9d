"""Which rows of a table are live, and reading them: the row with the largest (updated_at, write_id) of each fact.

Reading takes two passes over the files of one version. The first reads only what the rule needs (id, op, time,
write) and finds where each winning row lies; the second reads the columns asked for, one row group at a time, and
hands on only winning rows. So memory holds about 40 bytes per row plus a few row groups, whatever the table's size.
Rows that a compaction doubled tie in everything, and either is the same row: the rule takes one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kblam_ray import storage
from kblam_ray.table.log import DataFile, TableLog, as_log
from kblam_ray.table.part import in_order, open_part, part_errors
from kblam_ray.table.schema import FACT_COLUMNS, SCHEMA, UPSERT

LIVE_FACTS_SQL = """\
SELECT fact_id, entity, property, value, metadata, content_hash, key_embedding, value_embedding, updated_at
FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY fact_id ORDER BY updated_at DESC, write_id DESC) AS place
  FROM kb
) AS ranked
WHERE place = 1 AND op = 'upsert'
ORDER BY fact_id"""
"""The live facts in any engine's SQL; the table is registered there as `kb`."""

_RULE_COLUMNS = ["fact_id", "op", "updated_at", "write_id"]
_READERS = 8
_ROW_GROUPS_AHEAD = 3

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Winners:
    """The winning row of every fact of one version, by ascending fact_id, and where it lies.

    Attributes:
        log: the version.
        fact_ids_M: int64 [M].
        is_upsert_M: bool [M]; the others are deletes.
        updated_at_M: int64 [M], microseconds since 1970.
        write_ids_M: dictionary of strings [M].
        file_M, row_M: index into `paths` and row of that file, int32 and int64 [M].
        rows_of_file: int64, rows of each file that the rule looked at, superseded ones too.
    """

    log: TableLog
    paths: list[str]
    fact_ids_M: np.ndarray
    is_upsert_M: np.ndarray
    updated_at_M: np.ndarray
    write_ids_M: pa.DictionaryArray
    file_M: np.ndarray
    row_M: np.ndarray
    rows_of_file: np.ndarray

    def __len__(self) -> int:
        return len(self.fact_ids_M)

    def select(self, which: np.ndarray) -> Winners:
        """The winners at the given positions, or where the mask is true; order is kept."""
        return Winners(
            self.log,
            self.paths,
            self.fact_ids_M[which],
            self.is_upsert_M[which],
            self.updated_at_M[which],
            self.write_ids_M.filter(pa.array(which)) if which.dtype == bool else self.write_ids_M.take(pa.array(which)),
            self.file_M[which],
            self.row_M[which],
            self.rows_of_file,
        )

    def live(self) -> Winners:
        """The live facts among them."""
        return self if self.is_upsert_M.all() else self.select(self.is_upsert_M)

    def read(self, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """The winners' rows, one row group of one file at a time.

        Yields:
            The rows' positions among the winners, int64 [n], and the rows, in SCHEMA's types.

        Raises:
            StorageError: a file cannot be read, or is gone (vacuumed).
        """
        files, root = storage.filesystem(self.log.uri)
        order_M = np.lexsort((self.row_M, self.file_M))
        bounds = np.searchsorted(self.file_M[order_M], np.arange(len(self.paths) + 1))

        def tasks() -> Iterator[tuple[pq.ParquetFile, int, np.ndarray, np.ndarray]]:
            for number, path in enumerate(self.paths):
                at = order_M[bounds[number] : bounds[number + 1]]
                if len(at):
                    yield from _by_row_group(open_part(files, root, path), at, self.row_M[at])

        def read(task: tuple[pq.ParquetFile, int, np.ndarray, np.ndarray]) -> tuple[np.ndarray, pa.Table]:
            file, group, at, rows = task
            with part_errors(f"{root}/{self.paths[self.file_M[at[0]]]}"):
                table = _typed(file.read_row_group(group, columns=list(columns)), columns)
            return at, table if len(rows) == len(table) else table.take(pa.array(rows))

        yield from _map_ahead(read, tasks(), _ROW_GROUPS_AHEAD)

    def read_sorted(self, columns: Sequence[str]) -> pa.Table:
        """The winners' rows in memory, in the winners' order."""
        places, tables = [np.empty(0, np.int64)], [_empty(columns)]
        for at, rows in self.read(columns):
            places.append(at)
            tables.append(rows)
        at_M = np.concatenate(places)
        table = pa.concat_tables(tables)
        if (at_M[1:] > at_M[:-1]).all():
            return table
        order_M = np.empty(len(at_M), np.int64)
        order_M[at_M] = np.arange(len(at_M))
        return in_order(table, order_M)


def find_winners(table: str | TableLog, version: int | None = None, *, fact_ids: np.ndarray | None = None) -> Winners:
    """Apply the rule to one version; with `fact_ids`, only to those facts, reading only row groups that may hold them.

    Raises:
        TableNotFoundError, TableError, StorageError: see `TableLog.open`.
    """
    log = as_log(table, version)
    wanted = None if fact_ids is None else np.unique(np.asarray(fact_ids, np.int64))
    sources = [file for file in log.files if wanted is None or _may_hold(wanted, file.min_id, file.max_id)]
    return resolve(log, sources, wanted)


def resolve(log: TableLog, sources: Sequence[DataFile], wanted: np.ndarray | None = None) -> Winners:
    """Apply the rule to the rows of some of a version's files. `wanted`: ascending ids to keep, None for all."""
    files, root = storage.filesystem(log.uri)

    def scan(source: DataFile) -> tuple[pa.Table, np.ndarray]:
        with part_errors(f"{root}/{source.path}"):
            return _scan(open_part(files, root, source.path), wanted)

    with ThreadPoolExecutor(_READERS) as pool:
        scans = list(pool.map(scan, sources))
    empty = pa.table({name: [] for name in _RULE_COLUMNS}, schema=_RULE_SCHEMA)
    rows = pa.concat_tables([empty, *(rows for rows, _ in scans)])
    ids_N = rows["fact_id"].to_numpy()
    updated_at_N = rows["updated_at"].cast(pa.int64()).to_numpy()
    writes_N = combined(rows["write_id"])
    # Codes ranked as their texts: order by write_id without touching the strings again.
    rank_of_code = np.argsort(np.argsort(np.asarray(writes_N.dictionary.to_pylist(), dtype=object), kind="stable"))
    rank_N = rank_of_code[writes_N.indices.to_numpy()] if len(ids_N) else np.empty(0, np.int64)
    win_M = winning_rows(ids_N, updated_at_N, rank_N)
    rows_of_file = np.array([len(numbers) for _, numbers in scans], np.int64)
    file_N = np.repeat(np.arange(len(scans), dtype=np.int32), rows_of_file)
    row_N = np.concatenate([np.empty(0, np.int64), *(numbers for _, numbers in scans)])
    return Winners(
        log=log,
        paths=[file.path for file in sources],
        fact_ids_M=ids_N[win_M],
        is_upsert_M=pc.equal(rows["op"], UPSERT).to_numpy()[win_M],
        updated_at_M=updated_at_N[win_M],
        write_ids_M=writes_N.take(pa.array(win_M)),
        file_M=file_N[win_M],
        row_M=row_N[win_M],
        rows_of_file=rows_of_file,
    )


def winning_rows(ids_N: np.ndarray, updated_at_N: np.ndarray, write_rank_N: np.ndarray) -> np.ndarray:
    """Positions of the rows with the largest (updated_at, write rank) of each id, by ascending id."""
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    differs = sorted_N[1:] != sorted_N[:-1]
    if differs.all():
        return order_N
    is_first_N, is_last_N = np.append(True, differs), np.append(differs, True)
    # Only facts with several rows need the full order; within `order_N` they keep their places.
    several_N = ~(is_first_N & is_last_N)
    rows = order_N[several_N]
    order_N[several_N] = rows[np.lexsort((write_rank_N[rows], updated_at_N[rows], ids_N[rows]))]
    return order_N[is_last_N]


def read_live(
    uri: str | TableLog,
    version: int | None = None,
    *,
    columns: Sequence[str] = FACT_COLUMNS,
    fact_ids: np.ndarray | None = None,
) -> Iterator[pa.Table]:
    """Stream the live rows of one version, a row group at a time, in no particular order.

    Args:
        version: by default the newest.
        columns: of SCHEMA; only these are read.
        fact_ids: int64; only these facts, reading only where they may lie.

    Raises:
        TableNotFoundError, TableError, StorageError: see `TableLog.open`.
    """
    for _, rows in find_winners(uri, version, fact_ids=fact_ids).live().read(columns):
        yield rows


def live_index(uri: str | TableLog, version: int | None = None, *, fact_ids: np.ndarray | None = None) -> pa.Table:
    """`fact_id` int64 ascending and `content_hash` string of the live facts, or of those among `fact_ids`."""
    return find_winners(uri, version, fact_ids=fact_ids).live().read_sorted(["fact_id", "content_hash"])


_RULE_SCHEMA = pa.schema(
    [
        SCHEMA.field("fact_id"),
        SCHEMA.field("op"),
        SCHEMA.field("updated_at"),
        pa.field("write_id", pa.dictionary(pa.int32(), pa.string())),
    ]
)


def _scan(file: pq.ParquetFile, wanted: np.ndarray | None) -> tuple[pa.Table, np.ndarray]:
    """The rule's columns of a file's rows, and the rows' numbers in the file; of `wanted` facts only, if given."""
    metadata = file.metadata
    sizes = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], np.int64)
    starts = np.cumsum(sizes) - sizes
    groups = list(range(len(sizes)))
    if wanted is not None:
        column = file.schema_arrow.names.index("fact_id")
        groups = [group for group in groups if _group_may_hold(wanted, metadata.row_group(group).column(column))]
    table = file.read_row_groups(groups, columns=_RULE_COLUMNS, use_threads=False)
    rows = table.select(_RULE_COLUMNS).cast(_RULE_SCHEMA)
    numbers = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(starts[group], starts[group] + sizes[group]) for group in groups)]
    )
    if wanted is None:
        return rows, numbers
    keep = np.isin(rows["fact_id"].to_numpy(), wanted)
    return rows.filter(pa.array(keep)), numbers[keep]


def _group_may_hold(wanted: np.ndarray, column: pq.ColumnChunkMetaData) -> bool:
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max:
        return True
    return _may_hold(wanted, statistics.min, statistics.max)


def _may_hold(wanted: np.ndarray, smallest: int | None, largest: int | None) -> bool:
    """Whether a range of ids, unknown where None, may hold one of the ascending `wanted`."""
    if smallest is None or largest is None:
        return True
    at = np.searchsorted(wanted, smallest)
    return bool(at < len(wanted) and wanted[at] <= largest)


def _by_row_group(
    file: pq.ParquetFile, at: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[pq.ParquetFile, int, np.ndarray, np.ndarray]]:
    """Split ascending row numbers of a file by row group: file, group, their `at`, their rows in the group."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        low, high = np.searchsorted(rows, (start, end))
        if high > low:
            yield file, group, at[low:high], rows[low:high] - start
        start = end


def _typed(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """`table` with the columns in the order asked for, in SCHEMA's types (files may hold dictionaries)."""
    return table.select(list(columns)).cast(pa.schema([SCHEMA.field(name) for name in columns]))


def _empty(columns: Sequence[str]) -> pa.Table:
    return pa.schema([SCHEMA.field(name) for name in columns]).empty_table()


def combined(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A dictionary column as one array, so that equal texts have equal codes."""
    array = column.unify_dictionaries().combine_chunks()
    return array if isinstance(array, pa.DictionaryArray) else pa.concat_arrays(array.chunks)


def _map_ahead(function: Callable[[_In], _Out], items: Iterable[_In], ahead: int) -> Iterator[_Out]:
    """Results in order, computed up to `ahead` items before they are asked for: hides a store's latency."""
    with ThreadPoolExecutor(ahead) as pool:
        pending: deque[Future[_Out]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
