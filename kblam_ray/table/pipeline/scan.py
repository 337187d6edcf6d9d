"""Read the input files on the workers: parsed facts with their hashes, in blocks of Ray's object store.

The texts stay in the object store (which spills to disk), and the driver sees only the index: 40 bytes
per row. Rejected rows travel as data beside the facts, so that a worker never raises for the input's sake
and the driver decides what a bad row means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.errors import BadRowError
from kblam_ray.facts import InputFile, RejectedRow, read_facts
from kblam_ray.facts.fact import Fact, Identity, key_text
from kblam_ray.table.pipeline.spool import text_hash
from kblam_ray.table.plan import INDEX_SCHEMA, index_facts

if TYPE_CHECKING:
    from ray.data import Dataset

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
        ("rejected", pa.string()),
    ]
)
"""A row of input. `seq` is its place in the whole input; `rejected` is JSON and excludes all but `seq`."""

FILE_SHIFT = 40
"""`seq` is the file's number shifted left by this, plus the row's number in the file."""

ROWS_PER_CHUNK = 4_096
CHARS_PER_CHUNK = 16_000_000
BLOCK_BYTES = 16_000_000
TASK_CPUS = 0.2
"""Logical CPUs of a reading or selecting task: small, so that it fits beside a full pool of encoders."""


class Scan:
    """The parsed input: a dataset of SCANNED_SCHEMA in the object store, and its index in this process."""

    def __init__(self, files: Sequence[InputFile], identity: Identity) -> None:
        import ray

        # Ray's blocks of 128 MB would leave most workers idle behind one large file.
        ray.data.DataContext.get_current().target_max_block_size = BLOCK_BYTES
        items = [{"file": number} for number in range(len(files))]
        self.rows: Dataset = (
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
        columns = ["seq", "fact_id", "content_hash", "identity_hash", "key_hash", "value_hash"]
        index, num_rejected = [], 0
        for batch in self.rows.select_columns([*columns, "rejected"]).iter_batches(
            batch_size=None, batch_format="pyarrow"
        ):
            is_fact = pc.is_null(batch["rejected"])
            num_rejected += len(batch) - pc.sum(is_fact).as_py()
            index.append(batch.select(columns).filter(is_fact))
        schema = pa.schema([SCANNED_SCHEMA.field(name) for name in columns])
        table = pa.concat_tables([schema.empty_table(), *index])
        order = np.argsort(table["seq"].to_numpy(), kind="stable")
        self.index: pa.Table = table.take(order)
        self.num_rejected = num_rejected

    @property
    def num_rows(self) -> int:
        """Rows read: facts and rejected ones."""
        return len(self.index) + self.num_rejected

    def rejected(self) -> Iterator[RejectedRow]:
        """The rejected rows, streamed from the object store; in the order of the input within a file."""
        for _, row in self._rejected():
            yield row

    def _rejected(self) -> Iterator[tuple[int, RejectedRow]]:
        for batch in self.rows.select_columns(["seq", "rejected"]).iter_batches(
            batch_size=None, batch_format="pyarrow"
        ):
            bad = batch.filter(pc.is_valid(batch["rejected"]))
            for seq, text in zip(bad["seq"].to_pylist(), bad["rejected"].to_pylist(), strict=True):
                yield seq, RejectedRow(**json.loads(text))

    def facts_at(self, rows: np.ndarray) -> list[Fact]:
        """The facts at row numbers of the index, in that order."""
        seqs = self.index["seq"].take(rows)
        found: dict[int, Fact] = {}
        wanted = self.rows.map_batches(_pick, batch_format="pyarrow", fn_kwargs={"seqs": seqs}, num_cpus=TASK_CPUS)
        for row in wanted.iter_rows():
            seq = row.pop("seq")
            found[seq] = Fact(**row)
        return [found[seq] for seq in seqs.to_pylist()]

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


def _pick(batch: pa.Table, seqs: pa.ChunkedArray) -> pa.Table:
    columns = ["seq", "entity", "property", "value", "metadata"]
    return batch.select(columns).filter(pc.is_in(batch["seq"], value_set=seqs.combine_chunks()))


def _scan_file(batch: pa.Table, files: Sequence[InputFile], identity: Identity) -> Iterator[pa.Table]:
    """Stream one file as blocks of SCANNED_SCHEMA; holds one chunk of rows at a time."""
    number = batch["file"][0].as_py()
    chunk: list[Fact | RejectedRow] = []
    start, chars = number << FILE_SHIFT, 0
    for item in read_facts(files[number]):
        if isinstance(item, RejectedRow):
            chunk.append(item)
        else:
            chunk.append(item.fact)
            chars += len(item.fact.entity) + len(item.fact.property) + len(item.fact.value)
        if len(chunk) == ROWS_PER_CHUNK or chars > CHARS_PER_CHUNK:
            yield _as_block(chunk, start, identity)
            start, chars = start + len(chunk), 0
            chunk = []
    yield _as_block(chunk, start, identity)


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
        "rejected": pa.nulls(len(facts), pa.string()),
    }
    block = pa.table([columns[name] for name in SCANNED_SCHEMA.names], schema=SCANNED_SCHEMA)
    rejected = [(start + place, row) for place, row in enumerate(chunk) if isinstance(row, RejectedRow)]
    if not rejected:
        return block
    bad = {name: pa.nulls(len(rejected), SCANNED_SCHEMA.field(name).type) for name in SCANNED_SCHEMA.names}
    bad["seq"] = pa.array([seq for seq, _ in rejected], pa.int64())
    bad["rejected"] = pa.array([json.dumps(asdict(row)) for _, row in rejected], pa.string())
    return pa.concat_tables([block, pa.table(bad, schema=SCANNED_SCHEMA)])
