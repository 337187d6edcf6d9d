"""The ledger of one table, kept up with its log, and the copy of it beside the table that saves reading the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import TableNotFoundError
from kblam_ray.table.commits import read_commits, read_last_commits
from kblam_ray.table.following import TableFollower
from kblam_ray.table.log import TableLog
from kblam_ray.table.refresh.ledger import NO_TABLE, Ledger, Taken

MAX_COMMITS_READ = 10_000
"""Commits of the log that are read where there is no copy of the ledger; what older ones took up is read again."""

_COMMITS_AT_ONCE = 256
_FORMAT = 1


class History:
    """What was taken up into one table, as its log tells it; one thread at a time.

    Attributes:
        uri: the table.
        ledger: as of the last look.
        log: the version of the last look; None: there was no table.

    Raises:
        InputError: a location that no table can have.
    """

    def __init__(self, uri: str) -> None:
        self._follower = TableFollower(uri)
        self.uri = self._follower.uri
        self.ledger = Ledger()
        self.log: TableLog | None = None
        self._kept = NO_TABLE
        self._notes_not_kept = 0
        self._history = -1
        self._unsaid: dict[str, tuple[str, int]] = {}
        self._said: dict[str, tuple[str, int]] = {}

    @property
    def base(self) -> int:
        """The version of the last look, as the base of a plan."""
        return NO_TABLE if self.log is None else self.log.version

    def look(self) -> TableLog | None:
        """Take in what the log tells now; returns the newest version, None without a table.

        Raises:
            TableError, StorageError: see `TableLog.open`; what was known stays.
        """
        try:
            log = self._follower.look()
        except TableNotFoundError:
            if self.log is not None:
                self._follower = TableFollower(self.uri)
                self.ledger, self.log, self._history, self._kept = Ledger(), None, -1, NO_TABLE
                self._unsaid, self._notes_not_kept = {}, 0
            return None
        if self._follower.history != self._history:
            # The first look, or another table in the place of the one that was known.
            is_first, self._history = self._history < 0, self._follower.history
            self.ledger, self._unsaid = (self._read_copy(log) if is_first else None) or (Ledger(), {})
            self._kept, self._notes_not_kept = self.ledger.version, 0
        if log.version > self.ledger.version:
            self._fold_up_to(log.version)
        self.log = log
        return log

    def observe(self, files: Mapping[str, str], base: int, *, complete: bool = False) -> None:
        """Note that at version `base` the table had nothing to take up from `files`; see `Ledger.observe`.

        It is not in the log, so the next commit says it too, be it of a later run: whoever does not know that a file
        was looked at would take it up after files that were modified later, and over what was written by hand since.
        """
        self.ledger.observe(files, base, complete=complete)
        self._notes_not_kept += 1
        self._unsaid.update((uri, (tag, base)) for uri, tag in files.items())

    def saying(self, files: Mapping[str, str], base: int, *, complete: bool, updated_at: int) -> dict[str, Any]:
        """What the log shall say of a commit that takes up `files`, planned against version `base`; see `Taken`."""
        unsaid = {uri: (tag, at) for uri, (tag, at) in self._unsaid.items() if at <= base}
        # The commit's own version is in the log, not in what it says.
        taken = Taken(NO_TABLE, base, files, complete=complete, updated_at=updated_at, looked=unsaid)
        self._said = unsaid
        return taken.metadata()

    def committed(self) -> None:
        """What `saying` told last is in the log."""
        for uri, at in self._said.items():
            if self._unsaid.get(uri) == at:
                del self._unsaid[uri]
        self._said = {}

    def keep(self) -> None:
        """Replace the copy beside the table, unless it would be the same.

        Raises:
            StorageError: it cannot be written; nothing is lost by that.
        """
        if self.log is None or not self.changes_not_kept:
            return
        unsaid = [[uri, tag, base] for uri, (tag, base) in self._unsaid.items()]
        data = {"format": _FORMAT, "table_id": self.log.table_id, "unsaid": unsaid, **self.ledger.to_json()}
        storage.replace_file(self._copy_place(), json.dumps(data, ensure_ascii=False).encode("utf-8"))
        self._kept, self._notes_not_kept = self.ledger.version, 0

    @property
    def changes_not_kept(self) -> int:
        """Versions, and looks with nothing to do, since the copy beside the table was made."""
        return self.ledger.version - self._kept + self._notes_not_kept

    def _copy_place(self) -> str:
        return storage.beside(self.uri, "refresh", "ledger.json")

    def _read_copy(self, log: TableLog) -> tuple[Ledger, dict[str, tuple[str, int]]] | None:
        """The copy beside the table, where it is one of this table's past, and what no commit says of it yet.

        It only saves work: damage is no error.
        """
        data = storage.read_file(self._copy_place())
        try:
            found: dict[str, Any] = json.loads(data or b"{}")
            if found["format"] != _FORMAT or found["table_id"] != log.table_id or found["version"] > log.version:
                return None
            unsaid = {str(uri): (str(tag), int(base)) for uri, tag, base in found.get("unsaid", [])}
            return Ledger.from_json(found), unsaid
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _fold_up_to(self, version: int) -> None:
        while NO_TABLE < self.ledger.version < version:
            start = self.ledger.version + 1
            commits = read_commits(self.uri, range(start, min(start + _COMMITS_AT_ONCE, version + 1)))
            if commits is None:
                # The log has forgotten commits: whether one of them took up something is unknown.
                self.ledger = Ledger()
                break
            for commit in commits:
                self.ledger.fold(commit.version, commit.info)
        if self.ledger.version == NO_TABLE:
            self._fold_anew(version)

    def _fold_anew(self, version: int) -> None:
        """From the oldest commit that the log still has, so that files of forgotten ones are read again."""
        oldest, commits = version + 1, []
        while oldest > max(0, version + 1 - MAX_COMMITS_READ):
            wanted = range(max(0, oldest - _COMMITS_AT_ONCE), oldest)
            found = read_last_commits(self.uri, wanted)
            commits.append(found)
            oldest -= len(found)
            if len(found) < len(wanted):
                break
        self.ledger = Ledger()
        for found in reversed(commits):
            for commit in found:
                self.ledger.fold(commit.version, commit.info)
        self.ledger.version = version
