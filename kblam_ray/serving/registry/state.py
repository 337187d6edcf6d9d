"""The state object: which knowledge bases are wanted and where they are pinned, one small JSON object replaced whole.

`{"format": 1, "knowledge_bases": {name: {"uri": ..., "version": null or a pin}}, "given": {...}}`. Whoever reads it
sees one write or another, never a mixture: locally a new file takes the name of the old one, on S3 one PUT replaces it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import InputError, KblamError, StorageError
from kblam_ray.serving.settings import KB_NAME
from kblam_ray.serving.wanted import KbSpec

FORMAT = 1
MAX_BYTES = 16_000_000
"""A larger object is something else: 10,000 knowledge bases with long URIs take 2 MB."""

MAX_URI_CHARS = 4_096


@dataclass(frozen=True)
class State:
    """What outlives a restart.

    Attributes:
        knowledge_bases: wanted, by name.
        given: what the command line gave when the server was last started. What it gives again unchanged has been
            heeded: changes made since then count, a knowledge base that was removed stays so.
    """

    knowledge_bases: Mapping[str, KbSpec] = field(default_factory=dict)
    given: Mapping[str, KbSpec] = field(default_factory=dict)


class StateStore:
    """The state object at a place, or nowhere.

    Args:
        uri: a local path or `s3://bucket/key`; None: nothing is kept.

    Raises:
        InputError: the place cannot be one object.
    """

    def __init__(self, uri: str | None) -> None:
        self.uri = None if uri is None else storage.normalize(uri)
        if self.uri is not None and storage.is_s3(self.uri) and "/" not in self.uri.removeprefix("s3://"):
            raise InputError(
                "the state is one object, not a bucket", where=self.uri, help="write s3://bucket/state.json"
            )

    @property
    def is_durable(self) -> bool:
        """Whether anything is kept."""
        return self.uri is not None

    def read(self) -> State | None:
        """What was written last; None where nothing was yet. Blocks.

        Raises:
            StorageError: the object or its store cannot be read, or what is there is damaged or of a newer format.
            InputError: a folder is there.
        """
        if self.uri is None:
            return None
        content = self._content(self.uri)
        return None if content is None else _parsed(content, self.uri)

    def write(self, state: State) -> None:
        """Replace what is there; when it returns, a loss of power does not lose it. Blocks.

        Raises:
            StorageError: it cannot be written. What was there before is there still, whole, unless the store took the
                new object and its answer was lost.
        """
        if self.uri is None:
            return
        content = (json.dumps(_to_json(state), indent=2, sort_keys=True) + "\n").encode()
        with storage.storage_errors(self.uri):
            if storage.is_s3(self.uri):
                store, path = storage.filesystem(self.uri, is_small=True)
                with store.open_output_stream(path, metadata={"Content-Type": "application/json"}) as stream:
                    stream.write(content)
            else:
                _replace(self.uri, content)

    def _content(self, uri: str) -> bytes | None:
        if not storage.is_s3(uri) and os.path.isdir(uri):
            raise InputError("the state is one file, and this is a folder", where=uri, help=f"write {uri}/state.json")
        with storage.storage_errors(uri):
            store, path = storage.filesystem(uri)
            try:
                with store.open_input_stream(path) as stream:
                    return stream.read(MAX_BYTES + 1)
            except FileNotFoundError:
                return None


def checked_spec(name: Any, uri: Any, version: Any) -> KbSpec:
    """A specification with an absolute URI.

    Raises:
        InputError: the name cannot name a knowledge base, the URI no table, the version no version.
    """
    if not isinstance(name, str) or not KB_NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a knowledge base",
            where="name",
            help="use letters, digits, dots, dashes and underscores, 64 at most, a letter or digit first",
        )
    if not isinstance(uri, str) or len(uri) > MAX_URI_CHARS or not uri.isprintable():
        raise InputError(
            "not the URI of a table", where=f"uri of {name}", help="give a local path or s3://bucket/prefix"
        )
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 0):
        raise InputError(
            f"{version!r} is no version",
            where=f"version of {name}",
            help="give a number from 0, or null for the newest",
        )
    return KbSpec(storage.normalize(uri), version)


def _replace(path: str, content: bytes) -> None:
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # A link to the file stays a link: what it leads to is replaced.
    path = os.path.realpath(path)
    partial = os.path.join(os.path.dirname(path), f".{base}.{secrets.token_hex(6)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    storage.sync(path)


def _to_json(state: State) -> dict[str, Any]:
    def entries(specs: Mapping[str, KbSpec]) -> dict[str, Any]:
        return {name: {"uri": spec.uri, "version": spec.version} for name, spec in specs.items()}

    return {"format": FORMAT, "knowledge_bases": entries(state.knowledge_bases), "given": entries(state.given)}


def _parsed(content: bytes, uri: str) -> State:
    def damaged(reason: str) -> StorageError:
        return StorageError(
            f"the state object is damaged: {reason}",
            where=uri,
            help="restore it from a backup, or delete it to begin with no knowledge bases but those of --kb",
        )

    if len(content) > MAX_BYTES:
        raise damaged(f"it has more than {MAX_BYTES} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(f"it is not JSON: {error}") from None
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        raise damaged("it has no format number")
    if found["format"] > FORMAT:
        raise StorageError(
            f"the state object has format {found['format']}, and this version knows {FORMAT}",
            where=uri,
            help="use the version of kblam-ray that wrote it, or another --state-uri",
        )
    if found["format"] < 1 or not found.keys() <= {"format", "knowledge_bases", "given"}:
        raise damaged("its fields are not those of a state object")

    def specs(field_name: str, entries: Any) -> dict[str, KbSpec]:
        if not isinstance(entries, dict):
            raise damaged(f"it has no {field_name}")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or entry.keys() != {"uri", "version"}:
                raise damaged(f"{name!r} of {field_name} has not a uri and a version")
        try:
            return {name: checked_spec(name, entry["uri"], entry["version"]) for name, entry in entries.items()}
        except KblamError as error:
            raise damaged(f"{error.what} ({error.where})") from None

    return State(specs("knowledge_bases", found.get("knowledge_bases")), specs("given", found.get("given", {})))
