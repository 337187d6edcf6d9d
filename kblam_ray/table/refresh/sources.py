"""The sources of a table as they are now: which files there are, and in which state each is.

A file's state is its tag: an object's ETag and size, a local file's size and time of modification; and the moment at
which it came to be in that state, see `ledger.covers`. For an object that is when it was put, to the second: content
that is put again was modified last. For a local file it is the last change of its status, which no program can set
back, so that one of the same size and time in its place is noticed (`rsync -t`, `cp -p`, `tar`). The price: after a
`chmod` or a new hard link a file is read once more, and what it says is written over what others wrote, as when it is
touched. The inode would say no more, and on some network volumes it is another one on every machine or after a mount.

Objects appear whole. A local file may be seen while it is written; it counts as finished when it was moved to its name
after the last write, or has stood still for a while.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kblam_ray import storage
from kblam_ray.errors import InputError, StorageError
from kblam_ray.facts.inputs import SUPPORTED, InputFile, format_of, matches
from kblam_ray.table.refresh import s3
from kblam_ray.table.refresh.ledger import state_of, with_moment
from kblam_ray.table.refresh.walking import BESIDE_TABLES, LOG_FOLDER, is_gone, walk

_WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True)
class SourceFile:
    """One file of facts, in one state.

    Attributes:
        tag: stands for the file's content; another content has another tag.
        modified_us: microseconds since 1970, as the disk or the store says; the order in which files count.
        is_settled: whether it is sure that nobody writes to it any more.
        changed_us: when the disk last changed the file's status, as when it is moved; 0 where that is unknown.
    """

    uri: str
    tag: str
    modified_us: int
    size_bytes: int
    is_settled: bool = True
    changed_us: int = 0

    @property
    def since_us(self) -> int:
        """Since when the file is there as it is: one that is moved in may have been modified long before."""
        return max(self.modified_us, self.changed_us)

    def is_still(self, now: SourceFile | None) -> bool:
        """Whether a later look at the file found the same content."""
        if now is None:
            return False
        # An ETag says it all; the time of a listing and that of a look at one object may be rounded in two ways.
        if storage.is_s3(self.uri):
            return state_of(now.tag) == state_of(self.tag)
        return now.tag == self.tag

    def as_input(self) -> InputFile:
        """The file as the readers of facts take it."""
        known = format_of(self.uri)
        assert known is not None, self.uri
        return InputFile(self.uri, known[0], known[1], self.size_bytes)


class Pattern:
    """One `--input`: a file, a folder or prefix with all below it, or a glob of files.

    What it means is what `facts.inputs.expand_inputs` says, but nothing need be there.

    Attributes:
        uri: normalised.
        base: the folder or prefix that everything it means lies in, or the file itself.
        others: prefixes below the base, as last listed, that are tables or belong to some: none of theirs is meant.
    """

    def __init__(self, given: str) -> None:
        self.uri = storage.normalize(given)
        self.is_s3 = storage.is_s3(self.uri)
        wildcard = _WILDCARD.search(self.uri)
        if wildcard and not self.is_s3 and os.path.lexists(self.uri):
            wildcard = None
        self.base = self.uri[: wildcard.start()].rpartition("/")[0] if wildcard else self.uri
        if wildcard and self.is_s3 and self.base in ("s3:/", "s3:", ""):
            raise InputError("a wildcard in a bucket's name", where=self.uri, help="name the bucket")
        self._parts = tuple(self.uri[len(self.base) :].strip("/").split("/")) if wildcard else None
        self.others: tuple[str, ...] = ()

    @property
    def has_place(self) -> bool:
        """Of a local one: whether its folder is there, or the file itself, or the folder that the file is gone from."""
        base = self.base or "/"
        if os.path.exists(base):
            return True
        is_file = base == self.uri and format_of(base) is not None
        return is_file and not os.path.islink(base) and os.path.isdir(os.path.dirname(base))

    def means(self, uri: str) -> bool:
        """Whether the file `uri`, of a supported kind, is one of the pattern's."""
        if format_of(uri) is None:
            return False
        if uri == self.uri:
            return True
        if not uri.startswith(self.base.rstrip("/") + "/") or uri.startswith(self.others):
            return False
        parts = tuple(uri[len(self.base.rstrip("/")) + 1 :].split("/"))
        if not all(parts) or any(part.startswith((".", "_")) for part in parts):
            return False
        return self._parts is None or matches(parts, self._parts)


