"""The local files at or below a place, as they are now: none hangs, loops or keeps others from being found."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field

LOG_FOLDER = "_delta_log"
"""A folder that holds this one is a table."""

BESIDE_TABLES = (".refresh", ".rejected")
"""How the folders beside a table end that belong to it; see `storage.beside`."""


@dataclass
class Walked:
    """What is there.

    Attributes:
        files: the regular files, by path.
        others: what is neither a file nor a folder: opening a pipe waits for whoever writes to it.
        tables: folders below the place that are tables; their files are not among `files`.
        unreadable: folders and links that the system does not let us read -> its reason.
        loose_links: links that lead nowhere.
    """

    files: dict[str, os.stat_result] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    loose_links: list[str] = field(default_factory=list)


def walk(base: str, left_out: Collection[str]) -> Walked:
    """The files at or below `base`, through links to folders too, each folder once.

    Args:
        left_out: real paths of folders that are not entered.

    Raises:
        OSError: the disk does not answer.
    """
    walked = Walked()
    if not os.path.isdir(base):
        _note(base, walked)
        return walked
    seen: set[tuple[int, int]] = set()
    folders = [(base, os.path.realpath(base))]
    while folders:
        folder, real = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = {entry.name: entry for entry in os.scandir(folder)}
        except OSError as error:
            _except_gone(folder, error, walked)
            continue
        if folder != base and LOG_FOLDER in entries:
            walked.tables.append(folder)
            continue
        if folder != base and folder.endswith(BESIDE_TABLES[0]) and "status.json" in entries:
            continue  # a refresh says there how it is, before it has made its table too
        for entry in entries.values():
            if entry.name.startswith((".", "_")) or _is_beside_a_table(entry.name, folder, entries):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                _except_gone(entry.path, error, walked)
                continue
            if not is_folder:
                _note(entry.path, walked)
                continue
            place = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if place not in left_out:
                folders.append((entry.path, place))
    return walked


def is_gone(error: OSError) -> bool:
    """Whether nothing is there: no such file, a folder in its path that is a file by now, a link that leads nowhere."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP


def _note(path: str, walked: Walked) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        _except_gone(path, error, walked)
        return
    if stat.S_ISREG(status.st_mode):
        walked.files[path] = status
    elif not stat.S_ISDIR(status.st_mode):
        walked.others.append(path)


def _except_gone(path: str, error: OSError, walked: Walked) -> None:
    """Go on after an error that says something of one path and nothing of the disk; raises any other."""
    if isinstance(error, PermissionError):
        walked.unreadable[path] = error.strerror or str(error)
    elif not is_gone(error):
        raise error
    elif os.path.islink(path):
        walked.loose_links.append(path)


def _is_beside_a_table(name: str, folder: str, names: Collection[str]) -> bool:
    table, dot, kind = name.rpartition(".")
    return dot + kind in BESIDE_TABLES and table in names and os.path.isdir(os.path.join(folder, table, LOG_FOLDER))
