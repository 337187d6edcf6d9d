"""Read input files one row at a time: each row is a fact or the reason why it is not one.

No file is held in memory: JSON Lines and CSV go by line, a JSON array by element, Parquet by small batches. A bad
row is yielded, never raised and never dropped, so that a distributed reader can carry it, count it and decide.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kblam_ray.errors import BadRowError
from kblam_ray.facts.fact import MAX_VALUE_CHARS, Fact
from kblam_ray.facts.inputs import InputFile
from kblam_ray.facts.json_array import array_elements
from kblam_ray.facts.parquet import open_parquet
from kblam_ray.facts.rows import JSON_DECODER, NotAFactError, Shape, fact_from_row, shape_of
from kblam_ray.facts.streams import DAMAGED, RAW_EXCERPT_CHARS, DamagedFileError, bounded_lines, open_bytes


class FactRow(NamedTuple):
    """A fact and where it stood: the 1-based line of a text file, the number of the row in an array or Parquet."""

    fact: Fact
    line: int


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that is not a fact, or (`fatal`) the point from which the rest of the file cannot be read.

    Attributes:
        line: 1-based; what it counts is `unit`: physical lines (where the row begins), or rows.
        raw: the beginning of the row, characters that are not Unicode escaped.
    """

    file: str
    line: int
    reason: str
    raw: str
    fatal: bool = False
    unit: Literal["line", "row"] = "line"

    @property
    def where(self) -> str:
        return f"{self.file}: {self.unit} {self.line}"

    def to_error(self) -> BadRowError:
        """The error that ends a job at this row."""
        if self.fatal:
            help = "mend the file or write it again: UTF-8, CSV with a header and commas (tabs in .tsv), whole JSON"
        else:
            help = "mend the row, or leave bad rows out with `--on-error skip`, which writes them beside the table"
        return BadRowError(self.reason, where=self.where, help=help)


def read_facts(file: InputFile) -> Iterator[FactRow | RejectedRow]:
    """The rows of `file` in order; a file that cannot be read to its end yields a fatal RejectedRow as its last.

    Fatal are: a truncated or damaged gzip stream, a JSON array that breaks off or is not JSON in the middle, CSV
    without the columns or with quotes left open, what is not Parquet or lacks the columns, a file without content.
    A `.json` file that does not begin with `[` is read as JSON Lines. Blank lines are no rows.

    Raises:
        StorageError: the disk or the object store fails; that says nothing about the file.
    """
    unit: Literal["line", "row"] = "row" if file.format == "parquet" else "line"
    line = 0
    with open_bytes(file) as stream:
        try:
            if file.format == "parquet":
                rows = _read_parquet(file, stream)
            else:
                _check_encoding(stream)
                if file.format in ("csv", "tsv"):
                    rows = _read_csv(file, stream)
                elif file.format == "json" and stream.peek(1).lstrip().startswith(b"["):
                    unit = "row"
                    rows = _read_array(file, stream)
                else:
                    rows = _read_lines(file, stream)
            for row in rows:
                line = row.line
                yield row
        except DamagedFileError as error:
            yield RejectedRow(file.uri, error.line or line + 1, str(error), _excerpt(error.raw), True, unit)
        except DAMAGED as error:
            reason = f"the file is damaged, the rest of it cannot be read: {error}"
            yield RejectedRow(file.uri, line + 1, reason, "", True, unit)


def _check_encoding(stream: io.BufferedReader) -> None:
    """Skip a byte order mark, and refuse at once what would otherwise be a million bad rows."""
    head = stream.peek(4)[:4]
    if not head:
        raise DamagedFileError("the file is empty")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DamagedFileError("the text is UTF-16; it must be UTF-8")
    if head.startswith(b"\x1f\x8b"):
        raise DamagedFileError("the file is gzip data; its name must end in .gz")
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))


