"""Open a Delta table and make sure that it is one of ours; whatever goes wrong is said in our words, in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deltalake
from deltalake.exceptions import DeltaError
from deltalake.exceptions import TableNotFoundError as NoDeltaTableError
from pydantic import ValidationError

from kblam_ray import storage
from kblam_ray.errors import InputError, TableError, TableNotFoundError
from kblam_ray.table.schema import FORMAT_VERSION, SCHEMA, TableInfo

_READER_FEATURES = {"timestampNtz", "vacuumProtocolCheck"}

# Characters that deltalake 1.6 loses or refuses in a table's location; reading or writing would go to another place.
_LOCAL_REFUSED = re.compile(r"[%\[\]|^\\\x00-\x1f\x7f]")
_S3_REFUSED = re.compile(r"[%#?\[\]|^\\\x00-\x1f\x7f]")


FAR_VERSION = 1_000
"""From here on a version is compared with the newest before it is opened."""


def check_location(uri: str) -> str:
    """`uri` normalised.

    Raises:
        InputError: an unsupported scheme, or a character or folder that cannot stand in a table's location.
    """
    uri = storage.normalize(uri)
    if storage.is_s3(uri) and {"", ".", ".."} & set(uri.removeprefix("s3://").split("/")):
        raise InputError("an S3 URI with an empty, '.' or '..' folder", where=uri, help="write s3://bucket/prefix")
    bad = (_S3_REFUSED if storage.is_s3(uri) else _LOCAL_REFUSED).search(uri)
    if bad:
        raise InputError(
            f"the character {bad.group()!r} cannot stand in a table's location", where=uri, help="choose another name"
        )
    return uri


def open_delta(uri: str, version: int | None) -> deltalake.DeltaTable:
    """The Delta table at `uri`, a checked location, at `version` (None: the newest).

    Raises:
        TableNotFoundError: there is no table, or it lacks the version.
        TableError: the log is damaged.
        StorageError: the store does not answer or refuses.
    """
    return _open_newest(uri) if version is None else _open_at(uri, version)


def _open_newest(uri: str) -> deltalake.DeltaTable:
    missing = TableNotFoundError("there is no table", where=uri, help="check the URI; the first facts create the table")
    if not storage.is_s3(uri):
        with storage.storage_errors(uri):
            if not (Path(uri) / "_delta_log").is_dir():
                raise missing
    with delta_errors(uri):
        try:
            return deltalake.DeltaTable(uri, storage_options=storage.delta_storage_options(uri))
        except NoDeltaTableError:
            raise missing from None


def _open_at(uri: str, version: int) -> deltalake.DeltaTable:
    # The library looks for each of the versions before one that is not there.
    is_far = version > FAR_VERSION and version > _open_newest(uri).version()
    try:
        if version >= 0 and not is_far:
            return deltalake.DeltaTable(uri, version=version, storage_options=storage.delta_storage_options(uri))
        cause: Exception | None = None
    except (DeltaError, OSError) as error:
        cause = error
    # Opening the newest tells a missing table and a store that is down apart from a missing version.
    newest = _open_newest(uri).version()
    known = 0 <= version <= newest
    if known and isinstance(cause, OSError):
        # The store was away for a moment and is back: what is in the log was not seen.
        with delta_errors(uri):
            raise cause
    raise TableNotFoundError(
        f"the table has no version {version} (any more); its newest is {newest}"
        + (f": {reason(cause)}" if known and cause else ""),
        where=uri,
        help="the log keeps versions for 30 days; open another version",
    ) from cause


@contextmanager
def delta_errors(uri: str) -> Iterator[None]:
    """Turn deltalake's errors at `uri` into ours, in one line and without the library's stack trace."""
    try:
        yield
    except OSError as error:
        with storage.storage_errors(uri):
            raise OSError(reason(error)) from error
    except DeltaError as error:
        raise TableError(
            f"the table's log cannot be read: {reason(error)}",
            where=uri,
            help="the log is damaged or written by another program: restore `_delta_log` from a backup",
        ) from error


def reason(error: BaseException) -> str:
    """The error's text in one line, without terminal colours and stack frames."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip(" ↳") for line in text.splitlines() if not re.match(r"\s*(\d+: |at )", line)]
    return " ".join(line for line in lines if line)


def read_info(uri: str, delta: deltalake.DeltaTable) -> TableInfo:
    """What the table is made with.

    Raises:
        TableError: a Delta table that is not ours, of a newer format, damaged, or changed by another program.
    """
    foreign = TableError(
        "a Delta table, but not one of kblam-ray's", where=uri, help="choose another location for the knowledge base"
    )
    protocol = delta.protocol()
    unknown = set(protocol.reader_features or []) - _READER_FEATURES
    if protocol.min_reader_version == 2 or unknown:
        raise TableError(
            f"the table needs features that kblam-ray does not read: {', '.join(sorted(unknown)) or 'columnMapping'}",
            where=uri,
            help="another program enabled them; turn them off there",
        )
    try:
        description = json.loads(delta.metadata().description or "")
        format_version = description["format_version"]
    except (ValueError, KeyError, TypeError):
        raise foreign from None
    if not isinstance(format_version, int):
        raise foreign
    if format_version > FORMAT_VERSION:
        raise TableError(
            f"the table has format {format_version}; this kblam-ray reads up to {FORMAT_VERSION}",
            where=uri,
            help="install a newer kblam-ray",
        )
    try:
        info = TableInfo.model_validate(description)
    except ValidationError as error:
        raise TableError(
            f"the table's description is damaged: {error.errors()[0]['msg']}",
            where=uri,
            help="restore `_delta_log` from a backup",
        ) from error
    if not {field.name for field in delta.schema().fields} >= set(SCHEMA.names):
        raise TableError(
            "the table lacks columns", where=uri, help="another program dropped them; open an older version"
        )
    return info
