"""Merging keeps the number of chunks logarithmic, copies each fact a few times, and leaves a load alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_cases import changes, expected, load, seen, tiny_adapter

from kblam_ray.attention.memory import tiers
from kblam_ray.attention.memory.tiers import CHUNKS_PER_TIER, SMALLEST, merge_groups
from kblam_ray.attention.projections import fact_scale, materialize


@given(st.lists(st.integers(1, 300_000), max_size=40))
def test_groups_hold_every_chunk_once_and_leave_few_of_a_size(sizes):
    groups = merge_groups(sizes)
    assert sorted(at for group in groups for at in group) == list(range(len(sizes)))
    assert groups == sorted(sorted(group) for group in groups)
    totals = [sum(sizes[at] for at in group) for group in groups]
    assert sum(total < SMALLEST for total in totals) <= 1
    for tier in range(12):
        least = SMALLEST * CHUNKS_PER_TIER**tier
        assert sum(least <= total < least * CHUNKS_PER_TIER for total in totals) < CHUNKS_PER_TIER


def test_what_need_not_change_does_not():
    assert merge_groups([]) == []
    assert merge_groups([5]) == [[0]]
    assert merge_groups([100_000, 5_000, 1_024, 1_023]) == [[0], [1], [2], [3]]
    assert merge_groups([5, 7_000, 6]) == [[0, 2], [1]]
    assert merge_groups([1_024, 1_024, 2_000, 4_095]) == [[0, 1, 2, 3]]
    assert merge_groups([4_096] * 3 + [1_024] * 4) == [[0, 1, 2, 3, 4, 5, 6]]


def test_one_by_one_each_fact_is_copied_few_times():
    sizes, copied, num_facts = [], 0, 300_000
    batch = 300
    for _ in range(num_facts // batch):
        sizes.append(batch)
        groups = merge_groups(sizes)
        copied += sum(sizes[at] for group in groups if len(group) > 1 for at in group)
        sizes = [sum(sizes[at] for at in group) for group in groups]
    depth = math.log(num_facts / SMALLEST, CHUNKS_PER_TIER)
    assert len(sizes) <= 1 + (CHUNKS_PER_TIER - 1) * math.ceil(depth)
    assert copied <= num_facts * (depth + SMALLEST / batch)


@pytest.fixture
def small_tiers(monkeypatch):
    monkeypatch.setattr(tiers, "SMALLEST", 4)


@pytest.mark.usefixtures("small_tiers")
def test_chunks_of_a_load_are_never_merged_only_rewritten_when_half_dead():
    memory = load(tiny_adapter(), range(12), chunk_rows=3, version=0)
    after = memory.apply(changes([100], [0, 3, 4], versions=(0, 1)))
    assert after.views[1:3] == memory.views[2:]
    assert after.views[0].chunk is memory.views[0].chunk
    assert after.views[0].hidden.tolist() == [0]
    # The second had one of three left; it went together with the new fact.
    assert after.views[3].fact_ids.tolist() == [5, 100]
    assert after.views[3].chunk.num_rows == 2
    assert len(after.views) == 4
    assert seen(after) == expected({**dict.fromkeys([1, 2, 5, 6, 7, 8, 9, 10, 11], 0), 100: 1})


def test_half_dead_alone_is_rewritten_and_exactly_half_is_not():
    memory = load(tiny_adapter(), range(8), version=0)
    half = memory.apply(changes([], range(4), versions=(0, 1)))
    assert half.views[0].chunk is memory.views[0].chunk
    less = half.apply(changes([], [4], versions=(1, 2)))
    assert less.views[0].chunk.fact_ids.tolist() == [5, 6, 7]
    assert less.views[0].hidden is None
    assert less.lookup([6])[0]["entity"] == "e6"
    assert less.views[0].chunk.facts.num_rows == 3


@pytest.mark.parametrize("kind", ["paper", "shared"])
def test_merged_chunks_take_over_what_was_derived(kind, monkeypatch):
    adapter = tiny_adapter(kind)
    layer = adapter.config.layers[1]
    memory = load(adapter, [], version=0).apply(changes(range(5), versions=(0, 1)))
    memory.views[0].chunk.fact_scale_M(adapter)
    memory.views[0].chunk.materialized(adapter, layer, torch.float32)
    memory = memory.apply(changes([3, 9], [1], versions=(1, 2)))
    (view,) = memory.views
    chunk = view.chunk
    right_scale_M = fact_scale(adapter, chunk.keys_MP) if kind == "paper" else None
    right = materialize(adapter, layer, chunk.keys_MP, chunk.values_MP, torch.float32)

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr("kblam_ray.attention.projections.fact_scale", refuse)
    monkeypatch.setattr("kblam_ray.attention.projections.materialize", refuse)
    found = chunk.materialized(adapter, layer, torch.float32)
    assert (found[0] is None) == (kind == "shared")
    for one, other in zip(found, right, strict=True):
        assert one is other or torch.allclose(one, other, atol=1e-6)
    if kind == "paper":
        assert torch.allclose(chunk.fact_scale_M(adapter), right_scale_M, atol=1e-6)
