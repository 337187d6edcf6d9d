"""From the paths a person gives (files, directories, globs, `s3://` prefixes) to the input files they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal

import pyarrow.fs as pafs

from kblam_ray.errors import InputError
from kblam_ray.storage import filesystem, is_s3, normalize, storage_errors

Format = Literal["json", "jsonl", "csv", "tsv", "parquet"]

_FORMATS: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
SUPPORTED = ".json, .jsonl, .ndjson, .csv, .tsv (each also with .gz) or .parquet"


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of facts: where it is, how it is read, how large it is (`size_bytes`, compressed where it is)."""

    uri: str
    format: Format
    compressed: bool
    size_bytes: int


def format_of(name: str) -> tuple[Format, bool] | None:
    """Format and whether it is gzipped, told by the ending of `name`; None if the ending is not supported."""
    ending = PurePosixPath(name.lower())
    compressed = ending.suffix == ".gz"
    if compressed:
        ending = ending.with_suffix("")
    file_format = _FORMATS.get(ending.suffix)
    if file_format is None or (compressed and file_format == "parquet"):
        return None
    return file_format, compressed


def expand_inputs(paths: Sequence[str]) -> list[InputFile]:
    """The input files that `paths` mean, in the order of `paths` and sorted by name within each.

    A path is a file, a directory or `s3://` prefix (every supported file below it), or a glob of files (`*`, `?`,
    `[...]`, and `**/` for folders of any depth). Below a directory and in a glob, files with other endings are
    passed over, and so is what begins with `.` or `_`, as in every reader of data folders (`_delta_log`, `_SUCCESS`).

    Raises:
        InputError: nothing is there, no supported file is there, the ending is not supported, or a file is empty.
        StorageError: the disk or the object store does not answer.
    """
    if not paths:
        raise InputError("no input", help=f"name at least one file, directory or glob of {SUPPORTED}")
    return [file for path in paths for file in _expand(normalize(path))]


def find_files(uri: str) -> tuple[bool, list[tuple[str, pafs.FileInfo]]]:
    """Whether `uri` names one file, and the files it means, whatever their endings, sorted by name.

    Raises:
        InputError: nothing is there.
        StorageError: the disk or the object store does not answer.
    """
    with storage_errors(uri):
        store, path = filesystem(uri)
        info = store.get_file_info(path)
        if info.type == pafs.FileType.File:
            return True, [(uri, info)]
        if info.type == pafs.FileType.Directory:
            found = _files_below(store, path, recursive=True)
        elif info.type == pafs.FileType.NotFound and (wildcard := re.search(r"[*?[]", path)):
            found = _glob(store, path, wildcard.start())
        else:
            what = "no such file" if info.type == pafs.FileType.NotFound else "neither a file nor a directory"
            raise InputError(what, where=uri, help="check the path; a relative one starts at the working directory")
        prefix = "s3://" if is_s3(uri) else ""
        return False, sorted(((prefix + info.path, info) for info in found), key=lambda pair: pair[0])


def _expand(uri: str) -> list[InputFile]:
    is_one_file, found = find_files(uri)
    files = [_input_file(place, info) for place, info in found if is_one_file or format_of(place)]
    if not files:
        raise InputError("no supported file there", where=uri, help=f"files must end in {SUPPORTED}")
    return files


def _input_file(uri: str, info: pafs.FileInfo) -> InputFile:
    known = format_of(uri)
    if known is None:
        raise InputError("an unsupported kind of file", where=uri, help=f"the name must end in {SUPPORTED}")
    if info.size == 0:
        raise InputError("an empty file", where=uri, help="remove it from the input, or write it again")
    return InputFile(uri, known[0], known[1], info.size)


def _files_below(store: pafs.FileSystem, base: str, *, recursive: bool) -> Iterator[pafs.FileInfo]:
    for info in store.get_file_info(pafs.FileSelector(base, recursive=recursive)):
        parts = PurePosixPath(info.path).relative_to(base).parts
        if info.type == pafs.FileType.File and not any(part.startswith((".", "_")) for part in parts):
            yield info


def _glob(store: pafs.FileSystem, pattern: str, wildcard_at: int) -> Iterator[pafs.FileInfo]:
    base = pattern[:wildcard_at].rpartition("/")[0]
    if not base and not pattern.startswith("/"):
        raise InputError("a wildcard in a bucket's name", where=f"s3://{pattern}", help="name the bucket")
    base = base or "/"
    patterns = PurePosixPath(pattern).relative_to(base).parts
    if store.get_file_info(base).type == pafs.FileType.Directory:
        for info in _files_below(store, base, recursive=len(patterns) > 1 or patterns[0] == "**"):
            if matches(PurePosixPath(info.path).relative_to(base).parts, patterns):
                yield info


def matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a path's parts fit a glob's, where `**` stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(matches(parts[depth:], patterns[1:]) for depth in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and matches(parts[1:], patterns[1:])
