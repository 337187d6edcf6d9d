"""Write facts, and rejected rows, to one file that either appears whole or not at all.

The file grows under another name: beside a local target, which it replaces at the end, or in the temporary folder
for an object store, to which it is then copied. Failing or dying in the middle leaves the target as it was. (An
object-store stream that is closed half-written is published; that is why nothing is streamed there as it grows.)
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from kblam_ray.errors import BadRowError, InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.inputs import SUPPORTED, format_of
from kblam_ray.facts.reading import RejectedRow
from kblam_ray.facts.rows import NotAFactError, validate_fact
from kblam_ray.storage import filesystem, is_s3, normalize, storage_errors

_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in ("entity", "property", "value", "metadata")])

_TEXT_BLOCK_CHARS = 1 << 20
_GROUP_FACTS = 1 << 15
_GROUP_CHARS = 1 << 24
"""A Parquet row group ends at the first of the two: what is held in memory."""


def write_facts(facts: Iterable[Fact], uri: str) -> int:
    """Write `facts` to `uri`, local or `s3://`, in the format that its name says; the number written.

    `read_facts` gives back the same facts, exactly, if their metadata is canonical, as it is in all that was read.
    Metadata is an object in JSON, JSON text in CSV and Parquet. A file that is there already is replaced. JSON Lines of
    no facts are an empty file, which `expand_inputs` refuses.

    Raises:
        InputError: the name's ending is not supported, or something in `facts` is not a valid fact.
        StorageError: the target cannot be written.
    """
    uri = normalize(uri)
    known = format_of(uri)
    if known is None:
        raise InputError("an unsupported kind of file", where=uri, help=f"the name must end in {SUPPORTED}")
    file_format, compressed = known
    num_facts = 0

    def valid_facts() -> Iterator[Fact]:
        nonlocal num_facts
        for fact in facts:
            num_facts += 1
            yield _valid(fact, num_facts)

    with new_file(uri) as file:
        if file_format == "parquet":
            _write_parquet(valid_facts(), file, uri)
        else:
            _write_text(_TEXTS[file_format](valid_facts()), file, uri, compressed=compressed)
    return num_facts


def write_rejected(rows: Iterable[RejectedRow], uri: str) -> int:
    """Write `rows` to `uri` as JSON Lines of file, line, reason, raw, fatal and unit; the number written.

    Raises:
        InputError: the name does not end in `.jsonl`, `.ndjson` or one of them with `.gz`.
        StorageError: the target cannot be written.
    """
    uri = normalize(uri)
    known = format_of(uri)
    if known is None or known[0] != "jsonl":
        raise InputError("rejected rows are JSON Lines", where=uri, help="the name must end in .jsonl or .jsonl.gz")
    num_rows = 0

    def lines() -> Iterator[str]:
        nonlocal num_rows
        for row in rows:
            num_rows += 1
            yield _json(asdict(row)) + "\n"

    with new_file(uri) as file:
        _write_text(lines(), file, uri, compressed=known[1])
    return num_rows


def _valid(fact: Fact, number: int) -> Fact:
    try:
        return validate_fact(fact)
    except NotAFactError as error:
        where = f"fact {number}, entity {fact.entity!r:.80}"
        raise BadRowError(str(error), where=where, help="give texts that are not empty and metadata as JSON") from None


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _json_object(fact: Fact) -> str:
    fields = _json({"entity": fact.entity, "property": fact.property, "value": fact.value})
    return fields if fact.metadata is None else f'{fields[:-1]},"metadata":{fact.metadata}}}'


def _jsonl_text(facts: Iterator[Fact]) -> Iterator[str]:
    return (_json_object(fact) + "\n" for fact in facts)


def _json_text(facts: Iterator[Fact]) -> Iterator[str]:
    opening = "[\n"
    for fact in facts:
        yield opening + _json_object(fact)
        opening = ",\n"
    yield "[]\n" if opening == "[\n" else "\n]\n"


class _Echo:
    """A file for `csv.writer` that hands the text back to the caller."""

    def write(self, text: str) -> str:
        return text


def _csv_text(facts: Iterator[Fact], *, delimiter: str) -> Iterator[str]:
    # Everything in quotes: what else must be quoted (a lone carriage return) differs between Python's versions.
    writer = csv.writer(_Echo(), delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    rows = ((fact.entity, fact.property, fact.value, fact.metadata) for fact in facts)
    return (cast(str, writer.writerow(row)) for row in chain([_SCHEMA.names], rows))


_TEXTS: dict[str, Callable[[Iterator[Fact]], Iterator[str]]] = {
    "jsonl": _jsonl_text,
    "json": _json_text,
    "csv": partial(_csv_text, delimiter=","),
    "tsv": partial(_csv_text, delimiter="\t"),
}


def _write_text(pieces: Iterator[str], file: BinaryIO, uri: str, *, compressed: bool) -> None:
    with ExitStack() as stack:
        if compressed:
            # No name and no time inside: the same facts give the same bytes.
            zipped = gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0)
            file = cast(BinaryIO, stack.enter_context(_closed(zipped, uri)))
        block: list[str] = []
        num_chars = 0
        for piece in pieces:
            block.append(piece)
            num_chars += len(piece)
            if num_chars >= _TEXT_BLOCK_CHARS:
                with storage_errors(uri):
                    file.write("".join(block).encode("utf-8"))
                block, num_chars = [], 0
        with storage_errors(uri):
            file.write("".join(block).encode("utf-8"))


def _write_parquet(facts: Iterator[Fact], file: BinaryIO, uri: str) -> None:
    with _closed(pq.ParquetWriter(file, _SCHEMA, compression="zstd"), uri) as writer:
        for group in _groups(facts):
            columns = zip(*((fact.entity, fact.property, fact.value, fact.metadata) for fact in group), strict=True)
            table = pa.table([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA)
            with storage_errors(uri):
                writer.write_table(table)


def _groups(facts: Iterator[Fact]) -> Iterator[list[Fact]]:
    group: list[Fact] = []
    num_chars = 0
    for fact in facts:
        group.append(fact)
        num_chars += len(fact.entity) + len(fact.property) + len(fact.value) + len(fact.metadata or "")
        if len(group) >= _GROUP_FACTS or num_chars >= _GROUP_CHARS:
            yield group
            group, num_chars = [], 0
    if group:
        yield group


class _Closeable(Protocol):
    def close(self) -> object: ...


_C = TypeVar("_C", bound=_Closeable)


@contextmanager
def _closed(stream: _C, uri: str) -> Iterator[_C]:
    """Close at the end; where an error is already on its way, a second one in closing does not take its place."""
    try:
        yield stream
    except BaseException:
        with suppress(OSError):
            stream.close()
        raise
    with storage_errors(uri):
        stream.close()


@contextmanager
def new_file(uri: str) -> Iterator[BinaryIO]:
    """A file to write that becomes `uri` when the block ends without an error."""
    parent = None if is_s3(uri) else Path(uri).parent
    with ExitStack() as stack:
        with storage_errors(uri):
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            # A name that begins with a dot: `expand_inputs` passes over it.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".kblam-", dir=parent))
            path = Path(folder) / "new"
            file = path.open("wb")
        with _closed(file, uri):
            yield file
            with storage_errors(uri):
                file.flush()
                os.fsync(file.fileno())
        with storage_errors(uri):
            if is_s3(uri):
                store, target = filesystem(uri)
                local = pafs.LocalFileSystem()
                pafs.copy_files(str(path), target, source_filesystem=local, destination_filesystem=store)
            else:
                os.replace(path, uri)
