"""A chunk finds its facts and keeps what is derived for one state of the adapter; a view hides, gathers and counts."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_cases import DIM, embeddings, tiny_adapter

from kblam_ray.attention import projections
from kblam_ray.attention.memory.chunk import Chunk, ChunkView
from kblam_ray.attention.projections import fact_scale, materialize


def chunk_of(ids) -> Chunk:
    keys_MP, values_MP = (torch.from_numpy(half_MP) for half_MP in embeddings(ids))
    return Chunk(keys_MP, values_MP, np.array(ids, np.int64))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True), st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_find(ids, others):
    wanted = [*ids[::2], *others]
    positions = chunk_of(ids).find(np.array(wanted, np.int64))
    assert positions.tolist() == [ids.index(id_) if id_ in ids else -1 for id_ in wanted]


subsets = st.integers(1, 24).flatmap(lambda num: st.tuples(st.just(num), st.sets(st.integers(0, num - 1))))


@given(subsets, st.randoms(use_true_random=False))
def test_views_of_views_see_what_is_left(case, random):
    num_rows, chosen = case
    chunk = chunk_of(range(num_rows))
    view, left = ChunkView(chunk), set(range(num_rows))
    for step in range(3):
        asked = np.array(sorted(random.sample(sorted(left), random.randint(0, len(left)))) if step else sorted(chosen))
        view, left = view.only(asked), set(asked.tolist())
        if not left:
            assert view is None
            return
        assert view.find(np.arange(-1, num_rows + 1)).tolist() == [
            row if row in left else -1 for row in range(-1, num_rows + 1)
        ]
        assert view.fact_ids.tolist() == sorted(left)
        assert view.num_live == len(left)
        assert torch.equal(view.live_rows(chunk.keys_MP), chunk.keys_MP[sorted(left)])
        assert (view.positions is None) or (view.hidden is None)
        if view.hidden is not None:
            assert view.hidden.tolist() == sorted(set(range(num_rows)) - left)
            assert view.log_weights_M.isneginf().nonzero().flatten().tolist() == view.hidden.tolist()
        else:
            assert view.log_weights_M is None


def test_few_facts_are_gathered_and_many_scanned():
    view = ChunkView(chunk_of(range(8)))
    assert view.only(np.array([6])).positions.tolist() == [6]
    assert view.only(np.array([6])).num_rows == 1
    assert view.only(np.array([1, 6])).hidden.tolist() == [0, 2, 3, 4, 5, 7]
    assert view.only(np.array([1, 6])).num_rows == 8
    assert view.only(np.arange(8)) is view


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
@pytest.mark.parametrize("seen", [range(8), [6], [0, 1, 2, 6]])
def test_a_copied_view_sees_the_same_and_is_another(copied, seen):
    view = ChunkView(chunk_of(range(8))).only(np.array(seen))
    view.chunk.fact_scale_M(tiny_adapter())
    again = copied(view)
    # What is kept per view must not be found for one of another process that had the same serial there.
    assert again.serial not in (view.serial, ChunkView(view.chunk).serial)
    assert again.fact_ids.tolist() == list(seen)
    assert torch.equal(again.live_rows(again.chunk.keys_MP), view.live_rows(view.chunk.keys_MP))


def test_rows_in_blocks_and_along_any_dimension():
    chunk = chunk_of(range(9))
    whole, few = ChunkView(chunk), ChunkView(chunk, positions=np.array([2, 5, 7]))
    assert whole.rows(chunk.keys_MP) is chunk.keys_MP
    assert whole.rows(chunk.keys_MP, start=3, stop=5).data_ptr() == chunk.keys_MP[3].data_ptr()
    assert torch.equal(whole.rows(chunk.keys_MP, start=7, stop=100), chunk.keys_MP[7:])
    assert torch.equal(few.rows(chunk.keys_MP, start=1, stop=3), chunk.keys_MP[[5, 7]])
    assert torch.equal(few.rows(chunk.keys_MP.T, dim=1), chunk.keys_MP[[2, 5, 7]].T)


def test_hiding_more_and_more_until_nothing_is_left():
    view = ChunkView(chunk_of(range(6)))
    for hidden, rows in (([1, 4], [1, 4]), ([0, 1, 4, 5], [0, 5])):
        view = view.without(np.array(rows))
        assert view.hidden.tolist() == hidden
    assert view.fact_ids.tolist() == [2, 3]
    assert view.without(np.array([2, 3])) is None


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many facts each making of scales took."""
    sizes: list[int] = []

    def record(adapter, keys_MP):
        sizes.append(len(keys_MP))
        return fact_scale(adapter, keys_MP)

    monkeypatch.setattr(projections, "fact_scale", record)
    return sizes


