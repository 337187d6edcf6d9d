"""What the sources hold and what of it must be taken up: the listing, the events, the files kept out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kblam_ray.errors import KblamError, StorageError
from kblam_ray.table.plan import WriteMode
from kblam_ray.table.refresh.ledger import GONE, Ledger, Verdict
from kblam_ray.table.refresh.sources import SourceFile, Sources, in_order
from kblam_ray.table.refresh.sqs import EventQueue, Message

_RETRY_S = (2.0, 60.0)
"""A file that its store does not give is tried again after the first, then ever more rarely, up to the second."""

_AWAY_AFTER = 3
"""When a store shows none of so many objects, it is away: the others are not asked for, which takes long then."""

_FORGET_UNSEEN_S = 600.0
"""An object that its store did not show is forgotten when no event has named it for so long."""


@dataclass(frozen=True)
class Pending:
    """What a look found to do.

    Attributes:
        files: to be taken up, in the order in which they count.
        disputed: those among them that were taken up and must be read again only because refreshes crossed.
        unsettled: local files that may still be written.
        all_files: all of the sources, where a sync can be made and is owed; else None.
        hindrance: why a sync that is owed waits for a person; None where none is owed, or nothing but time is missing.
    """

    files: list[SourceFile]
    disputed: frozenset[str]
    unsettled: list[SourceFile]
    all_files: list[SourceFile] | None = None
    hindrance: str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.files or self.all_files)


@dataclass
class _Refusal:
    tag: str
    retry_at: float | None
    wait_s: float


@dataclass
class _Unseen:
    error: StorageError
    retry_at: float
    wait_s: float


class Watch:
    """The sources as last seen.

    Args:
        events: the queue that says what changed; None: every look lists all.
        list_every_s: between full listings where there is a queue.

    Attributes:
        files: as last seen, by URI.
        listing_s: how long the last full listing took.
    """

    def __init__(self, sources: Sources, mode: WriteMode, events: EventQueue | None, list_every_s: float) -> None:
        self._sources, self._mode, self._events, self._list_every_s = sources, mode, events, list_every_s
        self.files: dict[str, SourceFile] = {}
        self.listing_s = 0.0
        self._listed_at: float | None = None
        self._messages: list[Message] = []
        self._unfollowed: list[Message] = []
        self._event_us: dict[str, tuple[str, int]] = {}
        self._refusals: dict[str, _Refusal] = {}
        self._unseen: dict[str, _Unseen] = {}

    def look(self, *, receive: bool = False) -> None:
        """See what the sources hold now.

        Args:
            receive: ask the queue here, instead of taking what its thread received.

        Raises:
            StorageError: a disk, a store or the queue does not answer.
        """
        now = time.monotonic()
        if self._events is None or self._listed_at is None or now - self._listed_at >= self._list_every_s:
            self.files = self._sources.list()
            self._listed_at, self.listing_s = now, time.monotonic() - now
            self._refusals = {uri: refusal for uri, refusal in self._refusals.items() if uri in self.files}
        if self._events is not None:
            self._unfollowed += self._events.receive_all() if receive else self._events.take()
            self._follow_events()

    def _follow_events(self) -> None:
        """An event says that an object changed, perhaps long ago; what it is now, the store says."""
        # Some may be another table's: that is known since the listing, and the message may be older.
        uris = {event.uri for message in self._unfollowed for event in message.events}
        num_failed, has_answered = 0, False
        for uri in filter(self._sources.means, uris):
            known = self._unseen.get(uri)
            if known is not None and time.monotonic() < known.retry_at:
                continue
            try:
                found = self._sources.look_at(uri)
            except StorageError as error:
                wait_s = _RETRY_S[0] if known is None else min(2 * known.wait_s, _RETRY_S[1])
                self._unseen[uri] = _Unseen(error, time.monotonic() + wait_s, wait_s)
                num_failed += known is None
                if num_failed == _AWAY_AFTER and not has_answered:
                    raise
                continue
            has_answered = True
            self._unseen.pop(uri, None)
            if found is None:
                self.files.pop(uri, None)
            else:
                self.files[uri] = found
        followed, waiting, left = [], [], []
        for message in self._unfollowed:
            unseen = [self._unseen[event.uri] for event in message.events if event.uri in self._unseen]
            if not unseen:
                followed.append(message)
            elif all(known.wait_s < _RETRY_S[1] for known in unseen):
                waiting.append(message)
            else:
                left.append(message)
        for message in followed:
            for event in message.events:
                if event.at_us is not None and event.etag is not None:
                    self._event_us[event.uri] = (event.etag, event.at_us)
        self._messages += followed
        self._unfollowed = waiting
        if self._events is not None:
            self._events.forget(left)  # not to be held for ever: there is room for so many only
        forgotten = time.monotonic() - _FORGET_UNSEEN_S
        self._unseen = {uri: known for uri, known in self._unseen.items() if known.retry_at > forgotten}

    def unseen(self) -> dict[str, StorageError]:
        """Objects that events name and that the store does not show, and why."""
        return {uri: known.error for uri, known in self._unseen.items()}

    def since_us(self, file: SourceFile) -> int:
        """When the file came to be as it is: as its event says, to the millisecond, else as the store says."""
        etag, at_us = self._event_us.get(file.uri, ("", 0))
        return at_us if etag and file.tag.startswith(f"{etag}-") else file.since_us

    def pending(self, ledger: Ledger) -> Pending:
        """What must be done, as far as the ledger knows."""
        open_files, disputed, unsettled = [], set(), []
        for file in self.files.values():
            verdict = ledger.verdict(file.uri, file.tag)
            if verdict is Verdict.DONE or self.is_refused(file):
                continue
            if not file.is_settled:
                unsettled.append(file)
                continue
            open_files.append(file)
            if verdict is Verdict.DISPUTED:
                disputed.add(file.uri)
        all_files = hindrance = None
        if self._mode == "sync" and self._is_sync_owed(ledger, open_files):
            hindrance = self._hindrance(ledger)
            # The facts of a file that cannot be read must not go; what is in a folder that cannot is not known.
            is_readable = not (unsettled or self._sources.unreadable)
            is_readable = is_readable and not any(self.is_refused(file) for file in self.files.values())
            if hindrance is None and is_readable:
                all_files = in_order(self.files.values())
        return Pending(in_order(open_files), frozenset(disputed), unsettled, all_files, hindrance)

    def _is_sync_owed(self, ledger: Ledger, open_files: list[SourceFile]) -> bool:
        is_gone = any(uri not in self.files and ledger.verdict(uri, GONE) is not Verdict.DONE for uri in ledger.records)
        return bool(open_files) or is_gone or not ledger.is_complete()

    def _hindrance(self, ledger: Ledger) -> str | None:
        """Why facts of files that are not there must stay for now."""
        loose = [link for link in sorted(self._sources.loose_links) if _is_known_below(link, ledger)]
        if missing := [*self._sources.missing(), *loose]:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            return (
                f"{missing[0]}{others}: not there. Help: mount it, or take it out of the input if it is gone for good"
            )
        if not self.files:
            return "no input has a file. Help: check the inputs; to empty a table on purpose, delete it"
        return None

    def is_refused(self, file: SourceFile) -> bool:
        """Whether the file is kept out, in this state, now."""
        refusal = self._refusals.get(file.uri)
        if refusal is None or refusal.tag != file.tag:
            return False
        return refusal.retry_at is None or time.monotonic() < refusal.retry_at

    def refused(self) -> list[SourceFile]:
        """The files that are there and could not be taken up in the state that they are in."""
        return [
            file for uri, refusal in self._refusals.items() if (file := self.files.get(uri)) and file.tag == refusal.tag
        ]

    def has_failed_before(self, files: Iterable[SourceFile]) -> bool:
        """Whether the store did not give one of the files before."""
        refusals = (self._refusals.get(file.uri) for file in files)
        return any(refusal is not None and refusal.retry_at is not None for refusal in refusals)

    def refuse(self, files: Mapping[SourceFile, KblamError]) -> dict[SourceFile, KblamError]:
        """Keep files out until they change, or for a while where the store failed; returns those that are news."""
        news = {}
        for file, error in files.items():
            known = self._refusals.get(file.uri)
            is_known = known is not None and known.tag == file.tag
            wait_s = min(2 * known.wait_s, _RETRY_S[1]) if known and is_known else _RETRY_S[0]
            retry_at = time.monotonic() + wait_s if isinstance(error, StorageError) else None
            self._refusals[file.uri] = _Refusal(file.tag, retry_at, wait_s)
            if not is_known:
                news[file] = error
        return news

    def accept(self, files: list[SourceFile]) -> None:
        """Files were taken up."""
        for file in files:
            self._refusals.pop(file.uri, None)

    def settle_messages(self, ledger: Ledger) -> None:
        """Delete the messages whose objects are all taken up, and let go of those that name a refused file.

        Raises:
            StorageError: the queue does not answer.
        """
        if self._events is None:
            return
        done, left, kept = [], [], []
        for message in self._messages:
            uris = {event.uri for event in message.events}
            files = [file for uri in uris if (file := self.files.get(uri))]
            gone = [uri for uri in uris if uri not in self.files] if self._mode == "sync" else []
            if any(self.is_refused(file) for file in files):
                left.append(message)
            elif all(ledger.verdict(file.uri, file.tag) is Verdict.DONE for file in files) and all(
                ledger.verdict(uri, GONE) is Verdict.DONE for uri in gone
            ):
                done.append(message)
            else:
                kept.append(message)
        self._messages = kept
        self._events.forget(left)
        self._events.done(done)
        waiting = {event.uri for message in kept for event in message.events}
        self._event_us = {uri: at for uri, at in self._event_us.items() if uri in waiting}


def _is_known_below(link: str, ledger: Ledger) -> bool:
    """Whether anything was taken up through a link and has not gone: one that always led nowhere hinders nobody."""
    uris = (uri for uri in ledger.records if uri == link or uri.startswith(link + "/"))
    return any(ledger.verdict(uri, GONE) is not Verdict.DONE for uri in uris)
