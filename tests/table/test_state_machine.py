"""Any sequence of changes, compactions, vacuums and reopenings equals a plain dictionary, at every version."""

from __future__ import annotations

import shutil
import tempfile

from fake_encoder import FakeEncoder
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from rows import applied, contents

from kblam_ray import KnowledgeBase
from kblam_ray.errors import StorageError
from kblam_ray.table.log import TableLog

entities = st.sampled_from(["a", "b", "日本", "e f"])
properties = st.sampled_from(["p", "q"])
names = st.tuples(entities, properties)


class TableMachine(RuleBasedStateMachine):
    """`states` maps each version to what it must hold, as a dictionary would after the same changes."""

    @initialize()
    def create(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.encoder = FakeEncoder()
        self.kb = KnowledgeBase.create(f"{self.folder}/kb", self.encoder)
        self.now = {("first", "p"): "1"}
        self.kb.upsert([("first", "p", "1")])
        self.states = {0: dict(self.now)}
        self.vacuumed_before = 0

    def _reached(self, version: int, changed: bool) -> None:
        newest = max(self.states)
        assert version == newest + changed
        self.states[version] = dict(self.now)

    @rule(facts=st.lists(st.tuples(entities, properties, st.sampled_from(["1", "2", "x y"])), max_size=4))
    def upsert(self, facts: list[tuple[str, str, str]]) -> None:
        after = {**self.now, **{(entity, name): value for entity, name, value in facts}}
        changed, self.now = after != self.now, after
        self._reached(self.kb.upsert(facts), changed)

    @rule(gone=st.lists(names, max_size=3))
    def delete(self, gone: list[tuple[str, str]]) -> None:
        after = {name: value for name, value in self.now.items() if name not in gone}
        changed, self.now = after != self.now, after
        self._reached(self.kb.delete(gone), changed)

    @rule(target_file_bytes=st.sampled_from([1, 2**27]))
    def compact(self, target_file_bytes: int) -> None:
        newest = max(self.states)
        version = self.kb.compact(target_file_bytes=target_file_bytes)
        assert newest <= version <= newest + 1
        self.states[version] = dict(self.now)

    @rule(retention_h=st.sampled_from([0, 1, 168]))
    def vacuum(self, retention_h: int) -> None:
        removed = self.kb.vacuum(retention_h, allow_short=True)
        newest = TableLog.open(self.kb.uri).version
        assert newest - max(self.states) == (2 if removed else 0)
        for version in range(max(self.states), newest + 1):
            self.states[version] = dict(self.now)
        if removed:
            assert retention_h == 0
            self.vacuumed_before = newest

    @rule()
    def reopen(self) -> None:
        self.kb = KnowledgeBase.open(self.kb.uri, encoder=self.encoder)
        assert self.kb.version == max(self.states)

    @rule(data=st.data())
    def compare_two_versions(self, data: st.DataObject) -> None:
        a, b = (data.draw(st.integers(self.vacuumed_before, max(self.states))) for _ in range(2))
        assert applied(self.states[a], self.kb.changes(a, b)) == self.states[b]

    @rule(data=st.data())
    def travel_back(self, data: st.DataObject) -> None:
        version = data.draw(st.integers(0, max(self.states)))
        pinned = KnowledgeBase.open(self.kb.uri, version)
        try:
            assert contents(pinned.snapshot()) == self.states[version]
        except StorageError:
            assert version < self.vacuumed_before

    @invariant()
    def the_newest_is_exact(self) -> None:
        assert contents(self.kb.snapshot()) == self.now
        assert self.kb.num_facts == len(self.now)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
