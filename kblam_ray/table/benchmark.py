"""Loading a table's embeddings into memory, against the two usual ways to keep vectors beside facts.

Compared in one run, in turns: our table (facts and float16 vectors in one Delta table), the same vectors as lists
of float32 in Parquet, and two `.npy` files of float32, which hold no facts, versions or identities at all.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from kblam_ray.encoders.base import EncoderSpec
from kblam_ray.facts.fact import content_hash, fact_id
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.job import JobConfig
from kblam_ray.table.log import commit_parts, next_updated_at
from kblam_ray.table.part import write_part
from kblam_ray.table.schema import TableInfo, new_write_id, upsert_rows
from kblam_ray.table.snapshot import read_snapshot


class LoadBenchmark(JobConfig):
    """Settings of `jobs/benchmark.py load`."""

    num_facts: int = Field(100_000, gt=0, description="facts in the table")
    dim: int = Field(384, gt=0, description="P, the numbers in one embedding")
    rounds: int = Field(5, gt=0, description="measurements of each, in turns")
    folder: str | None = Field(None, description="where the files are made and removed: a temporary folder")


def benchmark_load(config: LoadBenchmark) -> dict[str, Any]:
    """Milliseconds to have both matrices [M, P] in memory, the median of each, and the ratios of the others to ours."""
    folder = Path(tempfile.mkdtemp(prefix="kblam-benchmark-", dir=config.folder))
    try:
        ways = _make(config, folder)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(config.rounds):
            for name, load in ways.items():
                started = time.perf_counter()
                keys_MP, values_MP = load()
                assert len(keys_MP) == len(values_MP) == config.num_facts
                times[name].append(time.perf_counter() - started)
        size_mb = {path.name: _megabytes(path) for path in sorted(folder.iterdir())}
    finally:
        shutil.rmtree(folder)
    median_s = {name: statistics.median(measured) for name, measured in times.items()}
    ratio = {name: round(seconds / median_s["table"], 2) for name, seconds in median_s.items() if name != "table"}
    milliseconds = {name: round(1_000 * seconds) for name, seconds in median_s.items()}
    return {"num_facts": config.num_facts, "dim": config.dim, "ms": milliseconds, "ratio": ratio, "size_mb": size_mb}


def _make(config: LoadBenchmark, folder: Path) -> dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]]:
    facts = list(SyntheticFacts(0).facts(0, config.num_facts))
    keys_MP, values_MP = np.random.default_rng(0).standard_normal((2, config.num_facts, config.dim), np.float32)
    uri = str(folder / "table")
    rows = upsert_rows(
        fact_ids=[fact_id(fact) for fact in facts],
        entities=[fact.entity for fact in facts],
        properties=[fact.property for fact in facts],
        values=[fact.value for fact in facts],
        metadata=[fact.metadata for fact in facts],
        content_hashes=[content_hash(fact) for fact in facts],
        key_embeddings_MP=keys_MP,
        value_embeddings_MP=values_MP,
        updated_at=next_updated_at(uri),
        write_id=(write_id := new_write_id()),
    )
    info = TableInfo(encoder=EncoderSpec(name="random", revision="0", dim=config.dim))
    commit_parts(uri, info, [write_part(uri, rows)], write_id)

    lists, arrays = folder / "lists.parquet", folder / "arrays"
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), config.dim).cast(pa.list_(pa.float32()))
        for name, matrix in (("key", keys_MP), ("value", values_MP))
    }
    pq.write_table(pa.table(columns), lists)
    arrays.mkdir()
    np.save(arrays / "key.npy", keys_MP)
    np.save(arrays / "value.npy", values_MP)

    def load_table() -> tuple[np.ndarray, np.ndarray]:
        snapshot = read_snapshot(uri)
        return snapshot.key_embeddings_MP, snapshot.value_embeddings_MP

    def load_lists() -> tuple[np.ndarray, np.ndarray]:
        table = pq.read_table(lists)
        flat = [column.combine_chunks().flatten().to_numpy() for column in table.columns]
        return flat[0].reshape(-1, config.dim), flat[1].reshape(-1, config.dim)

    def load_arrays() -> tuple[np.ndarray, np.ndarray]:
        return np.load(arrays / "key.npy"), np.load(arrays / "value.npy")

    return {"table": load_table, "parquet_float32_lists": load_lists, "npy_float32": load_arrays}


def _megabytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6)
