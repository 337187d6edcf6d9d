"""Finished units on local disk or S3: whole or not there.

    units/KEY/rows.parquet      what was asked and answered, of units that ask questions
    units/KEY/summary.json      written last; with it the unit is done

Each file is written under another name and takes its own when it is whole and on disk; on an object store it appears
with the one request that ends it.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from kblam_ray.evaluation.outcomes import SCHEMA
from kblam_ray.evaluation.sweep.unit import Found, Unit
from kblam_ray.facts.writing import new_file
from kblam_ray.storage import filesystem, is_s3, join, normalize, storage_errors, sync

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
        data = self._read(unit, SUMMARY)
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
            stream = pa.BufferOutputStream()
            pq.write_table(found.rows, stream)
            self._write(self._place(unit, ROWS), stream.getvalue())
        stored: dict[str, Any] = {
            "key": unit.key,
            "unit": {**unit.labels, "told": unit.told},
            "made_by": found.made_by,
            "num_rows": None if found.rows is None else len(found.rows),
            "summary": found.summary,
        }
        self._write(self._place(unit, SUMMARY), json.dumps(stored, ensure_ascii=False, indent=1).encode("utf-8"))

    def _place(self, unit: Unit, name: str) -> str:
        return join(self.uri, unit.key, name)

    @staticmethod
    def _write(place: str, data: bytes | pa.Buffer) -> None:
        if is_s3(place):
            with storage_errors(place):
                store, path = filesystem(place, is_small=True)
                with store.open_output_stream(path) as stream:
                    stream.write(data)
            return
        with new_file(place) as file:
            file.write(data)
        with storage_errors(place):
            sync(place)

    def _read(self, unit: Unit, name: str) -> bytes | None:
        place = self._place(unit, name)
        with storage_errors(place):
            store, path = filesystem(place)
            if store.get_file_info(path).type != pafs.FileType.File:
                return None
            with store.open_input_stream(path) as stream:
                data: bytes = stream.read()
        return data

    def _rows(self, unit: Unit) -> pa.Table | None:
        data = self._read(unit, ROWS)
        try:
            rows = None if data is None else pq.read_table(pa.BufferReader(data))
        except (pa.ArrowInvalid, OSError):
            return None
        return rows if rows is not None and rows.schema.equals(SCHEMA) else None
