"""Write and read one Parquet file of a table: a part, invisible until a commit names it."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from kblam_ray import storage
from kblam_ray.errors import DataFileGoneError, StorageError
from kblam_ray.table.schema import EMBEDDING_COLUMNS, SCHEMA

ROW_GROUP_BYTES = 16 * 2**20
"""Size of a row group in memory: what a reader holds of a file at a time, and skips when it needs no row of it."""

MIN_ROW_GROUP_ROWS, MAX_ROW_GROUP_ROWS = 1_024, 65_536

# zstd makes 16-bit embeddings 8 % smaller and more than twice as slow to read (100,000 x 384: 60 -> 145 ms).
_COMPRESSION = {name: "none" if name in EMBEDDING_COLUMNS else "zstd" for name in SCHEMA.names}

_DICTIONARY_COLUMNS = ["op", "entity", "property", "value", "updated_at", "write_id"]
_STATISTICS_COLUMNS = ["fact_id", "op", "updated_at", "write_id"]


_MAX_TAKE_BYTES = 2**31 - 1

_OWN_NAME = re.compile(r"part-[0-9a-f]{32}\.parquet")


@dataclass(frozen=True)
class PartFile:
    """A written Parquet file that no commit names yet; travels from a worker to the driver.

    Attributes:
        path: relative to the table.
        stats: the Delta log's statistics, JSON: row count, smallest and largest `fact_id` and `updated_at`.
        min_updated_at: microseconds since 1970, of the oldest row.
    """

    path: str
    size_bytes: int
    num_rows: int
    stats: str
    min_updated_at: int
    modified_at_ms: int


def write_part(uri: str, rows: pa.Table) -> PartFile:
    """Write `rows` (SCHEMA, at least one) as one file under the table `uri`, sorted by fact_id.

    The name is unique, so a worker that runs twice leaves a file that nobody names and vacuum removes.

    Raises:
        StorageError: the place cannot be written.
    """
    rows = _sorted_by_id(rows.select(SCHEMA.names).cast(SCHEMA))
    path = f"part-{uuid.uuid4().hex}.parquet"
    with storage.storage_errors(uri), storage.whole_or_gone(storage.join(uri, path)):
        files, root = storage.filesystem(uri)
        if isinstance(files, pafs.LocalFileSystem):
            files.create_dir(root, recursive=True)
        with files.open_output_stream(f"{root}/{path}") as sink:
            pq.write_table(
                rows,
                sink,
                row_group_size=_row_group_rows(rows),
                compression=_COMPRESSION,
                use_dictionary=_DICTIONARY_COLUMNS,
                write_statistics=_STATISTICS_COLUMNS,
            )
            size_bytes = sink.tell()
        storage.sync(storage.join(uri, path))
    updated_at = rows["updated_at"].cast(pa.int64()).to_numpy()
    return PartFile(
        path=path,
        size_bytes=size_bytes,
        num_rows=len(rows),
        stats=_stats(rows),
        min_updated_at=int(updated_at.min()),
        modified_at_ms=time.time_ns() // 1_000_000,
    )


def write_parts(uri: str, tables: Iterable[pa.Table]) -> list[PartFile]:
    """`write_part` for each of several; where one fails, those before it do not stay either, on a disk."""
    parts = []
    with ExitStack() as all_of_them:
        for rows in tables:
            parts.append(part := write_part(uri, rows))
            all_of_them.enter_context(storage.whole_or_gone(storage.join(uri, part.path)))
    return parts


def open_part(files: pafs.FileSystem, root: str, path: str) -> pq.ParquetFile:
    """The committed file `path` of the table at `root`, for reading; columns of few values come as dictionaries.

    Raises:
        DataFileGoneError: the file is not there any more.
        StorageError: the file is damaged, or the store does not answer.
    """
    place = f"{root}/{path}"
    with part_errors(place):
        local = isinstance(files, pafs.LocalFileSystem)
        return pq.ParquetFile(
            place if local else files.open_input_file(place),
            memory_map=local,
            pre_buffer=not local,
            read_dictionary=["op", "write_id"],
        )


@contextmanager
def part_errors(place: str) -> Iterator[None]:
    """Turn whatever goes wrong while the committed file at `place` is opened or read into our errors."""
    with storage.storage_errors(place):
        try:
            yield
        except FileNotFoundError as error:
            raise DataFileGoneError(
                "a data file of this version no longer exists",
                where=place,
                help="vacuum removes the files of old versions after its retention: open a newer version",
            ) from error
        except (pa.ArrowInvalid, KeyError) as error:
            raise StorageError(
                f"a data file is damaged: {error}", where=place, help="restore the file from a backup"
            ) from error


def is_own_name(path: str) -> bool:
    """Whether `write_part` named the file; another program's statistics are less exact."""
    return _OWN_NAME.fullmatch(path) is not None


def in_order(rows: pa.Table, order_M: np.ndarray) -> pa.Table:
    """`rows` in another order, whatever their size: Arrow's own `take` fails where a column's texts exceed 2 GB."""
    if rows.nbytes <= _MAX_TAKE_BYTES:
        return rows.take(pa.array(order_M))
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    schema = pa.schema([field.with_type(wide.get(field.type, field.type)) for field in rows.schema])
    whole = rows.cast(schema).combine_chunks()
    # Back in narrow types, in pieces an eighth of what they can hold, because rows differ in size.
    runs = np.array_split(order_M, 8 * rows.nbytes // _MAX_TAKE_BYTES + 1)
    return pa.concat_tables([whole.take(pa.array(run)).cast(rows.schema) for run in runs])


def timestamp_text(microseconds: int) -> str:
    """Microseconds since 1970 as the Delta log writes a timestamp, in UTC."""
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{microseconds % 1_000_000:06d}Z"
    )


def _sorted_by_id(rows: pa.Table) -> pa.Table:
    ids = rows["fact_id"].to_numpy()
    if (ids[1:] >= ids[:-1]).all():
        return rows
    return in_order(rows, np.argsort(ids, kind="stable"))


def _row_group_rows(rows: pa.Table) -> int:
    row_bytes = max(1, rows.nbytes // len(rows))
    return min(MAX_ROW_GROUP_ROWS, max(MIN_ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))


def _stats(rows: pa.Table) -> str:
    ids = pc.min_max(rows["fact_id"])
    times = pc.min_max(rows["updated_at"].cast(pa.int64()))
    return json.dumps(
        {
            "numRecords": len(rows),
            "minValues": {"fact_id": ids["min"].as_py(), "updated_at": timestamp_text(times["min"].as_py())},
            "maxValues": {"fact_id": ids["max"].as_py(), "updated_at": timestamp_text(times["max"].as_py())},
            "nullCount": {"fact_id": 0, "updated_at": 0},
        }
    )
