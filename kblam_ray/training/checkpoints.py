"""Checkpoints of a run on local disk or S3: whole or not there, the newest complete one found by looking.

A checkpoint is a folder `step-NNNNNNNN` with a `manifest.json` that names every other file with its size and SHA-256.
Locally the folder is filled under another name, forced to disk, and renamed; on an object store the manifest is written
last. So a run that is killed, or a disk that is full, leaves the checkpoints before as they were, and what is torn is
recognised: its manifest is missing or does not fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from kblam_ray import storage
from kblam_ray.attention.adapter.saving import sync
from kblam_ray.errors import TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        uri: its folder.
        step: optimizer steps done.
    """

    uri: str
    step: int

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The checkpoint as a local folder, for as long as the context lasts.

        Raises:
            StorageError: it cannot be read.
        """
        if not storage.is_s3(self.uri):
            yield Path(self.uri)
            return
        with tempfile.TemporaryDirectory() as temporary:
            with storage.storage_errors(self.uri):
                remote, path = storage.filesystem(self.uri)
                pafs.copy_files(
                    path, temporary, source_filesystem=remote, destination_filesystem=pafs.LocalFileSystem()
                )
            yield Path(temporary)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        uri: their folder, local or `s3://`.
        keep: how many of the newest are kept; the others are deleted after each save.
    """

    def __init__(self, uri: str, keep: int = 3) -> None:
        self.uri, self._keep = storage.normalize(uri), keep

    def save(self, step: int, fill: Callable[[Path], None]) -> Checkpoint:
        """Write a checkpoint; once it is whole it takes its name, and the oldest ones go.

        Args:
            step: optimizer steps done.
            fill: writes the files into a local folder that it is given.

        Raises:
            StorageError: disk full, no rights, no store: what was written is removed, earlier checkpoints are whole.
        """
        uri = storage.join(self.uri, f"step-{step:08d}")
        with storage.storage_errors(uri):
            if storage.is_s3(uri):
                self._upload(uri, fill)
            else:
                self._rename(uri, fill)
            self._prune()
        return Checkpoint(uri, step)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, None where there is none; torn ones are skipped with a warning.

        Raises:
            StorageError: the store cannot be read.
        """
        for step in reversed(self.steps()):
            uri = storage.join(self.uri, f"step-{step:08d}")
            with storage.storage_errors(uri):
                damage = _damage(uri)
            if damage is None:
                return Checkpoint(uri, step)
            logger.warning("skipped a checkpoint that is not whole: %s: %s", uri, damage)
        return None

    def steps(self) -> list[int]:
        """The steps of all checkpoints that have a name, torn ones included, ascending."""
        with storage.storage_errors(self.uri):
            files, path = storage.filesystem(self.uri)
            found = files.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        matches = (_NAME.fullmatch(info.base_name) for info in found if info.type == pafs.FileType.Directory)
        return sorted(int(match.group(1)) for match in matches if match)

    def _rename(self, uri: str, fill: Callable[[Path], None]) -> None:
        folder = Path(uri)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers(folder.parent)
        staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.partial"
        staging.mkdir()
        try:
            _fill(staging, fill)
            for path in sorted(staging.rglob("*")):
                sync(path)
            sync(staging)
            if folder.exists():  # of the same step before a resumption
                _discard(folder)
            staging.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _remove_leftovers(self, parent: Path) -> None:
        """What a killed process left half written; one process writes a run's checkpoints."""
        for path in parent.glob(".step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def _upload(self, uri: str, fill: Callable[[Path], None]) -> None:
        remote, path = storage.filesystem(uri)
        with tempfile.TemporaryDirectory() as temporary:
            staging = Path(temporary)
            _fill(staging, fill)
            if remote.get_file_info(path).type != pafs.FileType.NotFound:
                self._delete(uri)
            files = [file for file in sorted(staging.rglob("*")) if file.is_file() and file.name != MANIFEST]
            for file in [*files, staging / MANIFEST]:
                put_file(file, storage.join(uri, file.relative_to(staging).as_posix()))

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            self._delete(storage.join(self.uri, f"step-{step:08d}"))

    def _delete(self, uri: str) -> None:
        if not storage.is_s3(uri):
            _discard(Path(uri))
            return
        files, path = storage.filesystem(uri)
        # Without its manifest it is no checkpoint any more, should the rest not go.
        if files.get_file_info(f"{path}/{MANIFEST}").type == pafs.FileType.File:
            files.delete_file(f"{path}/{MANIFEST}")
        files.delete_dir(path)


def put_file(file: Path, uri: str) -> None:
    """Copy a local file to its place, local or on S3."""
    files, path = storage.filesystem(uri)
    if not storage.is_s3(uri):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source, files.open_output_stream(path) as target:
        shutil.copyfileobj(source, target, _BLOCK_BYTES)


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    fill(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _hash_of(path.open("rb"))}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _damage(uri: str) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    files, path = storage.filesystem(uri)
    try:
        with files.open_input_stream(f"{path}/{MANIFEST}") as stream:
            listed: dict[str, Any] = json.loads(stream.read())["files"]
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    for name, wanted in listed.items():
        info = files.get_file_info(f"{path}/{name}")
        if info.type != pafs.FileType.File:
            return f"{name} is missing"
        if info.size != wanted["size"]:
            return f"{name} has {info.size} of {wanted['size']} bytes"
        if _hash_of(files.open_input_stream(f"{path}/{name}")) != wanted["sha256"]:
            return f"{name} is damaged"
    return None


def _hash_of(stream: Any) -> str:
    digest = hashlib.sha256()
    with stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _discard(folder: Path) -> None:
    # Renamed first: a folder that is half deleted must not have a checkpoint's name.
    going = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.partial"
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def require_same(saved: dict[str, Any], now: dict[str, Any], *, where: str) -> None:
    """Refuse to go on with another run than the one that was saved.

    Raises:
        TrainingError: settings that change the run differ; names them.
    """
    differing = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise TrainingError(
            f"the run cannot be resumed with other settings: {'; '.join(differing)}",
            where=where,
            help="give the settings it was started with, or another --output for a new run",
        )
