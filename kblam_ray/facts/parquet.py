"""The rows of a Parquet file as dictionaries, a small batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from kblam_ray.facts.streams import DamagedFileError

_BATCH_ROWS = 1_024
_PAGE_BUFFER_BYTES = 1 << 20


def open_parquet(stream: BinaryIO) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Names of the columns, and the rows.

    Timestamps of nanosecond columns come as ISO text where Python's microseconds do not suffice.

    Raises:
        DamagedFileError: a column has a type that neither is text nor has a JSON form (bytes, durations).
        pyarrow.ArrowException, OSError: not a Parquet file, or damaged; the rows raise the same.
    """
    # Without a buffer size, a whole row group is held compressed and decompressed.
    file = pq.ParquetFile(stream, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)
    schema = file.schema_arrow
    for field in schema:
        if not _has_json_form(field.type, top=True):
            reason = f"the column `{field.name}` is of type {field.type}, which JSON cannot hold"
            raise DamagedFileError(f"{reason}: leave it out or make it text")
    return schema.names, _rows(file)


def _rows(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    names = file.schema_arrow.names
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
        columns = [_python_values(column, name) for column, name in zip(batch.columns, names, strict=True)]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _python_values(column: pa.Array, name: str) -> list[Any]:
    if not (pa.types.is_timestamp(column.type) and column.type.unit == "ns"):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return _broken_texts(column, name)
    # pyarrow gives pandas timestamps, or an error without pandas: split off what a datetime cannot hold instead.
    counts = column.cast(pa.int64()).to_pylist()
    micros = pa.array([count if count is None else count // 1_000 for count in counts], pa.int64())
    times = micros.cast(pa.timestamp("us", column.type.tz)).to_pylist()
    return [
        _iso_nanoseconds(time, count) if count and count % 1_000 else time
        for time, count in zip(times, counts, strict=True)
    ]


def _broken_texts(column: pa.Array, name: str) -> list[str | None]:
    """The texts of a column that are not all UTF-8, with half surrogate pairs for the bytes that are not."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        raise DamagedFileError(f"the column `{name}` of type {column.type} holds text that is not UTF-8")
    texts = column.cast(pa.large_binary()).to_pylist()
    return [text if text is None else text.decode("utf-8", "surrogateescape") for text in texts]


def _iso_nanoseconds(time: datetime, count: int) -> str:
    text = time.isoformat(timespec="microseconds")
    end = len("2000-01-01T00:00:00.000000")
    return f"{text[:end]}{count % 1_000:03d}{text[end:]}"


def _has_json_form(type: pa.DataType, *, top: bool = False) -> bool:
    types = pa.types
    if isinstance(type, pa.BaseExtensionType):
        return isinstance(type, pa.UuidType) or _has_json_form(type.storage_type)
    if types.is_dictionary(type):
        return _has_json_form(type.value_type)
    if types.is_nested(type):
        return all(_has_json_form(type.field(index).type) for index in range(type.num_fields))
    return (
        types.is_null(type)
        or types.is_boolean(type)
        or types.is_integer(type)
        or types.is_floating(type)
        or types.is_decimal(type)
        or types.is_string(type)
        or types.is_large_string(type)
        or types.is_string_view(type)
        or types.is_date(type)
        or types.is_time32(type)
        or (types.is_time64(type) and type.unit == "us")
        or (types.is_timestamp(type) and (top or type.unit != "ns"))
    )
