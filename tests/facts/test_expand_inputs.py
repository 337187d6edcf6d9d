"""Which files a path means: local and in an object store, the same rules."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from kblam_ray.errors import InputError, StorageError
from kblam_ray.facts import InputFile, expand_inputs
from kblam_ray.storage import filesystem

TREE = [
    "a.jsonl",
    "b.JSON.GZ",
    "c.csv.gz",
    "notes.txt",
    "deep/d.parquet",
    "deep/er/e.ndjson",
    "deep/er/f.tsv",
    "_delta_log/0.json",
    ".hidden/g.csv",
    "deep/_SUCCESS.json",
    "docs/readme.md",
]
SUPPORTED = ["a.jsonl", "b.JSON.GZ", "c.csv.gz", "deep/d.parquet", "deep/er/e.ndjson", "deep/er/f.tsv"]


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, local or in an object store, that holds TREE."""
    uri = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri") + "/facts"
    store, path = filesystem(uri)
    for name in TREE:
        if request.param == "local":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with store.open_output_stream(f"{path}/{name}", compression=None) as stream:
            stream.write(b"12345")
    return uri


def names(base: str, *paths: str) -> list[str]:
    return [file.uri.removeprefix(base + "/") for file in expand_inputs([f"{base}/{path}" for path in paths])]


def test_a_directory_means_every_supported_file_below_it(base: str) -> None:
    assert names(base, "") == SUPPORTED
    assert names(base, "deep/") == SUPPORTED[3:]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", SUPPORTED[:3]),
        ("*.gz", ["c.csv.gz"]),
        ("[ac].*", ["a.jsonl", "c.csv.gz"]),
        ("[!a].csv.g?", ["c.csv.gz"]),
        ("deep/*/*", SUPPORTED[4:]),
        ("d*/er/*.tsv", ["deep/er/f.tsv"]),
        ("**/*.tsv", ["deep/er/f.tsv"]),
        ("deep/**/d.parquet", ["deep/d.parquet"]),
        ("**", SUPPORTED),
    ],
)
def test_globs(base: str, pattern: str, expected: list[str]) -> None:
    assert names(base, pattern) == expected


def test_paths_keep_their_order(base: str) -> None:
    assert names(base, "c.csv.gz", "deep", "a.jsonl") == ["c.csv.gz", *SUPPORTED[3:], "a.jsonl"]


def test_formats_and_sizes(base: str) -> None:
    found = {(file.format, file.compressed, file.size_bytes) for file in expand_inputs([base])}
    assert found == {
        ("jsonl", False, 5),
        ("json", True, 5),
        ("csv", True, 5),
        ("parquet", False, 5),
        ("tsv", False, 5),
    }


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("missing.jsonl", "no such file"),
        ("missing/", "no such file"),
        ("*.tsv", "no supported file there"),
        ("missing/*.jsonl", "no supported file there"),
        ("docs", "no supported file there"),
        ("notes.txt", "an unsupported kind of file"),
    ],
)
def test_what_is_not_there_is_named(base: str, path: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        expand_inputs([f"{base}/a.jsonl", f"{base}/{path}"])
    assert caught.value.where == f"{base}/{path}".rstrip("/")
    assert "Help: " in str(caught.value)


def test_an_empty_file_is_named(base: str) -> None:
    store, path = filesystem(base)
    with store.open_output_stream(f"{path}/deep/empty.csv"):
        pass
    for given in ("deep/empty.csv", "deep"):
        with pytest.raises(InputError, match="an empty file") as caught:
            expand_inputs([f"{base}/{given}"])
        assert caught.value.where == f"{base}/deep/empty.csv"


def test_no_paths() -> None:
    with pytest.raises(InputError, match="no input"):
        expand_inputs([])


def test_compressed_parquet_is_not_a_format(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="unsupported"):
        expand_inputs([str(tmp_path / "a.parquet.gz")])


def test_a_name_with_wildcards_in_it(tmp_path: Path) -> None:
    path = tmp_path / "facts[1].csv"
    path.write_text("x")
    assert [file.uri for file in expand_inputs([str(path)])] == [str(path)]


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("a.csv", "~/a.csv", f"file://{tmp_path}/a.csv", "*.csv", "."):
        assert [file.uri for file in expand_inputs([path])] == [str(tmp_path / "a.csv")]


def test_a_wildcard_bucket_is_refused(s3_uri: str) -> None:
    with pytest.raises(InputError, match="wildcard in a bucket"):
        expand_inputs(["s3://kb-*/a.json"])


def test_a_missing_bucket(s3_uri: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        expand_inputs(["s3://there-is-no-such-bucket/a.json"])


def test_a_store_that_fails_is_not_the_callers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Down:
        def get_file_info(self, path: str) -> pafs.FileInfo:
            raise OSError("connection refused")

    def down(uri: str) -> tuple[Down, str]:
        return Down(), uri

    replace: Callable[..., None] = monkeypatch.setattr
    replace("kblam_ray.facts.inputs.filesystem", down)
    with pytest.raises(StorageError, match="connection refused"):
        expand_inputs([str(tmp_path)])


def test_input_files_travel() -> None:
    file = InputFile("s3://b/a.csv", "csv", False, 12)
    assert pickle.loads(pickle.dumps(file)) == file


def test_an_endpoint_that_is_down(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StorageError) as caught:
            expand_inputs([f"{s3_uri}/facts.jsonl"])
    assert caught.value.where == f"{s3_uri}/facts.jsonl"


def test_importing_facts_is_light() -> None:
    heavy = "torch,ray,transformers,sklearn,openai,deltalake,pandas,boto3"
    program = f"import sys, kblam_ray.facts; print(*(name for name in '{heavy}'.split(',') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
