"""Read the input files on the workers: parsed facts with their hashes, in blocks of Ray's object store.

The texts stay in the object store (which spills to disk), and the driver keeps only the index: 80 bytes
per row. Rejected rows travel as data beside the facts, so that a worker never raises for the input's sake
and the driver decides what a bad row means.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.errors import BadRowError, KblamError
from kblam_ray.facts import InputFile, RejectedRow, read_facts
from kblam_ray.facts.fact import Fact, Identity, key_text
from kblam_ray.table.pipeline.spool import text_hash
from kblam_ray.table.plan import INDEX_SCHEMA, index_facts

SCANNED_SCHEMA = pa.schema(
    [
        ("seq", pa.int64()),
        ("entity", pa.string()),
        ("property", pa.string()),
        ("value", pa.string()),
        ("metadata", pa.string()),
        *INDEX_SCHEMA,
        ("key_hash", pa.binary(16)),
        ("value_hash", pa.binary(16)),
        ("text_bytes", pa.int32()),
        ("rejected", pa.string()),
        ("failure", pa.binary()),
    ]
)
"""A row of input. `seq` is its place in the whole input, `text_bytes` the size of its texts. `rejected` is JSON and
excludes all but `seq`, and so does `failure`, the pickled error of a worker that could not read on."""

INDEXED_SCHEMA = pa.schema(
    [
        *(SCANNED_SCHEMA.field(name) for name in ("seq", *INDEX_SCHEMA.names, "key_hash", "value_hash", "text_bytes")),
        ("block", pa.int32()),
        ("row", pa.int32()),
    ]
)

FILE_SHIFT = 40
"""`seq` is the file's number shifted left by this, plus the row's number in the file."""

ROWS_PER_CHUNK = 4_096
CHARS_PER_CHUNK = 16_000_000
BLOCK_BYTES = 16_000_000
TASK_CPUS = 0.5
"""Logical CPUs of a task that reads or writes: it waits for disk and store half of the time."""


Block = Any
"""An ObjectRef of a table of SCANNED_SCHEMA."""


class Scan:
    """The parsed input: blocks in the object store, and in this process where each fact stands and its hashes.

    Attributes:
        blocks: the rows, as tables of SCANNED_SCHEMA.
        index: the facts in input order: INDEX_SCHEMA, the texts' hashes and size, `block` and `row` in that block.
        num_rejected: rows that are no facts.

    Raises:
        StorageError: a file cannot be read.
    """

    def __init__(self, files: Sequence[InputFile], identity: Identity) -> None:
        import ray

        # Ray's usual blocks of 128 MB would put all of a large file into the hands of one worker.
        ray.data.DataContext.get_current().target_max_block_size = BLOCK_BYTES
        items = [{"file": number} for number in range(len(files))]
        rows = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                _scan_file,
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"files": list(files), "identity": identity},
                num_cpus=TASK_CPUS,
            )
            .materialize()
        )
        self._rows = rows  # keeps the blocks alive
        self.blocks: list[Block] = rows.to_arrow_refs()
        self.num_rejected = 0
        index = [INDEXED_SCHEMA.empty_table()]
        for number, ref in enumerate(self.blocks):
            block = ray.get(ref)
            for failure in block["failure"].drop_null().to_pylist():
                raise pickle.loads(failure)
            is_fact = pc.is_null(block["rejected"])
            row = np.flatnonzero(is_fact.to_numpy()).astype(np.int32)
            self.num_rejected += len(block) - len(row)
            facts = block.select(INDEXED_SCHEMA.names[:-2]).filter(is_fact)
            columns = [*facts.columns, np.full(len(row), number, np.int32), row]
            index.append(pa.table(columns, schema=INDEXED_SCHEMA))
        self.index: pa.Table = pa.concat_tables(index)
        seq = self.index["seq"].to_numpy()
        if (seq[1:] < seq[:-1]).any():  # files were read side by side
            self.index = self.index.take(np.argsort(seq, kind="stable"))

    @property
    def num_rows(self) -> int:
        """Rows read: facts and rejected ones."""
        return len(self.index) + self.num_rejected

    def rejected(self) -> Iterator[RejectedRow]:
        """The rejected rows, streamed from the object store; in the order of the input within a file."""
        for _, row in self._rejected():
            yield row

    def _rejected(self) -> Iterator[tuple[int, RejectedRow]]:
        import ray

        for ref in self.blocks:
            block = ray.get(ref).select(["seq", "rejected"])
            bad = block.filter(pc.is_valid(block["rejected"]))
            for seq, text in zip(bad["seq"].to_pylist(), bad["rejected"].to_pylist(), strict=True):
                yield seq, RejectedRow(**json.loads(text))

    def first_refused(self, on_error: str) -> dict[int, RejectedRow]:
        """By the number of a file: its first rejected row that is not to be skipped."""
        first: dict[int, tuple[int, RejectedRow]] = {}
        for seq, row in self._rejected() if self.num_rejected else ():
            number = seq >> FILE_SHIFT
            if (on_error == "fail" or row.fatal) and (number not in first or seq < first[number][0]):
                first[number] = (seq, row)
        return {number: row for number, (_, row) in first.items()}

    def facts_at(self, rows: np.ndarray) -> list[Fact]:
        """The facts at row numbers of the index, in that order."""
        places = self.index.select(["block", "row"]).take(rows)
        columns = ["entity", "property", "value", "metadata"]
        found = fetch_rows(self.blocks, places["block"].to_numpy(), places["row"].to_numpy(), columns)
        return [Fact(**row) for row in found.to_pylist()]

    def refuse_rejected(self, on_error: str) -> None:
        """Raise for the first rejected row, unless bad rows are to be skipped; damage that ends a file always.

        Raises:
            BadRowError: names file, line and reason.
        """
        if not self.num_rejected:
            return
        first, num_refused = None, 0
        for seq, row in self._rejected():
            if on_error == "fail" or row.fatal:
                num_refused += 1
                first = min(first or (seq, row), (seq, row), key=lambda found: found[0])
        if first:
            error = first[1].to_error()
            more = f" (the first of {num_refused} bad rows)" if num_refused > 1 else ""
            raise BadRowError(error.what + more, where=error.where, help=error.help)


def fetch_rows(blocks: Sequence[Block], block_B: np.ndarray, row_B: np.ndarray, columns: list[str]) -> pa.Table:
    """Rows of the scan by block and row, in the order asked for; one block at a time is mapped, none is copied."""
    import ray

    order_B = np.argsort(block_B, kind="stable")
    numbers, starts = np.unique(block_B[order_B], return_index=True)
    parts = [
        ray.get(blocks[number]).select(columns).take(row_B[at])
        for number, at in zip(numbers, np.split(order_B, starts[1:]), strict=True)
    ]
    inverse_B = np.empty_like(order_B)
    inverse_B[order_B] = np.arange(len(order_B))
    return pa.concat_tables(parts).take(inverse_B)


def _scan_file(batch: pa.Table, files: Sequence[InputFile], identity: Identity) -> Iterator[pa.Table]:
    """Stream one file as blocks of SCANNED_SCHEMA; holds one chunk of rows at a time."""
    number = batch["file"][0].as_py()
    chunk: list[Fact | RejectedRow] = []
    start, chars = number << FILE_SHIFT, 0
    try:
        for item in read_facts(files[number]):
            if isinstance(item, RejectedRow):
                chunk.append(item)
            else:
                fact = item.fact
                chunk.append(fact)
                chars += len(fact.entity) + len(fact.property) + len(fact.value) + len(fact.metadata or "")
            if len(chunk) == ROWS_PER_CHUNK or chars > CHARS_PER_CHUNK:
                yield _as_block(chunk, start, identity)
                start, chars = start + len(chunk), 0
                chunk = []
        yield _as_block(chunk, start, identity)
    except KblamError as error:
        yield _empty_rows([start], failure=[pickle.dumps(error)])


def _as_block(chunk: list[Fact | RejectedRow], start: int, identity: Identity) -> pa.Table:
    at = [place for place, row in enumerate(chunk) if isinstance(row, Fact)]
    facts = [row for row in chunk if isinstance(row, Fact)]
    columns = {
        "seq": np.asarray(at, np.int64) + start,
        "entity": [fact.entity for fact in facts],
        "property": [fact.property for fact in facts],
        "value": [fact.value for fact in facts],
        "metadata": [fact.metadata for fact in facts],
        **{name: index for name, index in zip(INDEX_SCHEMA.names, index_facts(facts, identity).columns, strict=True)},
        "key_hash": [text_hash(key_text(fact.entity, fact.property)) for fact in facts],
        "value_hash": [text_hash(fact.value) for fact in facts],
        "text_bytes": _text_bytes(facts),
        "rejected": pa.nulls(len(facts), pa.string()),
        "failure": pa.nulls(len(facts), pa.binary()),
    }
    block = pa.table([columns[name] for name in SCANNED_SCHEMA.names], schema=SCANNED_SCHEMA)
    rejected = [(start + place, row) for place, row in enumerate(chunk) if isinstance(row, RejectedRow)]
    if not rejected:
        return block
    reasons = [json.dumps(asdict(row)) for _, row in rejected]
    return pa.concat_tables([block, _empty_rows([seq for seq, _ in rejected], rejected=reasons)])


def _text_bytes(facts: list[Fact]) -> list[int]:
    # Characters would do if texts were English; three bytes each is what most others take.
    texts = ((fact.entity, fact.property, fact.value, fact.metadata or "") for fact in facts)
    return [sum(len(text) if text.isascii() else 3 * len(text) for text in fields) for fields in texts]


def _empty_rows(seq: list[int], **columns: list) -> pa.Table:
    """Rows of SCANNED_SCHEMA with only `seq` and the given columns."""
    given = {"seq": seq, **columns}
    return pa.table(
        [pa.array(given.get(field.name, [None] * len(seq)), field.type) for field in SCANNED_SCHEMA],
        schema=SCANNED_SCHEMA,
    )
