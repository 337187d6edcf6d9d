"""Whatever happens in whatever order: that every replica serves a version is not said while a live one serves an older.

A model of a server: tables that grow, a registry that is killed and made anew, replicas that learn what is wanted,
fetch, unload, load, report late, join, leave and die. What they truly serve is compared with what the registry says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from registry_samples import LEASE_S, ClockLoop

from kblam_ray.errors import NotServedError, UnavailableError
from kblam_ray.serving.registry import Registry, StateStore
from kblam_ray.serving.wanted import KbReport, KbSpec, ProcessReport, Wanted

NAMES = ("a", "b")
URIS = ("/t/1", "/t/2")
EVERY_S = LEASE_S / 3

names = st.sampled_from(NAMES)
uris = st.sampled_from(URIS)
picks = st.integers(0, 99)


@dataclass
class Held:
    """A knowledge base as a replica has it: `version` is what it answers from, None while it has none.

    Attributes:
        loading: the version that a load that has begun will end with.
    """

    spec: KbSpec
    version: int | None = None
    loading: int | None = None
    is_unloaded: bool = False

    def report(self) -> KbReport:
        is_loading = self.version is None and not self.is_unloaded
        return KbReport(
            uri=self.spec.uri,
            pinned=self.spec.version,
            version=self.version,
            latest_version=self.version,
            num_facts=None,
            encoder=None,
            status="loading" if is_loading else "unloaded" if self.is_unloaded else "ready",
        )


@dataclass
class Replica:
    process_id: str
    next_report: float
    wanted: Wanted = field(default_factory=Wanted)
    held: dict[str, Held] = field(default_factory=dict)

    def follow(self, wanted: Wanted) -> None:
        self.wanted = wanted
        for name in self.held.keys() - wanted.knowledge_bases.keys():
            del self.held[name]
        for name, spec in wanted.knowledge_bases.items():
            held = self.held.get(name)
            if held is None or held.spec.uri != spec.uri:
                self.held[name] = Held(spec)
            else:
                held.spec = spec

    def report(self) -> ProcessReport:
        reports = {name: held.report() for name, held in self.held.items()}
        return ProcessReport(self.process_id, "answerer", reports, self.wanted)


class Server(RuleBasedStateMachine):
    is_durable = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.loop = ClockLoop()
        self.replicas: list[Replica] = []
        self.num_joined = 0
        self.newest = dict.fromkeys(URIS, 3)
        self.specs: dict[str, KbSpec] = {}

    def teardown(self) -> None:
        self.loop.close()
        self.folder.cleanup()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize(num=st.integers(1, 3))
    def begin(self, num: int) -> None:
        self.specs = {"a": KbSpec("/t/1")}
        self.start_registry()
        for _ in range(num):
            self.join()

    def start_registry(self) -> None:
        uri = str(Path(self.folder.name) / "state.json") if self.is_durable else None
        given = {"a": KbSpec("/t/1")}
        self.registry = Registry(StateStore(uri), given, LEASE_S, clock=self.loop.time)
        self.run(self.registry.start())

    # What administrators and writers do

    @rule(name=names, uri=uris, pin=st.none() | picks)
    def put(self, name: str, uri: str, pin: int | None) -> None:
        spec = KbSpec(uri, None if pin is None else pin % (self.newest[uri] + 1))
        self.run(self.registry.put(name, spec.uri, spec.version))
        self.specs[name] = spec

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name in self.specs and name in self.run(self.registry.wanted()).knowledge_bases:
            self.run(self.registry.remove(name))
            del self.specs[name]

    @rule(uri=uris, tells=st.booleans())
    def commit(self, uri: str, tells: bool) -> None:
        self.newest[uri] += 1
        for name, spec in self.specs.items():
            if tells and spec.uri == uri and spec.version is None:
                self.run(self.registry.committed(name, self.newest[uri]))

    # What replicas do

    @precondition(lambda self: len(self.replicas) < 4)
    @rule()
    def join(self) -> None:
        self.num_joined += 1
        replica = Replica(f"r{self.num_joined}", self.loop.time() + EVERY_S)
        self.run(self.registry.report(replica.report()))  # the lease comes before any version is read
        self.replicas.append(replica)

    @precondition(lambda self: self.replicas)
    @rule(pick=picks)
    def follow(self, pick: int) -> None:
        replica = self.replicas[pick % len(self.replicas)]
        try:
            replica.follow(self.run(self.registry.wanted(replica.wanted.revision)))
        except UnavailableError:
            assert not self.is_durable

    @precondition(lambda self: self.replicas)
    @rule(pick=picks, name=names)
    def begin_load(self, pick: int, name: str) -> None:
        """Look at the table; the version that is found is served by `end_load`, perhaps much later."""
        held = self.replicas[pick % len(self.replicas)].held.get(name)
        if held is not None:
            held.loading = self.newest[held.spec.uri] if held.spec.version is None else held.spec.version
            held.is_unloaded = False

    @precondition(lambda self: self.replicas)
    @rule(pick=picks, name=names)
    def end_load(self, pick: int, name: str) -> None:
        held = self.replicas[pick % len(self.replicas)].held.get(name)
        if held is not None and held.loading is not None:
            followed_meanwhile = held.spec.version is None and held.loading < (held.version or 0)
            if held.spec.version in (None, held.loading) and not followed_meanwhile:
                held.version = held.loading
            held.loading = None

    @precondition(lambda self: self.replicas)
    @rule(pick=picks, name=names)
    def unload(self, pick: int, name: str) -> None:
        held = self.replicas[pick % len(self.replicas)].held.get(name)
        if held is not None and held.loading is None:
            held.version, held.is_unloaded = None, True

    @precondition(lambda self: self.replicas)
    @rule(pick=picks)
    def report(self, pick: int) -> None:
        self.send(self.replicas[pick % len(self.replicas)])

    def send(self, replica: Replica) -> None:
        self.run(self.registry.report(replica.report()))
        replica.next_report = self.loop.time() + EVERY_S

    @precondition(lambda self: self.replicas)
    @rule(pick=picks, says_so=st.booleans())
    def go(self, pick: int, says_so: bool) -> None:
        replica = self.replicas.pop(pick % len(self.replicas))
        if says_so:
            self.run(self.registry.leave(replica.process_id))

    @rule(seconds=st.sampled_from([0.1, 0.9, 1.0, 2.5, 3.0, 7.0]))
    def pass_time(self, seconds: float) -> None:
        """Replicas report in time, whatever else they do or do not do."""
        end = self.loop.time() + seconds
        while due := [replica for replica in self.replicas if replica.next_report <= end]:
            replica = min(due, key=lambda replica: replica.next_report)
            self.run(asyncio.sleep(max(0.0, replica.next_report - self.loop.time())))
            self.send(replica)
        self.run(asyncio.sleep(max(0.0, end - self.loop.time())))

    @rule()
    def kill_registry(self) -> None:
        self.start_registry()
        for replica in self.replicas:  # their calls are made again at once
            replica.next_report = min(replica.next_report, self.loop.time() + EVERY_S)

    @precondition(lambda self: self.replicas)
    @rule(name=names, uri=uris, pin=st.none() | picks)
    def put_and_hear(self, name: str, uri: str, pin: int | None) -> None:
        """Everybody knows of a change and says so, and nobody has acted on it yet."""
        self.catch_up()
        self.put(name, uri, pin)
        for pick, replica in enumerate(self.replicas):
            self.follow(pick)
            self.send(replica)

    @precondition(lambda self: self.replicas)
    @rule()
    def catch_up(self) -> None:
        """Everybody does all there is to do, so that there is something to say."""
        for _ in range(2):  # without a state object the registry must be told before it can tell
            for replica in self.replicas:
                self.send(replica)
            for pick, replica in enumerate(self.replicas):
                self.follow(pick)
                for name in list(replica.held):
                    self.begin_load(pick, name)
                    self.end_load(pick, name)
        self.pass_time(LEASE_S + 0.1)
        if self.is_durable:
            for name, spec in self.specs.items():
                version = self.newest[spec.uri] if spec.version is None else spec.version
                assert self.run(self.registry.wait_served(name, version, 0)), (name, spec)

    @invariant()
    def what_is_said_to_be_served_is(self) -> None:
        if not hasattr(self, "registry"):
            return
        wanted = self.run(self.registry.wanted()).knowledge_bases
        for name, spec in wanted.items():
            newest = self.newest[spec.uri] if spec.version is None else spec.version
            for version in {newest, max(newest - 1, 0)}:
                if self.run(self.registry.wait_served(name, version, 0)):
                    for replica in self.replicas:
                        self.require_served(replica, name, spec, version)

    def require_served(self, replica: Replica, name: str, spec: KbSpec, version: int) -> None:
        held = replica.held[name]
        assert held.spec.uri == spec.uri
        serves = held.loading if held.version is None else held.version
        if serves is None or (held.version is None and spec.version not in (None, serves)):
            return  # it answers from no version, nor will from the one being loaded, which is not the pin
        assert serves == version if spec.version is not None else serves >= version, (replica.process_id, name)

    @invariant()
    def what_is_wanted_is_what_was_put(self) -> None:
        if self.is_durable and hasattr(self, "registry"):
            wanted = self.run(self.registry.wanted()).knowledge_bases
            assert {name: KbSpec(spec.uri, spec.version) for name, spec in wanted.items()} == self.specs
            try:
                self.run(self.registry.remove("never there"))
            except NotServedError:
                return
            raise AssertionError("removed what was never there")


class ForgetfulServer(Server):
    """The same without a state object: killed, the registry learns from the replicas what was wanted."""

    is_durable = False

    @rule()
    def kill_registry(self) -> None:
        super().kill_registry()
        told = max((replica.wanted for replica in self.replicas), key=lambda told: told.revision, default=Wanted())
        for replica in self.replicas:
            self.send(replica)
        wanted = self.run(self.registry.wanted()).knowledge_bases
        known = told.knowledge_bases if told.revision else {"a": KbSpec("/t/1")}
        self.specs = {name: KbSpec(spec.uri, spec.version) for name, spec in known.items()}
        assert {name: KbSpec(spec.uri, spec.version) for name, spec in wanted.items()} == self.specs


LIMITS = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestServer = Server.TestCase
TestServer.settings = LIMITS
TestForgetfulServer = ForgetfulServer.TestCase
TestForgetfulServer.settings = LIMITS
