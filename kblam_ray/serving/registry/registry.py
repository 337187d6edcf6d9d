"""The registry: says what is wanted, keeps the leases of processes, and knows when every replica serves a version.

One event loop calls it; nothing here starts threads but for the state object. A registry that dies is made anew by
whoever runs it. With a state object it goes by that; without one it takes over what the processes that outlived it say
was wanted, the latest of them, and puts on top what it was asked for itself meanwhile. Until every living process must
have reported (a lease's time after the start) it does not say that all of them serve anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from kblam_ray.errors import NotServedError, UnavailableError
from kblam_ray.serving.registry.reading import describe, serves
from kblam_ray.serving.registry.revisions import Revisions
from kblam_ray.serving.registry.state import State, StateStore, checked_spec
from kblam_ray.serving.wanted import KbSpec, Overview, ProcessReport, RegistryLike, Wanted

logger = logging.getLogger(__name__)

SHORTEST_WAIT_S = 0.001
"""A timer that ends a rounding error early must not spin."""


@dataclass(frozen=True)
class Lease:
    """The last report of a process, and until when it counts."""

    report: ProcessReport
    until: float


class Registry(RegistryLike):
    """See the module, and `RegistryLike` for the methods.

    Args:
        store: where what is wanted outlives a restart.
        initial: what the command line gives. It is added to the state; where it names a knowledge base of the state
            the pin stays if the URI is the same, else both are replaced. What was given alike at the last start has
            been heeded then, and changes made since count.
        lease_s: a process that has not reported for so long does not count any more.
        clock: in seconds.

    Raises:
        InputError: a name or URI of `initial` that is none.
    """

    def __init__(
        self,
        store: StateStore,
        initial: Mapping[str, KbSpec],
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._lease_s, self._clock = store, lease_s, clock
        self._given = {name: checked_spec(name, spec.uri, spec.version) for name, spec in initial.items()}
        self._revisions = Revisions()
        self._specs: dict[str, KbSpec] = {}  # without at_least, which is not kept
        self._at_least: dict[str, int] = {}
        self._since: dict[str, int] = {}  # the revision from which on a knowledge base is wanted as it is
        self._wanted = Wanted()
        self._leases: dict[str, Lease] = {}
        self._writing = asyncio.Lock()
        self._is_unsure = False  # whether the state object may hold what a failed write put there
        self._changes: dict[str, KbSpec | None] = {}  # made since the start, where there is no state object
        self._learned = 0  # the revision of a predecessor that was taken over
        self._settled_at = math.inf
        self._event = asyncio.Event()

    async def start(self) -> None:
        """Read the state; to be called once, first.

        Raises:
            StorageError: the state cannot be read, or `initial` not be added to it.
        """
        state = await asyncio.to_thread(self._store.read) if self._store.is_durable else None
        merged = _merged(state or State(), self._given)
        if state is None or state != merged:
            await self._write(merged)
        self._specs = dict(merged.knowledge_bases)
        self._settled_at = self._clock() + self._lease_s
        self._publish(self._specs)

    async def report(self, report: ProcessReport) -> None:
        """See `RegistryLike`."""
        self._require_started()
        self._expire()
        self._learn(report.wanted)
        before = self._leases.get(report.process_id)
        # The caller may go on changing its mapping.
        report = replace(report, knowledge_bases=dict(report.knowledge_bases))
        self._leases[report.process_id] = Lease(report, self._clock() + self._lease_s)
        if before is None or replace(before.report, metrics=report.metrics) != report:
            self._notify()

    async def leave(self, process_id: str) -> None:
        """See `RegistryLike`."""
        self._require_started()
        if self._leases.pop(process_id, None) is not None:
            self._notify()

    async def wanted(self, known: int | None = None, timeout_s: float = 0.0) -> Wanted:
        """See `RegistryLike`.

        Raises:
            UnavailableError: `known` was said by a registry before this one, there is no state object, and no process
                has reported what was wanted: an answer could take knowledge bases from a replica that serves them.
        """
        self._require_started()
        deadline = self._clock() + timeout_s
        while not self._has_news(known):
            if self._clock() >= deadline:
                if known == self._wanted.revision:
                    break
                raise UnavailableError(
                    "the registry was restarted and is being told what was wanted",
                    where="server",
                    help="ask again in a moment",
                )
            await self._wait(deadline)
        return self._wanted

    async def put(self, name: str, uri: str, version: int | None) -> Wanted:
        """See `RegistryLike`. InputError for a name, URI or version that is none."""
        self._require_started()
        return await self._change(name, checked_spec(name, uri, version))

    async def remove(self, name: str) -> Wanted:
        """See `RegistryLike`."""
        self._require_started()
        while name not in self._specs and self._is_learning():
            await self._wait(self._settled_at)
        return await self._change(name, None)

    async def committed(self, name: str, version: int) -> None:
        """See `RegistryLike`. Nothing happens where the name is not wanted or pinned."""
        self._require_started()
        self._raise_at_least(name, version)

    async def wait_served(self, name: str, version: int, timeout_s: float) -> bool:
        """See `RegistryLike`. False at once where it cannot become true: removed, or pinned at another version.

        Whoever asks knows that `version` is committed: replicas that follow fetch it now, as after `committed`.
        """
        self._require_started()
        deadline = self._clock() + timeout_s
        while (verdict := self._verdict(name, version)) is None:
            if self._clock() >= deadline:
                return False
            await self._wait(deadline)
        return verdict

    async def describe(self) -> Overview:
        """See `RegistryLike`."""
        self._require_started()
        self._expire()
        answerers = self._answerers()
        return Overview(
            wanted=self._wanted,
            knowledge_bases={
                name: describe(name, spec, answerers) for name, spec in self._wanted.knowledge_bases.items()
            },
            processes={process_id: lease.report.role for process_id, lease in self._leases.items()},
            metrics={process_id: lease.report.metrics for process_id, lease in self._leases.items()},
            is_settled=self._is_settled(),
        )

    def _verdict(self, name: str, version: int) -> bool | None:
        """Whether every answerer serves a version; None: not yet."""
        self._expire()
        spec = self._specs.get(name)
        if spec is None or spec.version not in (None, version):
            return None if self._is_learning() else False
        self._raise_at_least(name, version)
        answerers = self._answerers()
        if not self._is_settled() or not answerers:
            return None
        is_served = all(
            self._goes_by(report, name) and serves(report, name, spec, version) for report in answerers.values()
        )
        return True if is_served else None

    def _goes_by(self, report: ProcessReport, name: str) -> bool:
        """Whether a replica had been told of a knowledge base as it is wanted now when it reported.

        One that was pinned and set free again may have reported the newest version before it heard of the pin.
        """
        told = report.wanted
        return told is None or (self._revisions.is_own(told.revision) and told.revision >= self._since[name])

    def _answerers(self) -> dict[str, ProcessReport]:
        return {
            process_id: lease.report for process_id, lease in self._leases.items() if lease.report.role == "answerer"
        }

    async def _change(self, name: str, spec: KbSpec | None) -> Wanted:
        # What is written must be told, even if whoever asked for it has gone.
        return await asyncio.shield(asyncio.ensure_future(self._change_in_turn(name, spec)))

    async def _change_in_turn(self, name: str, spec: KbSpec | None) -> Wanted:
        async with self._writing:
            if spec is None and name not in self._specs:
                raise NotServedError(
                    f"there is no knowledge base {name!r}", where="name", help="GET /v1/knowledge_bases lists them"
                )
            specs = _overlaid(self._specs, {name: spec})
            if specs != self._specs or self._is_unsure:
                self._is_unsure = True
                await self._write(State(specs, self._given))
                self._is_unsure = False
            if not self._store.is_durable:
                self._changes[name] = spec
            is_changed = specs != self._specs
            self._specs = specs
            # A table that was made anew begins at version 0 again.
            if self._at_least.pop(name, None) is not None or is_changed:
                self._publish([name] if is_changed else [])
            return self._wanted

    async def _write(self, state: State) -> None:
        if self._store.is_durable:
            await asyncio.to_thread(self._store.write, state)

    def _learn(self, told: Wanted | None) -> None:
        """Take over what a predecessor wanted, if a process says so and no state object does."""
        if told is None or self._revisions.is_own(told.revision):
            return
        self._revisions.pass_by(told.revision)
        is_late = self._learned > 0 and self._is_settled()
        if self._store.is_durable or told.revision <= self._learned or is_late:
            return
        self._learned = told.revision
        before = self._specs
        base = {name: KbSpec(spec.uri, spec.version) for name, spec in told.knowledge_bases.items()}
        self._specs = _overlaid(base, self._changes)
        for name, spec in told.knowledge_bases.items():
            if spec.at_least is not None and self._specs.get(name) == base[name]:
                self._at_least[name] = max(spec.at_least, self._at_least.get(name, 0))
        logger.info("took over what was wanted before: %s", ", ".join(sorted(self._specs)) or "nothing")
        self._publish(name for name, spec in self._specs.items() if before.get(name) != spec)

    def _raise_at_least(self, name: str, version: int) -> None:
        spec = self._specs.get(name)
        known = self._at_least.get(name)
        is_pinned = spec is not None and spec.version is not None
        if is_pinned or (spec is None and not self._is_learning()) or (known is not None and known >= version):
            return
        self._at_least[name] = version
        if spec is not None:
            self._publish([])

    def _publish(self, changed: Iterable[str]) -> None:
        """Make a new revision of what is wanted; `changed` names what is wanted otherwise than before."""
        revision = self._revisions.next()
        self._since = {name: self._since.get(name, revision) for name in self._specs}
        self._since.update(dict.fromkeys(changed, revision))
        self._at_least = {
            name: version
            for name, version in self._at_least.items()
            if (name in self._specs and self._specs[name].version is None) or self._is_learning()
        }
        self._wanted = Wanted(
            revision,
            {
                name: replace(spec, at_least=self._at_least.get(name) if spec.version is None else None)
                for name, spec in sorted(self._specs.items())
            },
        )
        self._notify()

    def _has_news(self, known: int | None) -> bool:
        if known is None or self._revisions.is_own(known):
            return known != self._wanted.revision
        return not self._is_learning() or self._learned >= known

    def _is_settled(self) -> bool:
        """Whether every process that lives has reported."""
        return self._clock() >= self._settled_at

    def _is_learning(self) -> bool:
        """Whether a report may still say that something else is wanted."""
        return not self._store.is_durable and not self._is_settled()

    def _expire(self) -> None:
        now = self._clock()
        gone = [process_id for process_id, lease in self._leases.items() if now >= lease.until]
        for process_id in gone:
            role = self._leases.pop(process_id).report.role
            logger.warning(
                "%s %s has not reported for %g s and does not count any more", role, process_id, self._lease_s
            )
        if gone:
            self._notify()

    def _notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def _wait(self, deadline: float) -> None:
        """Until something changes, a lease ends, every process has reported, or the deadline."""
        now = self._clock()
        moments = [deadline, *(lease.until for lease in self._leases.values())]
        if not self._is_settled():
            moments.append(self._settled_at)
        try:
            async with asyncio.timeout(max(min(moments) - now, SHORTEST_WAIT_S)):
                await self._event.wait()
        except TimeoutError:
            self._expire()

    def _require_started(self) -> None:
        if math.isinf(self._settled_at):
            raise UnavailableError("the registry has not read its state yet", where="server", help="ask again later")


def _merged(state: State, given: Mapping[str, KbSpec]) -> State:
    """A state with what the command line gives."""
    specs = dict(state.knowledge_bases)
    for name, spec in given.items():
        if state.given.get(name) == spec:
            if name not in specs:
                logger.warning("%s was removed since it was given first; PUT it to serve it again", name)
            continue
        if name not in specs or specs[name].uri != spec.uri:
            specs[name] = spec
    return State(specs, dict(given))


def _overlaid(specs: Mapping[str, KbSpec], changes: Mapping[str, KbSpec | None]) -> dict[str, KbSpec]:
    """`specs` with changes; None removes."""
    both = {**specs, **changes}
    return {name: spec for name, spec in both.items() if spec is not None}
