"""Keep a table in step with its sources: look, take up what changed, commit, tidy, and again; or once.

    sources --look--> what changed --few texts--> this process's encoder --+
       |                   |                                              +--> one commit, which says
    events (SQS)           +--many----> Ray's pool of encoders -----------+    what it took up: the ledger

Any number of refreshes may run on one table, beside other writers and compactions, and may be killed at any moment.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kblam_ray.errors import (
    BadRowError,
    EncoderError,
    FactIdCollisionError,
    InputError,
    KblamError,
    RayStartError,
    StorageError,
    TableNotFoundError,
)
from kblam_ray.table.knowledge_base import KnowledgeBase
from kblam_ray.table.refresh.backlog import take_up_backlog
from kblam_ray.table.refresh.history import History
from kblam_ray.table.refresh.metrics import RefreshMetrics
from kblam_ray.table.refresh.owed import Owed
from kblam_ray.table.refresh.report import Report
from kblam_ray.table.refresh.settings import RefreshSettings
from kblam_ray.table.refresh.sources import SourceFile, Sources
from kblam_ray.table.refresh.sqs import EventQueue
from kblam_ray.table.refresh.taking import Outcome, Resident
from kblam_ray.table.refresh.upkeep import Upkeep
from kblam_ray.table.refresh.watching import Pending, Watch

SMALL_BYTES = 16_000_000
"""Files of up to so many bytes together are read in this process."""

MAX_BATCH_FILES = 10_000
MAX_BATCH_BYTES = 2_000_000_000
"""What one commit takes up at most, unless it is one file or a sync: so that a long backlog is served step by step."""

_BACKOFF_S = (1.0, 30.0)
_KEEP_EVERY_CHANGES = 100
_SLICE_S = 0.1
_LISTING_SHARE = 5


def refresh(settings: RefreshSettings) -> dict[str, Any]:
    """Run until it is stopped, or with `once` until all is taken up; returns the job's summary.

    Raises:
        InputError: settings that do not fit the table, and with `once` a file that cannot be taken up.
        StorageError, EncoderError, RayStartError: with `once`, the machinery failed; what was committed stays.
    """
    return Refresher(settings).run()


class _StopNow(BaseException):
    """The time to finish is over: leave at once. Nothing is lost: what is not committed is read again."""


class Refresher:
    """One run.

    Attributes:
        stopping: set it to end the run after the refresh that is under way.
    """

    def __init__(self, settings: RefreshSettings) -> None:
        self._settings = settings
        self._history = History(settings.kb)
        uri = self._history.uri
        self._sources = Sources(settings.input, uri, settings.settle_s)
        self._events = EventQueue(settings.sqs_queue_url, self._sources.means) if settings.sqs_queue_url else None
        if self._events and not any(pattern.is_s3 for pattern in self._sources.patterns):
            # Its messages name nothing of ours, so all of them would be deleted.
            raise InputError(
                "a queue with S3 events, and no input on S3",
                where=self._events.url,
                help="local inputs are watched without --sqs-queue-url; or add the s3:// input that the queue is for",
            )
        self._watch = Watch(self._sources, settings.mode, self._events, settings.list_every_s)
        self._resident = Resident(settings, self._history, self._sources)
        self._report = Report(uri)
        self._upkeep = Upkeep(uri, settings, self._report)
        self._batch_files = MAX_BATCH_FILES
        self._owed = Owed(settings.settle_s) if settings.once else None
        self._was_away = False
        self._queue_failures = 0
        self._held: tuple[object, str] | None = None
        self._passed_over: set[str] = set()
        self.stopping = False

    def run(self) -> dict[str, Any]:
        """See `refresh`."""
        settings, report = self._settings, self._report
        if settings.metrics_port is not None:
            report.metrics = RefreshMetrics(report.kb_uri, settings.metrics_host, settings.metrics_port)
            report.say(f"metrics at http://{settings.metrics_host}:{report.metrics.port}/metrics")
        if self._events and not settings.once:
            self._events.start()
        try:
            if self._owed is not None:
                self._catch_up(self._owed)
            else:
                with self._stopped_by_signals():
                    self._keep_watching()
        except KblamError as error:
            report.end(error)
            raise
        finally:
            self._close()
        return self._summary()

    def _catch_up(self, owed: Owed) -> None:
        self._refuse_what_does_not_fit()
        while True:
            pending, has_progressed = self._pass()
            if not has_progressed and not owed.is_any_left(pending):
                break
            if self._has_refreshed_enough():
                break
            if owed.is_in_vain(pending, has_progressed):
                # A sync may be owed for files that went alone; then it is any of those that are there.
                names = [file.uri for file in [*pending.files, *pending.unsettled] or pending.all_files or []]
                raise StorageError(
                    f"{len(names)} files change all the time", where=names[0], help="run it when they are finished"
                )
            if not has_progressed:
                self._sleep(min(self._until_next_look(pending), max(self._settings.settle_s, _SLICE_S)))
        if self._settings.mode == "sync" and pending.unsettled and not owed.has_synced:
            self._report.say(
                f"no facts are taken away in this run: {len(pending.unsettled)} files, the first of them "
                f"{pending.unsettled[0].uri}, came while it ran and may still be written"
            )
        self._upkeep.run(self._history.log)
        refused = self._report.refused
        if refused:
            first, error = next(iter(refused.items()))
            others = f", and {len(refused) - 1} other files" if len(refused) > 1 else ""
            what = f"{error.what}{others}; all else is taken up"
            raise type(error)(what, where=error.where or first, help=error.help) from error

    def _refuse_what_does_not_fit(self) -> None:
        """Wrong settings are said at once, and not only when there is something to take up with them."""
        log = self._history.look()
        if log is not None or self._settings.encoder:
            self._resident.info(log)

    def _keep_watching(self) -> None:
        backoff_s = _BACKOFF_S[0]
        is_warm = self._settings.small_texts == 0
        while not self.stopping:
            self._note_queue()
            try:
                if not is_warm:
                    self._history.look()
                    self._resident.encoder()
                    is_warm = True
                pending, has_progressed = self._pass()
            except (StorageError, EncoderError, RayStartError) as error:
                self._report.fail(error, backoff_s)
                self._sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S[1])
                continue
            self._report.recovered()
            backoff_s = _BACKOFF_S[0]
            if self._has_refreshed_enough():
                break
            if not has_progressed:
                self._sleep(self._until_next_look(pending))

    def _until_next_look(self, pending: Pending) -> float:
        """Seconds: the usual ones, or fewer where a file will have stood still for long enough before."""
        usual_s = max(self._settings.poll_s, _LISTING_SHARE * self._watch.listing_s)
        now = time.time()
        ages_s = [now - file.modified_us / 1e6 for file in pending.unsettled]
        return min([usual_s, *(max(_SLICE_S, self._settings.settle_s - age_s) for age_s in ages_s)])

    def _pass(self) -> tuple[Pending, bool]:
        """Look once and take up one batch; returns what was found, and whether anything came of it."""
        report, history = self._report, self._history
        log = history.look()
        if report.version is None and report.previous_version is None and log is not None:
            report.previous_version = log.version
            report.read_status()
        self._watch.look(receive=self._settings.once)
        self._say_passed_over()
        report.found_empty(self._sources.empty)
        pending = self._watch.pending(history.ledger)
        report.hindered(pending.hindrance)
        unreadable = {**self._sources.unreadable, **self._watch.unseen()}
        report.forget_refused({file.uri for file in self._watch.refused()} | unreadable.keys())
        report.refuse_places(unreadable)
        report.looked([*pending.files, *pending.unsettled], None if log is None else log.version)
        if self._held is not None and not self._is_held(pending):
            self._held = None
            report.note("sync", None)
        is_wanted = not pending.is_empty and not self._is_held(pending)
        if self._owed is not None:
            self._owed.looked(self._watch.files)
            is_wanted = is_wanted and self._owed.is_any_left(pending)
        has_progressed = False
        if is_wanted:
            has_progressed = self._take_up(pending)
            history.look()
        self._watch.settle_messages(history.ledger)
        if not self._settings.once:
            self._upkeep.consider(history.log)
        if history.changes_not_kept >= _KEEP_EVERY_CHANGES:
            history.keep()
        report.write_status("watching")
        return pending, has_progressed

    def _take_up(self, pending: Pending) -> bool:
        started = time.monotonic()
        sync = pending.all_files is not None
        planned_for = self._resident.info(self._history.log)
        files = pending.all_files if pending.all_files is not None else self._batch(pending)
        try:
            outcome = self._one_commit(files, sync)
        except (BadRowError, FactIdCollisionError) as error:
            if sync:
                self._hold(pending, error)
                return False
            if len(files) > 1:
                # Which of the files it is shows when there are fewer of them.
                self._batch_files = max(1, len(files) // 2)
                return True
            self._refuse({files[0]: error})
            return True
        except InputError as error:
            if sync and error.code == InputError.code:
                self._hold(pending, error)
                return False
            if self._resident.info(self._history.look()) == planned_for:
                raise
            # Another program made the table since the look: the next one takes its encoder and its identity.
            return False
        self._batch_files = min(MAX_BATCH_FILES, 2 * self._batch_files)
        if self._is_store_away(files, outcome):
            raise next(iter(outcome.refused.values()))
        self._refuse(outcome.refused)
        self._watch.accept(outcome.taken)
        if self._owed is not None:
            self._owed.settle(outcome.taken)
            self._owed.has_synced |= sync and bool(outcome.taken)
        news = {file.uri: self._watch.since_us(file) for file in pending.files if file.uri not in pending.disputed}
        self._report.took_up(outcome, news, time.monotonic() - started)
        return bool(outcome.taken or outcome.refused)

    def _one_commit(self, files: list[SourceFile], sync: bool) -> Outcome:
        outcome = None
        if sum(file.size_bytes for file in files) <= SMALL_BYTES and len(files) <= MAX_BATCH_FILES:
            outcome = self._resident.take_up(files, sync=sync, disputed=self._disputed)
        if outcome is not None:
            return outcome
        self._report.say(f"{len(files)} files are taken up by Ray's workers")
        try:
            return take_up_backlog(
                files, self._settings, self._history, self._sources, sync=sync, disputed=self._disputed
            )
        except KblamError:
            raise
        except Exception as error:
            if not _is_of_ray(error):
                raise
            _leave_ray()
            raise RayStartError(
                f"the workers failed: {str(error).partition(chr(10))[0]}",
                where="Ray",
                help="what was embedded is kept and used by the next try; check the cluster with `ray status`",
            ) from error

    def _is_store_away(self, files: list[SourceFile], outcome: Outcome) -> bool:
        """Whether none of the files could be had, for the first time; after that it is the files."""
        gave_none = len(outcome.refused) == len(files) and all(
            isinstance(error, StorageError) for error in outcome.refused.values()
        )
        was_away, self._was_away = self._was_away, gave_none
        return gave_none and not was_away and not self._watch.has_failed_before(files)

    def _disputed(self) -> frozenset[str]:
        return self._watch.pending(self._history.ledger).disputed

    def _batch(self, pending: Pending) -> list[SourceFile]:
        """The first of the files, as many as one commit should take up, and all that are in dispute."""
        size_bytes = 0
        for number, file in enumerate(pending.files):
            size_bytes += file.size_bytes
            if number and (number >= self._batch_files or size_bytes > MAX_BATCH_BYTES):
                first = pending.files[:number]
                return first + [file for file in pending.files[number:] if file.uri in pending.disputed]
        return pending.files

    def _refuse(self, refused: dict[SourceFile, KblamError]) -> None:
        if self._owed is not None:
            self._owed.settle(refused)
        self._report.refuse(self._watch.refuse(refused))

    def _say_passed_over(self) -> None:
        passed_over = self._sources.passed_over
        for uri in sorted(passed_over.keys() - self._passed_over):
            self._report.say(f"passed over: {passed_over[uri]}: {uri!r}")
        self._passed_over = set(passed_over)

    def _hold(self, pending: Pending, error: KblamError) -> None:
        """A sync that would do harm waits until the sources change."""
        if self._settings.once:
            raise error
        self._held = _state(pending), str(error)
        self._report.say(f"nothing is changed until the sources are: {error}")
        self._report.count(error.code)
        self._report.note("sync", error)

    def _note_queue(self) -> None:
        """The queue is asked in a thread of its own, which fails on its own."""
        if self._events is not None:
            failures = self._events.failures
            if failures > self._queue_failures:
                self._report.count(StorageError.code, failures - self._queue_failures)
            self._queue_failures = failures
            self._report.note("queue", self._events.trouble)

    def _is_held(self, pending: Pending) -> bool:
        return self._held is not None and self._held[0] == _state(pending)

    def _has_refreshed_enough(self) -> bool:
        return self._settings.max_refreshes is not None and self._report.refreshes >= self._settings.max_refreshes

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            if self._events is not None and self._events.has_received:
                return
            time.sleep(min(_SLICE_S, max(0.0, until - time.monotonic())))

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the watch: the refresh under way is finished if that can be done in time."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self.stopping:
                raise _StopNow
            self.stopping = True
            signal.setitimer(signal.ITIMER_REAL, max(self._settings.stop_s, 0.001))

        def give_up(*_: object) -> None:
            raise _StopNow

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGALRM: give_up}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        except _StopNow:
            self._report.say("stopped in the middle of a refresh: what it did not commit is taken up by the next run")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _close(self) -> None:
        if self._events:
            self._events.stop()
            self._note_queue()
        self._upkeep.finish(self._settings.stop_s)
        try:
            self._history.keep()
        except StorageError as error:
            self._report.say(f"the copy of the ledger was not written: {error}")
        self._report.write_status("stopped", at_once=True)
        if self._report.metrics:
            self._report.metrics.close()

    def _summary(self) -> dict[str, Any]:
        num_facts = None
        try:
            kb = KnowledgeBase.open(self._history.uri)
            self._report.version, num_facts = kb.version, kb.num_facts
        except TableNotFoundError:
            num_facts = 0
        except StorageError as error:
            self._report.say(f"the facts were not counted: {error}")
        return {"kb": self._history.uri, **self._report.summary(), "num_facts": num_facts}


def _state(pending: Pending) -> object:
    return tuple((file.uri, file.tag) for file in pending.all_files or pending.files)


def _is_of_ray(error: Exception) -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and isinstance(error, ray.exceptions.RayError)


def _leave_ray() -> None:
    """So that the next try connects anew."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
