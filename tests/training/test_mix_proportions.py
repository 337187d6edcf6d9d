"""Stated shares of each kind, exact in every step and even over workers, whatever their number."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.errors import InputError
from kblam_ray.facts.questions import DEFAULT_MIX
from kblam_ray.training.mix.proportions import Share, counts, kinds

SHARES = {**{kind: share * 0.9 for kind, share in DEFAULT_MIX.items()}, "text": 0.1}


@given(
    shares=st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda shares: sum(shares) > 0.1),
    batch_size=st.integers(1, 200),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 99),
)
def test_each_step_has_each_share_rounded_up_or_down(shares, batch_size, step, seed):
    named = {str(place): share for place, share in enumerate(shares)}
    found = counts(named, batch_size, step, seed)
    assert sum(found.values()) == batch_size
    for kind, share in named.items():
        assert abs(found[kind] - share * batch_size / sum(shares)) < 1 + 1e-6
        assert share or not found[kind]


@pytest.mark.parametrize("batch_size", [7, 20, 32])
def test_over_many_steps_the_shares_are_met(batch_size):
    steps = 1_000
    total = Counter()
    for step in range(steps):
        total.update(counts(SHARES, batch_size, step, seed=3))
    for kind, share in SHARES.items():
        assert total[kind] / (steps * batch_size) == pytest.approx(share, abs=0.003)


@given(
    world=st.sampled_from([1, 2, 3, 4, 8]),
    accumulation=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 6),
    step=st.integers(0, 1_000),
)
def test_every_worker_has_its_part_of_every_kind(world, accumulation, rows, step):
    batch_size = world * accumulation * rows
    of_step = kinds(SHARES, batch_size, step, seed=0)
    whole = Counter(of_step)
    assert whole == Counter(counts(SHARES, batch_size, step, seed=0))
    seen = []
    for rank in range(world):
        numbers = Share(rank, world, accumulation).numbers(step, batch_size)
        assert len(numbers) == accumulation * rows
        mine = Counter(of_step[number - step * batch_size] for number in numbers)
        assert all(abs(mine[kind] - count / world) < 1 for kind, count in whole.items())
        seen += numbers
    assert sorted(seen) == list(range(step * batch_size, (step + 1) * batch_size))


def test_no_worker_keeps_the_same_kinds():
    """With fewer examples of a kind than workers, each gets its turn."""
    had = {rank: Counter() for rank in range(4)}
    for step in range(400):
        of_step = kinds(SHARES, 8, step, seed=0)
        for rank, kinds_had in had.items():
            kinds_had.update(of_step[number % 8] for number in Share(rank, 4).numbers(step, 8))
    for kind, share in SHARES.items():
        assert all(kinds_had[kind] == pytest.approx(800 * share, rel=0.5) for kinds_had in had.values())


def test_a_batch_that_cannot_be_dealt_out_evenly_is_refused():
    with pytest.raises(InputError, match="multiple of workers"):
        Share(0, 3, 1).numbers(0, 16)
    with pytest.raises(InputError, match="multiple of workers"):
        Share(0, 2, 3).numbers(0, 16)
    with pytest.raises(InputError, match="ranks from 0"):
        Share(2, 2, 1).numbers(0, 16)
