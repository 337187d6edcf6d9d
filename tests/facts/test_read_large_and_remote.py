"""Reading large files, files on an object store, and files whose reading ends early."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kblam_ray.errors import StorageError
from kblam_ray.facts import FactRow, expand_inputs, read_facts
from tests.facts.samples import FACTS, ROWS, TEXT_FILES


def big_rows(num_rows: int) -> Iterator[str]:
    for n in range(num_rows):
        yield f'{{"entity": "Entity {n}", "property": "property {n % 60}", "value": "number {n}, and some more text"}}'


def write_big(path: Path, num_rows: int) -> None:
    with path.open("w") as file:
        if path.suffix == ".jsonl":
            file.writelines(f"{row}\n" for row in big_rows(num_rows))
        elif path.suffix == ".json":
            file.write("[" + next(big_rows(1)))
            file.writelines(f",{row}" for row in big_rows(num_rows - 1))
            file.write("]")
        else:
            file.write("entity,property,value\n")
            file.writelines(
                f'Entity {n},property {n % 60},"value\nnumber {n}, some more text"\n' for n in range(num_rows)
            )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_big(path, 300_000)
    (file,) = expand_inputs([str(path)])
    assert file.size_bytes > 15_000_000
    assert sum(1 for _ in read_facts(file)) == 300_000

    # Ten thousand rows into the file, what is held must be the buffers and no more than them.
    tracemalloc.start()
    try:
        rows = read_facts(file)
        for _ in range(10_000):
            next(rows)
        early = tracemalloc.get_traced_memory()[1]
        for _ in range(40_000):
            next(rows)
        late = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert early < 12_000_000
    assert late < early + 2_000_000


def test_parquet_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    num_rows = 300_000
    texts = pa.array([f"text number {n} {n * 7919 % 65537} " * 3 for n in range(num_rows)])
    pq.write_table(pa.table({"entity": texts, "property": texts, "value": texts}), path, use_dictionary=False)
    size = texts.nbytes * 3
    del texts
    before = pa.total_allocated_bytes()
    most = 0
    for number, _ in enumerate(read_facts(expand_inputs([str(path)])[0])):
        if number % 1_000 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert number == num_rows - 1
    assert most < size / 3


def test_a_store_that_fails_in_mid_file_is_not_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same for every format: a broken line to the store must not be taken for a damaged file.
    write_big(tmp_path / "a.jsonl", 200_000)
    data = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data, 0))
    table = pa.Table.from_pylist(list(map(json.loads, big_rows(50_000))))
    pq.write_table(table, tmp_path / "c.parquet", compression="none", use_dictionary=False, row_group_size=1_000)

    class Failing:
        def __init__(self, file: pa.NativeFile) -> None:
            self.file, self.num_bytes = file, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def readinto(self, buffer: memoryview) -> int:
            self.num_bytes += len(buffer)
            if self.num_bytes > 6_000_000:
                raise OSError("the line went dead")
            return self.file.readinto(buffer)

    class Store:
        def open_input_file(self, path: str) -> Failing:
            return Failing(pa.OSFile(path))

    files = expand_inputs([str(tmp_path)])
    replace: Callable[..., None] = monkeypatch.setattr
    replace("kblam_ray.facts.streams.filesystem", lambda uri: (Store(), uri))
    for file in files:
        with pytest.raises(StorageError, match="the line went dead") as caught:
            all(isinstance(row, FactRow) for row in read_facts(file))
        assert caught.value.where == file.uri


def test_abandoning_a_file_closes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[pa.NativeFile] = []
    path = tmp_path / "a.csv"
    path.write_text("entity,property,value\n" + "a,b,c\n" * 100)

    class Store:
        def open_input_file(self, path: str) -> pa.NativeFile:
            opened.append(pa.OSFile(path))
            return opened[-1]

    (file,) = expand_inputs([str(path)])
    replace: Callable[..., None] = monkeypatch.setattr
    replace("kblam_ray.facts.streams.filesystem", lambda uri: (Store(), uri))
    rows = read_facts(file)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert opened[0].closed


def test_from_an_object_store(s3_uri: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3")
    bucket = s3_uri.removeprefix("s3://")
    table = pa.Table.from_pylist([{"url": None, **row} for row in ROWS])
    pq.write_table(table, tmp_path / "facts.parquet")
    for name, text in TEXT_FILES.items():
        client.put_object(Bucket=bucket, Key=f"in/{name}.gz", Body=gzip.compress(text.encode()))
    client.put_object(Bucket=bucket, Key="in/facts.parquet", Body=(tmp_path / "facts.parquet").read_bytes())
    files = expand_inputs([f"{s3_uri}/in/"])
    assert len(files) == len(TEXT_FILES) + 1
    for file in files:
        assert [row.fact for row in read_facts(file) if isinstance(row, FactRow)] == FACTS