class Sources:
    """The files that a table is kept in step with.

    A table and what lies beside it are no sources: neither this one, nor others that lie below a folder or prefix.

    Args:
        inputs: as a person gives them.
        kb_uri: the table.
        settle_s: how long a local file that may still be written must have stood still.

    Attributes:
        loose_links: links below the inputs that led nowhere when they were last listed.
        passed_over: what the last listing passed over though a person may take it for a source -> why, by URI.
        unreadable: local folders that the last listing could not read -> why, by URI.
        empty: inputs of which the last listing found no file -> why, by URI.

    Raises:
        InputError: an input that can never mean a file, or that lies in the table.
    """

    def __init__(self, inputs: Sequence[str], kb_uri: str, settle_s: float) -> None:
        self.patterns = [Pattern(given) for given in inputs]
        self._own_places = (kb_uri, *(storage.beside(kb_uri, kind[1:], "").rstrip("/") for kind in BESIDE_TABLES))
        self._own = tuple(f"{place}/" for place in self._own_places)
        self._settle_s = settle_s
        self._first_seen: dict[str, tuple[str, float]] = {}
        self.loose_links: set[str] = set()
        self.passed_over: dict[str, str] = {}
        self.unreadable: dict[str, StorageError] = {}
        self.empty: dict[str, str] = {}
        for pattern in self.patterns:
            if os.path.isfile(pattern.uri) and format_of(pattern.uri) is None:
                raise InputError(
                    "an unsupported kind of file", where=pattern.uri, help=f"the name must end in {SUPPORTED}"
                )
            if any(_lies_in(_real(pattern.base), _real(place)) for place in self._own_places):
                raise InputError(
                    "an input inside the table, where nothing is a source",
                    where=f"{pattern.uri} in {kb_uri}",
                    help="keep the files in a folder or prefix of their own; the table may lie inside that",
                )

    def means(self, uri: str) -> bool:
        """Whether a file is one of the sources."""
        return not uri.startswith(self._own) and any(pattern.means(uri) for pattern in self.patterns)

    def missing(self) -> list[str]:
        """The local inputs whose place is not there: a disk that is not mounted looks like that.

        A file that is gone from a folder that is there is none of them.
        """
        return [pattern.uri for pattern in self.patterns if not pattern.is_s3 and not pattern.has_place]

    def list(self) -> dict[str, SourceFile]:
        """All files that are there, by URI.

        Raises:
            StorageError: a disk or a store does not answer.
        """
        found: dict[str, SourceFile] = {}
        self.loose_links = set()
        passed_over: dict[str, str] = {}
        unreadable: dict[str, StorageError] = {}
        empty: dict[str, str] = {}
        for pattern in self.patterns:
            if pattern.is_s3:
                listed = [*self._list_s3(pattern, passed_over)]
            else:
                listed = [*self._list_local(pattern, passed_over, unreadable)]
            found.update((file.uri, file) for file in listed)
            if not any(pattern.means(file.uri) for file in listed):
                is_there = format_of(pattern.base) is None if pattern.is_s3 else os.path.exists(pattern.base or "/")
                empty[pattern.uri] = f"no file whose name ends in {SUPPORTED}" if is_there else "not there"
        for uri in [uri for uri in found if not is_utf8(uri)]:
            passed_over[uri] = "a name that is not UTF-8"
            del found[uri]
        self.passed_over, self.unreadable, self.empty = passed_over, unreadable, empty
        self._first_seen = {uri: seen for uri, seen in self._first_seen.items() if uri in found}
        return found

    def look_at(self, uri: str) -> SourceFile | None:
        """One file as it is now; None if it is not there.

        Raises:
            StorageError: the disk or the store does not answer.
        """
        if storage.is_s3(uri):
            found = s3.look_at(uri)
            return None if found is None else _object(uri, *found)
        with storage.storage_errors(uri):
            try:
                status = os.stat(uri)
            except OSError as error:
                if is_gone(error):
                    return None
                raise
            return self._local(uri, status) if stat.S_ISREG(status.st_mode) else None

    def _list_local(
        self, pattern: Pattern, passed_over: dict[str, str], unreadable: dict[str, StorageError]
    ) -> Iterator[SourceFile]:
        # The table may be named through a link or by `..`, and may come to be at any time.
        own = {_real(place) for place in self._own_places}
        with storage.storage_errors(pattern.base):
            walked = walk(pattern.base, own)
        self.loose_links.update(walked.loose_links)
        passed_over.update((path, "a table of its own") for path in walked.tables)
        passed_over.update((path, "neither a file nor a folder") for path in walked.others if self.means(path))
        for path, reason in walked.unreadable.items():
            unreadable[path] = StorageError(
                f"a folder that cannot be read: {reason}",
                where=path,
                help="give the user that runs this the right to list and enter it; what was taken up from it stays",
            )
        return (self._local(path, status) for path, status in walked.files.items() if self.means(path))

    def _list_s3(self, pattern: Pattern, passed_over: dict[str, str]) -> Iterator[SourceFile]:
        files: dict[str, SourceFile] = {}
        tables, others = set(), set()
        base = pattern.base.rstrip("/") + "/"
        for uri, etag, size_bytes, modified_s in s3.list_objects(pattern.base):
            if uri.startswith(self._own):
                continue
            if (at := uri.find(f"/{LOG_FOLDER}/", len(base))) > 0:
                tables.add(uri[:at])
            elif uri.startswith(base) and uri.endswith(f"{BESIDE_TABLES[0]}/status.json"):
                others.add(uri.removesuffix("status.json"))
            if format_of(uri) is None:
                continue
            files[uri] = _object(uri, etag, size_bytes, modified_s)
        tables = {table for table in tables if table.startswith(base)}
        others.update(f"{table}{end}/" for table in tables for end in ("", *BESIDE_TABLES))
        pattern.others = tuple(sorted(others))
        passed_over.update((table, "a table of its own") for table in tables)
        for uri in files:
            if not uri.startswith(base) or pattern.means(uri):
                continue
            if pattern.means(base + re.sub("/+", "/", uri[len(base) :]).lstrip("/")):
                passed_over[uri] = "a key with an empty part between slashes"
        return (file for file in files.values() if pattern.means(file.uri))

    def _local(self, path: str, status: os.stat_result) -> SourceFile:
        tag = with_moment(f"{status.st_size}-{status.st_mtime_ns}", status.st_ctime_ns)
        changed_us = status.st_ctime_ns // 1_000
        file = SourceFile(path, tag, status.st_mtime_ns // 1_000, status.st_size, changed_us=changed_us)
        # Moving a file changes its status and not its content: it was finished before it got its name.
        was_moved = status.st_ctime_ns > status.st_mtime_ns and status.st_size > 0
        if was_moved or time.time() - status.st_mtime >= self._settle_s:
            return file
        # A clock of another machine may be ahead: then what counts is how long we have seen it stand still.
        known_tag, since = self._first_seen.get(path, ("", 0.0))
        if known_tag != tag:
            self._first_seen[path] = (tag, since := time.monotonic())
        if time.monotonic() - since >= self._settle_s:
            return file
        return replace(file, is_settled=False)


def _real(uri: str) -> str:
    """A place by one name, where links and `..` give it several."""
    return uri if storage.is_s3(uri) else os.path.realpath(uri)


def _lies_in(uri: str, place: str) -> bool:
    return uri == place or uri.startswith(place.rstrip("/") + "/")


def _object(uri: str, etag: str, size_bytes: int, modified_s: float) -> SourceFile:
    # Whole seconds: some stores list finer times than they tell of one object.
    tag = with_moment(f"{etag}-{size_bytes}", int(modified_s))
    return SourceFile(uri, tag, int(modified_s * 1_000_000), size_bytes)


def is_utf8(text: str) -> bool:
    """Whether it can be written in UTF-8; a name that cannot is no name for a store or a log."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def in_order(files: Iterable[SourceFile]) -> list[SourceFile]:
    """By time of modification: of two files that state one fact the one modified last counts."""
    return sorted(files, key=lambda file: (file.modified_us, file.uri))
