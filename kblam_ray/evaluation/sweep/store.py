"""Finished units on local disk or S3: whole or not there.

    units/KEY/rows.parquet      what was asked and answered, of units that ask questions
    units/KEY/summary.json      written last; with it the unit is done

Each file is written under another name and takes its own when it is whole and on disk; on an object store it appears
with the one request that ends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kblam_ray.evaluation.outcomes import SCHEMA
from kblam_ray.evaluation.sweep.unit import Found, Unit
from kblam_ray.storage import join, normalize, read_file, replace_file

FOLDER, ROWS, SUMMARY = "units", "rows.parquet", "summary.json"


class UnitStore:
    """The units of one output folder.

    Args:
        output: the folder, a path or `s3://` URI.
    """

    def __init__(self, output: str) -> None:
        self.uri = join(normalize(output), FOLDER)

    def get(self, unit: Unit) -> Found | None:
        """What an earlier run found; None where the unit is not done, or its files are damaged.

        Raises:
            StorageError: the store cannot be read.
        """
        data = read_file(self._place(unit, SUMMARY))
        if data is None:
            return None
        try:
            stored = json.loads(data)
            if stored["key"] != unit.key:
                return None
            summary, num_rows, made_by = stored["summary"], stored["num_rows"], stored["made_by"]
        except (ValueError, KeyError, TypeError):
            return None
        if num_rows is None:
            return Found(summary, made_by=made_by)
        rows = self._rows(unit)
        return Found(summary, rows, made_by) if rows is not None and len(rows) == num_rows else None

    def put(self, unit: Unit, found: Found) -> None:
        """Keep what was found; durable on return.

        Raises:
            StorageError: the store cannot be written.
        """
        if found.rows is not None:
            replace_file(self._place(unit, ROWS), _parquet(found.rows))
        stored: dict[str, Any] = {
            "key": unit.key,
            "unit": {**unit.labels, "told": unit.told},
            "made_by": found.made_by,
            "num_rows": None if found.rows is None else len(found.rows),
            "summary": found.summary,
        }
        replace_file(self._place(unit, SUMMARY), json_bytes(stored))

    def _place(self, unit: Unit, name: str) -> str:
        return join(self.uri, unit.key, name)

    def _rows(self, unit: Unit) -> pa.Table | None:
        data = read_file(self._place(unit, ROWS))
        try:
            rows = None if data is None else pq.read_table(pa.BufferReader(data))
        except (pa.ArrowInvalid, OSError):
            return None
        return rows if rows is not None and rows.schema.equals(SCHEMA) else None


def write_sweep(output: str, rows: pa.Table, summary: dict[str, Any]) -> None:
    """All of a sweep in its output folder: `rows.parquet` and `summary.json`.

    Raises:
        StorageError: the folder cannot be written.
    """
    place = normalize(output)
    replace_file(join(place, ROWS), _parquet(rows))
    replace_file(join(place, SUMMARY), json_bytes(summary))


def _parquet(rows: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(rows, stream)
    data: bytes = stream.getvalue().to_pybytes()
    return data


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON as the files of an evaluation have it."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
