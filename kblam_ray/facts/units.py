"""Units of work whose results outlive a crash: done by Ray tasks, each stored the moment it is finished.

A unit is a JSON object, its result another, kept as one file in a folder of results, local or `s3://`. A run asks only
for what is not there yet, so a job that was killed loses what was in flight and nothing else.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from kblam_ray.errors import KblamError, StorageError
from kblam_ray.storage import filesystem, is_s3, join, normalize, storage_errors

_SAY_EVERY_S = 5.0


class UnitStore:
    """A folder of finished results. Cheap to make and to pickle."""

    def __init__(self, uri: str) -> None:
        self.uri = normalize(uri)

    def _place(self, key: str) -> str:
        return join(self.uri, f"{key}.json")

    def keys(self) -> set[str]:
        """The keys of all finished units."""
        with storage_errors(self.uri):
            store, path = filesystem(self.uri)
            infos = store.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {info.base_name.removesuffix(".json") for info in infos if info.base_name.endswith(".json")}

    def has(self, key: str) -> bool:
        with storage_errors(self._place(key)):
            store, path = filesystem(self._place(key))
            return store.get_file_info(path).type == pafs.FileType.File

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Store a result: durable on return, never half there.

        Raises:
            StorageError: the folder cannot be written.
        """
        data, place = json.dumps(result, ensure_ascii=False).encode("utf-8"), self._place(key)
        with storage_errors(place):
            if is_s3(place):
                # One small object in one request: it appears whole or not at all.
                store, path = filesystem(place)
                with store.open_output_stream(path) as stream:
                    stream.write(data)
                return
            folder = Path(self.uri)
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f".{key}.{uuid.uuid4().hex}"
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(place)

    def get(self, key: str) -> dict[str, Any]:
        """A stored result.

        Raises:
            StorageError: it cannot be read.
        """
        place = self._place(key)
        with storage_errors(place):
            store, path = filesystem(place)
            with store.open_input_stream(path) as stream:
                data = stream.read()
        try:
            result: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise StorageError(
                f"a stored result is damaged: {error}", where=place, help="delete the file and run again"
            ) from error
        return result


@dataclass(frozen=True)
class Outcome:
    """What became of one unit: its result is stored under `key`, now or from an earlier run; or the error."""

    unit: dict[str, Any]
    key: str | None
    reused: bool = False
    error: KblamError | None = None


class Work(Protocol):
    """Does one unit, stores its result and says under which key. Sent to the workers by pickle."""

    def __call__(self, unit: dict[str, Any], store: UnitStore) -> Outcome: ...


@dataclass(frozen=True)
class _Batch:
    """What a Ray task does with a batch of units: all of them at once, in threads."""

    work: Work
    store: UnitStore
    num_threads: int

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        units = [pickle.loads(unit) for unit in batch["unit"]]
        with ThreadPoolExecutor(self.num_threads) as pool:
            return {"outcome": [pickle.dumps(outcome) for outcome in pool.map(self._do, units)]}

    def _do(self, unit: dict[str, Any]) -> Outcome:
        try:
            return self.work(unit, self.store)
        except KblamError as error:
            # Raised here it would end the other threads' units too; the driver decides.
            return Outcome(unit, None, error=error)


def run_units(
    units: Sequence[dict[str, Any]],
    work: Work,
    store: UnitStore,
    *,
    what: str,
    num_threads: int = 1,
    num_workers: int | None = None,
) -> Iterator[Outcome]:
    """Do `units` on the running Ray, yielding each outcome as it comes, in no particular order.

    Args:
        what: the plural noun for progress lines on stderr.
        num_threads: units that one worker does at the same time.
        num_workers: most workers at the same time; None: as many as there are CPUs.
    """
    if not units:
        return
    import ray.data

    # Small batches make progress visible and a crash cheap; a batch keeps its worker's threads busy a few times over.
    batch = 4 * num_threads if num_threads > 1 else 8
    dataset = ray.data.from_items(
        [{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=max(1, -(-len(units) // batch))
    ).map_batches(_Batch(work, store, num_threads), batch_size=batch, concurrency=num_workers)
    started = said = time.monotonic()
    for done, row in enumerate(dataset.iter_rows(), 1):
        yield pickle.loads(row["outcome"])
        now = time.monotonic()
        if now - said > _SAY_EVERY_S or done == len(units):
            said, rate = now, done / max(now - started, 1e-9)
            left = (len(units) - done) / rate
            print(f"{done} of {len(units)} {what}, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)