def test_the_scale_is_made_once_per_state_of_the_weights(made):
    adapter, chunk = tiny_adapter(), chunk_of(range(5))
    first_M = chunk.fact_scale_M(adapter)
    assert first_M.dtype == torch.float32
    assert torch.equal(first_M, fact_scale(adapter, chunk.keys_MP))
    assert chunk.fact_scale_M(adapter) is first_M
    adapter.key_projection.weight.mul_(2)
    second_M = chunk.fact_scale_M(adapter)
    assert torch.equal(second_M, fact_scale(adapter, chunk.keys_MP))
    assert not torch.equal(first_M, second_M)
    assert made == [5, 5]
    assert tiny_adapter("shared").config.kind == "shared"
    assert chunk.fact_scale_M(tiny_adapter("shared")) is None


def test_while_autograd_records_the_scale_is_made_anew_and_not_kept(made):
    adapter, chunk = tiny_adapter().requires_grad_(True), chunk_of(range(5))
    for _ in range(2):
        chunk.fact_scale_M(adapter).sum().backward()
    assert adapter.key_projection.weight.grad.abs().sum() > 0
    assert made == [5, 5]
    with torch.no_grad():
        assert not chunk.fact_scale_M(adapter).requires_grad
    assert chunk.nbytes == 2 * 5 * DIM * 2 + 5 * 8 + 5 * 4


def test_a_scale_kept_in_inference_can_be_trained_with():
    adapter, chunk = tiny_adapter(), chunk_of(range(5))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scale_M = chunk.fact_scale_M(adapter)
    assert scale_M.dtype == torch.float32
    assert not scale_M.is_inference()
    weight_M = torch.ones(5, requires_grad=True)
    (chunk.fact_scale_M(adapter) * weight_M).sum().backward()
    assert torch.equal(weight_M.grad, scale_M)
    fresh_M = chunk_of(range(5)).fact_scale_M(adapter)
    assert torch.equal(fresh_M, scale_M)


@pytest.mark.parametrize("kind", ["paper", "shared"])
def test_keys_and_values_are_kept_per_layer_and_dtype(kind):
    adapter, chunk = tiny_adapter(kind), chunk_of(range(5))
    kept = {}
    for layer in adapter.config.layers:
        for dtype in (torch.float32, torch.bfloat16):
            keys, values = kept[layer, dtype] = chunk.materialized(adapter, layer, dtype)
            right_keys, right_values = materialize(adapter, layer, chunk.keys_MP, chunk.values_MP, dtype)
            assert torch.equal(values, right_values)
            assert keys is None if kind == "shared" else torch.equal(keys, right_keys)
    for (layer, dtype), pair in kept.items():
        assert all(one is other for one, other in zip(chunk.materialized(adapter, layer, dtype), pair, strict=True))


def test_threads_get_the_right_values():
    adapter, chunk = tiny_adapter(), chunk_of(range(300, 0, -1))
    right_M = fact_scale(adapter, chunk.keys_MP)
    start, wrong = threading.Barrier(8), []

    def use():
        start.wait()
        for _ in range(20):
            if not torch.equal(chunk.fact_scale_M(adapter), right_M) or chunk.find(np.array([7]))[0] != 293:
                wrong.append(1)
            _ = chunk.nbytes

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
