"""The next version shares what did not change, the one before stays as it is, and what nobody uses is freed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_cases import DIM, changes, embeddings, expected, load, seen, text, tiny_adapter

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.attention.benchmark.memory_changes import apply_one_by_one, measure_apply, random_embeddings
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import EmbeddingError, InputError

ADAPTER = tiny_adapter()


def test_changed_new_and_deleted_facts():
    memory = load(ADAPTER, range(10), version=1)
    before = seen(memory)
    after = memory.apply(changes([2, 50], [4, 7]))
    left = dict.fromkeys([0, 1, 3, 5, 6, 8, 9], 0)
    assert seen(after) == expected({**left, 2: 1, 50: 1})
    assert after.fact_ids.tolist() == [0, 1, 3, 5, 6, 8, 9, 2, 50]
    assert (after.version, after.num_facts, after.num_total) == (2, 9, 9)
    assert after.log_num_facts == np.log(9)
    assert after.lookup([2, 3]) == [{"fact_id": 2, **text(2, 1)}, {"fact_id": 3, **text(3, 0)}]
    with pytest.raises(InputError, match="fact 4"):
        after.lookup([4])
    assert seen(memory) == before == expected(dict.fromkeys(range(10), 0))
    assert memory.lookup([2, 4])[0]["value"] == "v0"


def test_untouched_chunks_are_the_same_objects_and_touched_ones_only_hide():
    memory = load(ADAPTER, range(40), chunk_rows=10, version=1)
    after = memory.apply(changes([25], [31]))
    assert after.views[:2] == memory.views[:2]
    assert [view.chunk for view in after.views[:4]] == [view.chunk for view in memory.views]
    assert [None if view.hidden is None else view.hidden.tolist() for view in after.views] == [
        None,
        None,
        [5],
        [1],
        None,
    ]
    assert after.facts_key != memory.facts_key


def test_nothing_changed_but_the_version():
    memory = load(ADAPTER, range(5), version=1)
    after = memory.apply(changes(versions=(1, 4)))
    assert after.version == 4
    assert after.views == memory.views
    assert after.facts_key == memory.facts_key


def test_deleting_what_is_not_there_and_deleting_what_is_upserted():
    memory = load(ADAPTER, range(5), version=1)
    assert seen(memory.apply(changes([3, 8], [3, 8, 99]))) == expected({0: 0, 1: 0, 2: 0, 4: 0, 3: 1, 8: 1})


def test_everything_deleted_and_filled_again():
    memory = load(ADAPTER, range(5), version=1)
    empty = memory.apply(changes([], range(5)))
    assert (empty.views, empty.num_facts, empty.num_total, empty.nbytes) == ((), 0, 0, 0)
    assert seen(empty.apply(changes([3], versions=(2, 3)))) == expected({3: 1})


def test_changes_take_the_memorys_dtype():
    keys_MP, values_MP = embeddings(range(3))
    memory = KnowledgeMemory.from_embeddings(ADAPTER, keys_MP, values_MP, dtype=torch.float32, version=1)
    new = memory.apply(changes([9])).views[-1].chunk
    assert new.keys_MP.dtype == new.values_MP.dtype == torch.float32
    assert np.array_equal(new.keys_MP.numpy(), embeddings([9], 1)[0].astype(np.float32))


def test_a_memory_without_texts_takes_none():
    memory = KnowledgeMemory.from_embeddings(ADAPTER, *embeddings(range(3)), version=1)
    after = memory.apply(changes([9, 1])).apply(changes([8], versions=(2, 3)))
    assert all(view.chunk.facts is None for view in after.views)
    assert seen(after) == expected({0: 0, 2: 0, 9: 1, 1: 1, 8: 1})


def test_only_the_changes_from_its_own_version():
    memory = load(ADAPTER, range(3), version=5)
    with pytest.raises(InputError, match=r"holds version 5, the changes are those from version 4"):
        memory.apply(changes([1], versions=(4, 6)))
    assert load(ADAPTER, range(3)).apply(changes([1], versions=(4, 6))).version == 6


def test_a_selection_or_a_prior_is_refused():
    memory = load(ADAPTER, range(3), version=1)
    with pytest.raises(InputError, match="what select made"):
        memory.select([1]).apply(changes([1]))
    with pytest.raises(InputError, match="what with_prior made"):
        memory.with_prior(np.zeros(3)).apply(changes([1]))
    assert memory.with_prior(np.zeros(3)).without_prior().apply(changes([1])).version == 2


def test_bad_changes_are_refused_naming_the_fact():
    memory = load(ADAPTER, range(3), version=1)
    bad = changes([7, 8])
    bad.upserts.value_embeddings_MP[1, 0] = np.nan
    with pytest.raises(EmbeddingError, match=r"a value embedding .*row 1, fact 8: the p of e8"):
        memory.apply(bad)
    wide = changes([7])
    wide.upserts.key_embeddings_MP = np.zeros((1, DIM + 1), np.float16)
    with pytest.raises(EmbeddingError, match="the adapter reads 4"):
        memory.apply(wide)
    with pytest.raises(InputError, match=r"more than once .fact 7"):
        memory.apply(changes([7, 7]))
    nameless = changes([7])
    nameless.upserts.facts = nameless.upserts.facts.drop(["fact_id"])
    with pytest.raises(InputError, match="no fact_id"):
        memory.apply(nameless)


def test_what_no_version_uses_any_more_is_freed_at_once():
    memory = load(ADAPTER, range(8), version=1)
    with torch.no_grad():
        memory.views[0].chunk.fact_scale_M(ADAPTER)
    old = [weakref.ref(memory), weakref.ref(memory.views[0]), weakref.ref(memory.views[0].chunk.keys_MP)]
    gc.disable()  # reference counts alone must do it
    try:
        memory = memory.apply(changes([], range(5)))
        assert [ref() for ref in old] == [None, None, None]
        left_bytes = 3 * (4 * DIM + 8 + 4) + memory.views[0].chunk.facts.get_total_buffer_size()
        assert memory.nbytes == left_bytes
        tail = weakref.ref(memory.views[0].chunk)
        memory = memory.apply(changes([20], versions=(2, 3)))
        assert tail() is None
    finally:
        gc.enable()


def test_thousands_of_single_changes_leave_a_handful_of_chunks():
    memory = KnowledgeMemory.from_embeddings(ADAPTER, *random_embeddings(5_000, DIM), version=0)
    before = memory.nbytes
    after = apply_one_by_one(memory, 3_000)
    assert after.num_facts == 5_000
    assert after.version == 3_000
    assert sorted(after.fact_ids) == list(range(5_000))
    assert len(after.views) <= 1 + 1 + 2 * 3
    # Half of the chunks' rows may be dead, not more.
    assert sum(view.num_rows for view in after.views) <= 2 * after.num_facts
    assert after.nbytes <= 2.5 * before


def test_the_measurement_gives_times_and_bytes():
    found = measure_apply(20_000, 100, 8, rounds=1)
    assert found["num_chunks"] == 2
    assert found["bytes"]["load"] == 20_000 * (2 * 8 * 2 + 8 + 4)
    upserted, gone = 50 + 25, 75
    assert found["bytes"]["apply"] == upserted * (2 * 8 * 2 + 8 + 4) + gone * 8
    assert set(found["ratio"]) == {"seconds", "seconds_ready", "bytes"}


def test_real_tables_changes_equal_a_load_of_their_newest_version(tmp_path: Path):
    adapter = tiny_adapter()
    kb = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:4")
    first = kb.upsert([Fact(f"e{number}", "p", f"v{number}") for number in range(20)])
    snapshot = kb.snapshot()
    memory = KnowledgeMemory.from_embeddings(
        adapter, snapshot.key_embeddings_MP, snapshot.value_embeddings_MP, facts=snapshot.facts, version=first
    )
    kb.upsert([Fact("e3", "p", "new"), Fact("e99", "p", "more", '{"source": "s"}')])
    newest = kb.delete([("e5", "p"), ("e6", "p")])
    after = memory.apply(kb.changes(first, newest))
    snapshot = kb.snapshot()
    right = KnowledgeMemory.from_embeddings(
        adapter, snapshot.key_embeddings_MP, snapshot.value_embeddings_MP, facts=snapshot.facts, version=newest
    )
    assert after.version == newest
    assert seen(after) == seen(right)
    ids = right.fact_ids
    assert after.lookup(ids) == right.lookup(ids)
    assert seen(after.apply(kb.changes(newest, first))) == seen(memory)
