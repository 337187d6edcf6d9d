"""Selections and priors: parts of a memory without copies, and one number per fact in the facts' order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_cases import changes, expected, load, seen, tiny_adapter

from kblam_ray.errors import InputError

ADAPTER = tiny_adapter()


def priors_by_id(memory) -> dict[int, float]:
    """The prior of every row that has one, by fact id."""
    found = {}
    for view, prior_M in zip(memory.views, memory.priors, strict=True):
        assert prior_M.dtype == torch.float32
        assert prior_M.shape == (view.num_rows,)
        ids_M = view.rows(torch.tensor(view.chunk.fact_ids)).tolist()
        found |= {id_: value for id_, value in zip(ids_M, prior_M.tolist(), strict=True) if value != -math.inf}
    return found


def test_a_selection_shares_the_chunks():
    memory = load(ADAPTER, range(40), chunk_rows=20, version=3)
    selected = memory.select([1, 22, 23, 24, 25, 26, 1])
    assert [view.chunk for view in selected.views] == [view.chunk for view in memory.views]
    assert selected.views[0].positions.tolist() == [1]
    assert selected.views[1].hidden.tolist() == [0, 1, *range(7, 20)]
    assert selected.fact_ids.tolist() == [1, 22, 23, 24, 25, 26]
    assert (selected.num_facts, selected.num_total, selected.version) == (6, 40, 3)
    assert seen(selected) == expected(dict.fromkeys([1, 22, 23, 24, 25, 26], 0))
    # Nothing of the size of the facts is new.
    assert selected.nbytes - memory.nbytes == 8 * (1 + 15)


def test_the_m_of_the_shift_is_as_the_adapter_says():
    for setting, num_facts in (("whole", 10), ("selection", 3)):
        memory = load(tiny_adapter(selection_log_m=setting), range(10))
        assert memory.select([1, 2, 3]).log_num_facts == math.log(num_facts)
        assert memory.log_num_facts == math.log(10)


def test_selecting_nothing_everything_and_what_is_not_there():
    memory = load(ADAPTER, range(10), version=1)
    assert memory.select([]).views == ()
    assert memory.select([]).num_total == 10
    assert memory.select(range(10)).views == memory.views
    assert memory.select({3, 4}).fact_ids.tolist() == [3, 4]
    assert memory.select(torch.tensor([3, 4])).fact_ids.tolist() == [3, 4]
    with pytest.raises(InputError, match=r"7 facts: -3, 10, 11, 12, 13, \.\.\."):
        memory.select([1, 2, *range(10, 16), -3])
    with pytest.raises(InputError, match="fact 5"):
        memory.select([1, 2]).select([2, 5])
    with pytest.raises(InputError, match="fact 4"):
        memory.apply(changes([], [4])).select([4])
    with pytest.raises(InputError, match="whole numbers"):
        memory.select([0.5])


def test_lookup_in_a_selection_knows_its_facts_only():
    selected = load(ADAPTER, range(10)).select([2, 3])
    assert selected.lookup([3])[0]["entity"] == "e3"
    with pytest.raises(InputError, match="fact 4"):
        selected.lookup([4])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_prior_stands_in_the_order_of_the_ids(dtype):
    memory = load(ADAPTER, range(9, -1, -1), chunk_rows=4, version=1).apply(changes([3], [8, 0]))
    prior_M = memory.fact_ids.astype(dtype) / 4
    for given_M in (
        prior_M,
        torch.from_numpy(prior_M),
        prior_M[::-1][::-1],
        torch.from_numpy(prior_M).requires_grad_(),
    ):
        found = memory.with_prior(given_M)
        assert priors_by_id(found) == {int(id_): id_ / 4 for id_ in memory.fact_ids}
        assert found.facts_key == memory.facts_key
        assert found.num_facts == memory.num_facts
        assert found.without_prior().priors is None
    bfloat = memory.with_prior(torch.ones(8, dtype=torch.bfloat16))
    assert set(priors_by_id(bfloat).values()) == {1.0}
    assert set(priors_by_id(bfloat.with_prior(np.zeros(8))).values()) == {0.0}


def test_minus_infinity_hides_and_counts():
    memory = load(ADAPTER, range(3)).with_prior(np.array([0.0, -np.inf, 1.0]))
    assert priors_by_id(memory) == {0: 0.0, 2: 1.0}
    assert memory.num_facts == 3


def test_the_callers_vector_can_be_written_to_afterwards():
    for prior_M in (np.zeros(3, np.float32), torch.zeros(3)):
        memory = load(ADAPTER, range(3)).with_prior(prior_M)
        prior_M[0] = 5
        assert priors_by_id(memory)[0] == 0


@pytest.mark.parametrize(
    ("prior_M", "words"),
    [
        (np.zeros(4), "got float64 .4."),
        (np.zeros(2), "one float for each of the 3 facts"),
        (np.zeros((3, 1)), "one float for each"),
        (np.zeros(3, int), "got int64"),
        (torch.zeros(3, dtype=torch.int64), "got torch.int64"),
        ([0.0, 0.0, 0.0], "got list"),
        (1.0, "got float"),
        (np.float64(1.0), "one float for each"),
        (np.array([0, 1, np.nan]), r"prior of a fact is nan .position 2, fact 30"),
        (torch.tensor([0, math.inf, 0]), r"position 1, fact 20"),
        (np.array([0, 1e300, 0]), r"1e\+300 .position 1, fact 20"),
    ],
)
def test_bad_priors(prior_M, words):
    with pytest.raises(InputError, match=words):
        load(ADAPTER, [10, 20, 30]).with_prior(prior_M)


@given(
    num_facts=st.integers(1, 30),
    chunk_rows=st.integers(1, 30),
    deleted=st.sets(st.integers(0, 29)),
    selections=st.lists(st.sets(st.integers(0, 29)), max_size=3),
    prior_after=st.integers(0, 3),
)
def test_any_order_of_selections_and_a_prior(num_facts, chunk_rows, deleted, selections, prior_after):
    memory = load(ADAPTER, range(num_facts), chunk_rows=chunk_rows, version=1).apply(changes([], deleted))
    left = set(range(num_facts)) - deleted
    for number, selection in enumerate([*selections, None]):
        if number == min(prior_after, len(selections)):
            memory = memory.with_prior(memory.fact_ids + 0.5)
        if selection is not None:
            left &= selection
            memory = memory.select(sorted(left))
        assert seen(memory) == expected(dict.fromkeys(left, 0))
        assert sorted(memory.fact_ids) == sorted(left)
        if memory.priors is not None:
            assert priors_by_id(memory) == {id_: id_ + 0.5 for id_ in left}


def test_a_prior_follows_from_a_sparse_selection_into_a_sparser_one():
    memory = load(ADAPTER, range(100)).select([4, 50, 51, 60, 99]).with_prior(np.arange(5.0))
    assert priors_by_id(memory.select([51, 99])) == {51: 2.0, 99: 4.0}


def test_rows_ascend_whatever_the_order_of_ids():
    ids = np.random.default_rng(0).permutation(40)
    memory = load(ADAPTER, ids)
    for chosen in ([7, 3, 30], range(25)):
        selected = memory.select(chosen)
        assert selected.fact_ids.tolist() == [id_ for id_ in ids if id_ in chosen]
        assert seen(selected) == expected(dict.fromkeys(chosen, 0))
        again = selected.select(list(chosen)[:2])
        assert again.fact_ids.tolist() == [id_ for id_ in ids if id_ in list(chosen)[:2]]