def _read_lines(file: InputFile, stream: io.BufferedReader) -> Iterator[FactRow | RejectedRow]:
    decode = JSON_DECODER.decode
    empty = True
    for number, line in enumerate(bounded_lines(stream.readline), start=1):
        if line.isspace():
            continue
        empty = False
        try:
            row = FactRow(fact_from_row(decode(line.rstrip().decode())), number)
        except NotAFactError as error:
            yield RejectedRow(file.uri, number, str(error), _excerpt(line))
        except UnicodeDecodeError as error:
            reason = f"invalid UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
            yield RejectedRow(file.uri, number, reason, _excerpt(line))
        except json.JSONDecodeError as error:
            yield RejectedRow(file.uri, number, _json_reason(error), _excerpt(line))
        except RecursionError:
            yield RejectedRow(file.uri, number, "JSON nested too deeply", _excerpt(line))
        else:
            yield row
    if empty:
        raise DamagedFileError("the file holds blank lines only")


def _read_array(file: InputFile, stream: io.BufferedReader) -> Iterator[FactRow | RejectedRow]:
    # A byte that is not UTF-8 becomes half a surrogate pair, which costs its own row and not the rest of the file.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    for number, (element, raw) in enumerate(array_elements(text), start=1):
        try:
            row = FactRow(fact_from_row(element), number)
        except NotAFactError as error:
            yield RejectedRow(file.uri, number, str(error), _excerpt(raw), unit="row")
        else:
            yield row


def _read_csv(file: InputFile, stream: io.BufferedReader) -> Iterator[FactRow | RejectedRow]:
    # As in an array: a bad byte costs its own row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    delimiter = "\t" if file.format == "tsv" else ","
    # The limit is the process's: it is only ever raised. It is what a quote left open can take of the memory.
    csv.field_size_limit(max(csv.field_size_limit(), 4 * MAX_VALUE_CHARS))
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last
        for text_line in bounded_lines(text.readline):
            last = text_line
            yield text_line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header = _csv_header(reader)
    shape = _file_shape(header)
    optional = [column for column in header if column not in shape.required]
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line:
                # Where the next record begins is unknown: going on could make facts of a text's inner lines.
                reason = f"malformed CSV in the record of lines {line} to {reader.line_num}: {error}"
                raise DamagedFileError(reason, last, line) from None
            yield RejectedRow(file.uri, line, f"malformed CSV: {error}", _excerpt(last))
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            reason = f"{len(cells)} cells where the header has {len(header)}"
            yield RejectedRow(file.uri, line, reason, _excerpt(delimiter.join(cells)))
            continue
        row = dict(zip(header, cells, strict=True))
        for column in optional:
            if not row[column]:
                del row[column]
        try:
            fact_row = FactRow(fact_from_row(row, shape), line)
        except NotAFactError as error:
            yield RejectedRow(file.uri, line, str(error), _excerpt(delimiter.join(cells)))
        else:
            yield fact_row


def _csv_header(reader: Iterator[list[str]]) -> list[str]:
    """The names of the columns; one without a name (a spreadsheet's or a data frame's index) is `column N`."""
    try:
        cells = next((cells for cells in reader if cells), None)
    except csv.Error as error:
        raise DamagedFileError(f"malformed CSV header: {error}") from None
    if cells is None:
        raise DamagedFileError("the file holds blank lines only")
    header = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DamagedFileError(f"the header has the column `{twice}` twice", ",".join(cells))
    return header


def _read_parquet(file: InputFile, stream: io.BufferedReader) -> Iterator[FactRow | RejectedRow]:
    columns, rows = open_parquet(stream)
    shape = _file_shape(columns)
    for number, row in enumerate(rows, start=1):
        try:
            fact_row = FactRow(fact_from_row(row, shape), number)
        except NotAFactError as error:
            yield RejectedRow(file.uri, number, str(error), _excerpt(repr(row)), unit="row")
        else:
            yield fact_row


def _file_shape(columns: list[str]) -> Shape:
    try:
        return shape_of(tuple(columns))
    except NotAFactError as error:
        raise DamagedFileError(f"the columns lack what makes a fact: {error}", ", ".join(columns)) from None


def _json_reason(error: json.JSONDecodeError) -> str:
    return f"malformed JSON at column {error.colno}: {error.msg.removesuffix(' at')}"


def _excerpt(raw: str | bytes) -> str:
    """The beginning of a rejected row as text that any file can hold."""
    if isinstance(raw, str):
        raw = raw[:RAW_EXCERPT_CHARS].encode("utf-8", "backslashreplace")
    return raw[:RAW_EXCERPT_CHARS].decode("utf-8", "backslashreplace").rstrip("\r\n")
