"""Read single commits of a table's Delta log: which files each added, and for which write.

deltalake shows the files of a version but not the commit that brought each of them, which `changes` needs
to read only what is new. The log's commits are one JSON file each, one action per line (Delta protocol).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import TableError

_READERS = 8


@dataclass(frozen=True)
class Commit:
    """What one version did.

    Attributes:
        added: paths of the files with new rows; files that only hold rows copied from others are not among them.
        removed_data: whether it removed files as a change of data, as another program's DELETE or RESTORE does.
        write_ids: the writes that it made durable.
        info: the commit's own words: operation, time, and the metadata that its writer gave (`log.commit`).
    """

    version: int
    added: tuple[str, ...]
    removed_data: bool
    write_ids: frozenset[str]
    info: Mapping[str, Any] = field(default_factory=dict)


def read_commits(uri: str, versions: Sequence[int]) -> list[Commit] | None:
    """The commits that made `versions`; None if one is no longer in the log (it is cleaned up after 30 days).

    Raises:
        TableError: a commit's file is damaged.
        StorageError: the store cannot be read.
    """
    commits = read_last_commits(uri, versions)
    return commits if len(commits) == len(versions) else None


def read_last_commits(uri: str, versions: Sequence[int]) -> list[Commit]:
    """The commits that made the last ones of ascending `versions`: those after the newest that the log lacks.

    Raises: as for `read_commits`.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda version: _read_commit(uri, version), versions))
    commits: list[Commit] = []
    for commit in reversed(found):
        if commit is None:
            break
        commits.append(commit)
    return commits[::-1]


def find_write(uri: str, write_id: str, *, newest: int, oldest: int = 0) -> int | None:
    """The version that committed `write_id`, searched from `newest` down to `oldest`; None if the log lacks it."""
    for version in range(newest, oldest - 1, -1):
        commit = _read_commit(uri, version)
        if commit is None:
            return None
        if write_id in commit.write_ids:
            return version
    return None


def _read_commit(uri: str, version: int) -> Commit | None:
    place = storage.join(uri, "_delta_log", f"{version:020d}.json")
    with storage.storage_errors(place):
        files, path = storage.filesystem(place)
        try:
            with files.open_input_file(path) as source:
                text = source.read()
        except FileNotFoundError:
            return None
    try:
        return _parse(version, [json.loads(line) for line in text.splitlines() if line.strip()])
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"a commit of the table's log is damaged: {error!r}",
            where=place,
            help="restore the file from a backup, or open an older version",
        ) from error


def _parse(version: int, actions: list[dict[str, dict]]) -> Commit:
    adds = [action["add"] for action in actions if "add" in action]
    removes = [action["remove"] for action in actions if "remove" in action]
    return Commit(
        version=version,
        added=tuple(add["path"] for add in adds if add["dataChange"]),
        removed_data=any(remove["dataChange"] for remove in removes),
        write_ids=frozenset(action["txn"]["appId"] for action in actions if "txn" in action),
        info=next((action["commitInfo"] for action in actions if "commitInfo" in action), {}),
    )
