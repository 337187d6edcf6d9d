"""What was taken up from where: a pure fold of the commits that took it up.

Each commit of a refresh says in the log which files it took up, in which state (a tag), and the version it was
planned against, its base. Several refreshes may work on a table at once and die at any moment, and the log is the one
thing that they cannot disagree about: state kept beside the table could say "done" of what was lost.

Commit order is not the order in which rows win (that is `updated_at`, `write_id`), and a plan writes only what differed
at its base. So a commit is sure to have put the table in step with its files only if no other refresh committed between
its base and itself. Where one did, the files of both are in dispute: they are read again, at a base that has seen both,
and whatever the crossing commits wrote differently is put right. What others wrote since, and what was taken up later,
stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

METADATA_KEY = "kblam_refresh"
"""The name under which a commit's entry in the log says what it took up."""

WRITE_PREFIX = "refresh-"
"""How the ids of a refresh's writes begin: so that a row says whether a refresh wrote it."""

GONE = ""
"""The tag of a file that is not there."""

NO_TABLE = -1
"""The base of a plan for a table that did not exist."""


MAX_COMMITS_KNOWN = 1_000
"""Refreshes that are told apart when one that began long ago crosses them; earlier ones' files are taken up anew."""


def with_moment(state: str, moment: int) -> str:
    """The tag of a file in a state, in which it came to be at a moment of its store's clock; see `covers`."""
    return f"{state}@{moment}"


def covers(known: str, tag: str) -> bool:
    """Whether who has taken up a file as `known` need not take it up as `tag`.

    A later moment in the same state is news: the file was replaced, or put again. An earlier one is none, so that
    machines that see different moments, because each has a copy of its own, do not take turns for ever: they agree on
    the latest. A tag without a moment, as in tables of earlier releases, covers its state at any moment.
    """
    if known == tag:
        return True
    (known_state, known_moment), (state, moment) = _parts(known), _parts(tag)
    if moment is None or state != known_state:
        return False
    return known_moment is None or known_moment >= moment


def state_of(tag: str) -> str:
    """The tag without its moment."""
    return _parts(tag)[0]


def _moment(tag: str) -> int:
    return _parts(tag)[1] or 0


def _parts(tag: str) -> tuple[str, int | None]:
    state, _, moment = tag.rpartition("@")
    return (state, int(moment)) if moment.isdecimal() and state else (tag, None)


class Verdict(Enum):
    """What must be done about a file: nothing; take it up; or read it again, because refreshes crossed."""

    DONE = "done"
    CHANGED = "changed"
    DISPUTED = "disputed"


@dataclass(frozen=True)
class Taken:
    """What one commit took up.

    Attributes:
        version: of the commit.
        base: the version that it was planned against, NO_TABLE without one.
        files: uri -> tag.
        complete: whether `files` are all of the sources, so that facts of any other file went.
        updated_at: of the rows that it wrote.
        looked: uri -> (tag, version): at that version, not later than the base, there was nothing to take up from the
            file. It had no commit of its own to say so.
    """

    version: int
    base: int
    files: Mapping[str, str]
    complete: bool = False
    updated_at: int = 0
    looked: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """What the commit's entry in the log says."""
        return {
            METADATA_KEY: {
                "base": self.base,
                "complete": self.complete,
                "updated_at": self.updated_at,
                "files": [[uri, tag] for uri, tag in self.files.items()],
                "looked": [[uri, tag, base] for uri, (tag, base) in self.looked.items()],
            }
        }

    @classmethod
    def parse(cls, version: int, info: Mapping[str, Any]) -> Taken | None:
        """What a commit's entry in the log says; None if it is no refresh's, or says nothing that can be used."""
        said: Any = info.get(METADATA_KEY)
        try:
            return cls(
                version=version,
                base=int(said["base"]),
                files={str(uri): str(tag) for uri, tag in said["files"]},
                complete=bool(said["complete"]),
                updated_at=int(said["updated_at"]),
                looked={str(uri): (str(tag), int(base)) for uri, tag, base in said["looked"]},
            )
        except (TypeError, ValueError, KeyError):
            return None


@dataclass
class Record:
    """What is known of one file.

    Attributes:
        tags: tag -> (the newest version whose facts were compared with the file in that state, the newest version that
            says the file was in that state).
        floor: a comparison below this version does not count, because refreshes crossed.
        stamps: the `updated_at` of the commits that crossed and were not settled yet.
    """

    tags: dict[str, tuple[int, int]] = field(default_factory=dict)
    floor: int = NO_TABLE
    stamps: set[int] = field(default_factory=set)

    @property
    def seen(self) -> int:
        return max((seen for _, seen in self.tags.values()), default=NO_TABLE)

    def note(self, tag: str, base: int, seen: int) -> None:
        old_base, old_seen = self.tags.get(tag, (NO_TABLE, NO_TABLE))
        self.tags[tag] = max(base, old_base), max(seen, old_seen)
        if base >= self.floor:
            self.stamps.clear()
        if len(self.tags) > 2:
            # Only the newest other state can outdate one; an older state that comes back is a change. Of a kept state
            # the latest moment stays, so that the machine that sees it knows the state again.
            newest = sorted(self.tags, key=lambda tag: (self.tags[tag][1], self.tags[tag][0]))[-2:]
            latest = {max((tag for tag in self.tags if covers(tag, kept)), key=_moment) for kept in newest}
            self.tags = {tag: at for tag, at in self.tags.items() if tag in newest or tag in latest}


