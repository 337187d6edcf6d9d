"""Read a batch of source files into memory: their facts, or why a file cannot be taken up now."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from kblam_ray.errors import KblamError, StorageError
from kblam_ray.facts import Fact, RejectedRow, read_facts
from kblam_ray.table.refresh.sources import SourceFile, Sources

MAX_FACTS = 100_000
"""Facts of a batch that is read in this process; a larger one is for the workers."""

_READERS = 8


@dataclass
class ReadBatch:
    """What became of the files of a batch.

    Attributes:
        facts: of every file that was read whole, in the order of the batch.
        rejected: rows that are no facts, of files that are taken up without them.
        refused: files that cannot be taken up as they are, and why.
        moved: files that changed or went while they were read.
    """

    facts: dict[SourceFile, list[Fact]] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)
    refused: dict[SourceFile, KblamError] = field(default_factory=dict)
    moved: list[SourceFile] = field(default_factory=list)


def read_batch(files: Sequence[SourceFile], sources: Sources, on_error: Literal["fail", "skip"]) -> ReadBatch | None:
    """Read files side by side; None if they hold more facts than this process should."""
    batch = ReadBatch()
    num_facts = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for file, found in zip(files, pool.map(lambda file: _read(file, sources, on_error), files), strict=True):
            if found is None:
                batch.moved.append(file)
            elif isinstance(found, KblamError):
                batch.refused[file] = found
            else:
                batch.facts[file] = found.facts
                batch.rejected.extend(found.rejected)
                num_facts += len(found.facts)
            if num_facts > MAX_FACTS:
                pool.shutdown(cancel_futures=True)
                return None
    return batch


@dataclass
class _ReadFile:
    facts: list[Fact]
    rejected: list[RejectedRow]


def _read(file: SourceFile, sources: Sources, on_error: Literal["fail", "skip"]) -> _ReadFile | KblamError | None:
    found = _ReadFile([], [])
    refusal: KblamError | None = None
    try:
        for row in read_facts(file.as_input()):
            if not isinstance(row, RejectedRow):
                found.facts.append(row.fact)
                if len(found.facts) > MAX_FACTS:
                    return found  # the batch is not read here
            elif on_error == "fail" or row.fatal:
                refusal = row.to_error()
                break
            else:
                found.rejected.append(row)
    except StorageError as error:
        refusal = error
    try:
        now = sources.look_at(file.uri)
    except StorageError as error:
        return error
    # What was read while the file changed may be a mix of two states, bad rows too.
    if not file.is_still(now):
        return None
    return refusal or found
