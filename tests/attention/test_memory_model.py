"""Any sequence of changes, selections and priors, against a plain dictionary from fact id to revision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_cases import changes, expected, load, seen, text, tiny_adapter

from kblam_ray.attention.memory import tiers
from kblam_ray.attention.projections import fact_scale

ADAPTER = tiny_adapter()
ids = st.integers(0, 24)


class MemoryMachine(RuleBasedStateMachine):
    """Tiers are 2, 8, 32 facts large here, so that a few steps merge, rewrite and cascade."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(tiers, "SMALLEST", 2)
        self.kept: list[tuple[Any, dict[int, int]]] = []

    def teardown(self) -> None:
        for memory, revisions in self.kept:
            assert seen(memory) == expected(revisions)
            assert sorted(memory.fact_ids) == sorted(revisions)
        self.patch.undo()

    @initialize(given=st.lists(ids, unique=True), chunk_rows=st.sampled_from([None, 1, 3, 10]))
    def start(self, given, chunk_rows):
        self.memory = load(ADAPTER, given, version=0, chunk_rows=chunk_rows)
        self.num_loaded = len(self.memory.views)
        self.revisions = dict.fromkeys(given, 0)

    @rule(upserted=st.lists(ids, unique=True, max_size=8), deleted=st.lists(ids, max_size=8))
    def change(self, upserted, deleted):
        self.kept.append((self.memory, dict(self.revisions)))
        version = self.memory.version
        made = changes(upserted, deleted, revision=version + 1, versions=(version, version + 1))
        self.memory = self.memory.apply(made)
        for id_ in deleted:
            self.revisions.pop(id_, None)
        self.revisions |= dict.fromkeys(upserted, version + 1)
        assert self.memory.version == version + 1

    @rule(part=st.sets(ids), again=st.sets(ids))
    def select(self, part, again):
        first, second = part & self.revisions.keys(), part & again & self.revisions.keys()
        selected = self.memory.select(list(first))
        narrower = selected.select(sorted(second))
        for memory, members in ((selected, first), (narrower, second)):
            assert seen(memory) == expected({id_: self.revisions[id_] for id_ in members})
            assert memory.num_facts == len(members)
            assert memory.num_total == len(self.revisions)
        self.kept.append((narrower, {id_: self.revisions[id_] for id_ in second}))

    @rule()
    def use(self):
        for view in self.memory.views:
            scale_M = view.live_rows(view.chunk.fact_scale_M(ADAPTER))
            right_M = fact_scale(ADAPTER, view.live_rows(view.chunk.keys_MP))
            assert torch.allclose(scale_M, right_M, atol=1e-6)

    @rule()
    def prior(self):
        memory = self.memory.with_prior(self.memory.fact_ids.astype(np.float32))
        for view, prior_M in zip(memory.views, memory.priors, strict=True):
            ids_M = view.rows(torch.tensor(view.chunk.fact_ids)).float()
            weights_M = view.log_weights_M
            assert torch.equal(prior_M, ids_M if weights_M is None else ids_M + weights_M)

    @invariant()
    def holds_the_facts(self):
        assert seen(self.memory) == expected(self.revisions)
        assert self.memory.num_facts == self.memory.num_total == len(self.revisions)
        rows = self.memory.lookup(self.memory.fact_ids)
        assert rows == [{"fact_id": row["fact_id"], **text(row["fact_id"], self._revision(row))} for row in rows]
        assert [row["fact_id"] for row in rows] == self.memory.fact_ids.tolist()

    @invariant()
    def is_compact(self):
        assert all(0 < view.num_live <= view.num_rows <= 2 * view.num_live for view in self.memory.views)
        changed = [view for view in self.memory.views if not view.chunk.is_loaded]
        assert len(self.memory.views) - len(changed) <= self.num_loaded
        assert len(changed) <= 1 + 3 * 3

    def _revision(self, row: dict) -> int:
        return self.revisions[row["fact_id"]]


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