@dataclass
class Ledger:
    """The fold of a table's log up to `version`: what every file's state was when it was taken up.

    Attributes:
        last_seen: the newest version that says anything of any file.
        last_complete: the newest version that says it of all sources there were.
        commits: the last refreshes: version and `updated_at`, oldest first.
    """

    version: int = NO_TABLE
    records: dict[str, Record] = field(default_factory=dict)
    last_seen: int = NO_TABLE
    last_complete: int = NO_TABLE
    commits: list[tuple[int, int]] = field(default_factory=list)

    def fold(self, version: int, info: Mapping[str, Any]) -> None:
        """Take in the next commit of the log, whoever made it."""
        taken = Taken.parse(version, info)
        if taken is not None:
            self._take(taken)
        self.version = version

    def observe(self, files: Mapping[str, str], base: int, *, complete: bool = False) -> None:
        """Note that at version `base`, which has been folded, the table had nothing to take up from `files`.

        Args:
            complete: whether `files` are all of the sources, and the table held nothing else.
        """
        files = dict(files)
        if complete:
            files.update((uri, GONE) for uri in self.records if uri not in files)
            self.last_complete = max(self.last_complete, base)
        for uri, tag in files.items():
            self.records.setdefault(uri, Record()).note(tag, base, base)
            self.last_seen = max(self.last_seen, base)

    def verdict(self, uri: str, tag: str) -> Verdict:
        """What must be done about a file that is now in the state `tag`."""
        record = self.records.get(uri)
        known = [] if record is None else [other for other in record.tags if covers(other, tag)]
        if record is None or not known:
            return Verdict.CHANGED if tag != GONE or record is not None else Verdict.DONE
        base = max(record.tags[other][0] for other in known)
        rest = {other: seen for other, (_, seen) in record.tags.items() if other not in known}
        if base >= max([record.floor, *rest.values()]):
            return Verdict.DONE
        # What an earlier moment says may be old content, or the same on another machine: it is in dispute, no news.
        others = max((seen for other, seen in rest.items() if state_of(other) != state_of(tag)), default=NO_TABLE)
        return Verdict.CHANGED if others > max(base, record.floor) else Verdict.DISPUTED

    def stamps(self, uri: str) -> frozenset[int]:
        """Of a file in dispute: the `updated_at` of the refreshes' rows that may be put right from it."""
        return frozenset(self.records[uri].stamps)

    def is_complete(self) -> bool:
        """Whether nothing was taken up since the table was last made equal to all sources."""
        return self.last_complete >= self.last_seen

    def _take(self, taken: Taken) -> None:
        is_crossed = self.last_seen > taken.base
        crossed = [record for record in self.records.values() if record.seen > taken.base] if is_crossed else []
        for uri, (tag, base) in taken.looked.items():
            self.records.setdefault(uri, Record()).note(tag, base, base)
        files = dict(taken.files)
        if taken.complete:
            files.update((uri, GONE) for uri in self.records if uri not in files)
        for uri, tag in files.items():
            record = self.records.setdefault(uri, Record())
            record.note(tag, taken.base, taken.version)
        self.commits = [*self.commits[-MAX_COMMITS_KNOWN + 1 :], (taken.version, taken.updated_at)]
        if is_crossed:
            stamps = {updated_at for version, updated_at in self.commits if version > taken.base}
            are_all_known = self.commits[0][0] <= taken.base + 1 or len(self.commits) < MAX_COMMITS_KNOWN
            for record in [*crossed, *(self.records[uri] for uri in files)]:
                record.floor = taken.version
                record.stamps |= stamps
                if not are_all_known:
                    record.tags = {}  # taken up anew
        self.last_seen = taken.version
        if taken.complete:
            self.last_complete = taken.version

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON; `from_json` makes an equal one."""
        return {
            "version": self.version,
            "last_seen": self.last_seen,
            "last_complete": self.last_complete,
            "commits": [list(commit) for commit in self.commits],
            "files": {
                uri: [record.floor, sorted(record.stamps), {tag: list(at) for tag, at in record.tags.items()}]
                for uri, record in self.records.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """Raises: KeyError, TypeError, ValueError, AttributeError for what `to_json` did not make."""
        records = {
            str(uri): Record(
                {str(tag): (int(base), int(seen)) for tag, (base, seen) in tags.items()},
                int(floor),
                {int(stamp) for stamp in stamps},
            )
            for uri, (floor, stamps, tags) in data["files"].items()
        }
        commits = [(int(version), int(stamp)) for version, stamp in data["commits"]]
        return cls(int(data["version"]), records, int(data["last_seen"]), int(data["last_complete"]), commits)
