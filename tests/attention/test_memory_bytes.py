"""`nbytes` is what a memory keeps alive: everything once, nothing left out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from memory_cases import DIM, changes, embeddings, load, texts, tiny_adapter

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.memory.held_bytes import HeldBytes

ADAPTER = tiny_adapter()
NUM = 100
EMBEDDINGS = 2 * NUM * DIM * 2
IDS = NUM * 8


def plain(**options) -> KnowledgeMemory:
    return KnowledgeMemory.from_embeddings(ADAPTER, *embeddings(range(NUM)), **options)


@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_embeddings_ids_and_one_float_per_fact(chunk_rows):
    memory = plain(chunk_rows=chunk_rows)
    assert memory.nbytes == EMBEDDINGS + IDS
    with torch.no_grad():
        for view in memory.views:
            view.chunk.fact_scale_M(ADAPTER)
            view.chunk.fact_scale_M(ADAPTER)
    assert memory.nbytes == EMBEDDINGS + IDS + NUM * 4
    assert plain(dtype=torch.float32).nbytes == 2 * EMBEDDINGS + IDS


def test_what_is_materialized():
    memory = plain(form="materialized")
    for layer in ADAPTER.config.layers:
        memory.views[0].chunk.materialized(ADAPTER, layer, torch.bfloat16)
    shape = ADAPTER.config.base_shape
    assert memory.nbytes == EMBEDDINGS + IDS + 2 * 2 * NUM * shape.num_heads * shape.head_dim * 2


def test_texts_positions_priors_and_the_order_of_ids():
    table = texts(range(NUM))
    kept = table.select(["entity", "property", "value", "metadata"])
    memory = load(ADAPTER, range(NUM))
    with_texts = KnowledgeMemory.from_embeddings(ADAPTER, *embeddings(range(NUM)), facts=table)
    assert with_texts.nbytes - EMBEDDINGS - IDS == kept.get_total_buffer_size()
    assert memory.with_prior(np.zeros(NUM)).nbytes == memory.nbytes + NUM * 4
    assert memory.select([1, 2, 3]).nbytes == memory.nbytes + 3 * 8
    unordered = plain(fact_ids=np.arange(NUM)[::-1].copy())
    assert unordered.nbytes == EMBEDDINGS + IDS
    unordered.select([3])
    assert unordered.nbytes == EMBEDDINGS + 2 * IDS


def test_memory_that_is_shared_counts_once_and_what_a_view_keeps_alive_counts_whole():
    keys_MP = torch.randn(NUM, DIM)
    assert KnowledgeMemory.from_embeddings(ADAPTER, keys_MP, keys_MP).nbytes == NUM * DIM * 4 + IDS
    part = KnowledgeMemory.from_embeddings(ADAPTER, keys_MP[:10], keys_MP[10:20])
    assert part.nbytes == NUM * DIM * 4 + 10 * 8


def test_deletions_cost_a_position_each_until_a_chunk_is_rewritten():
    memory = plain(version=1)
    after = memory.apply(changes([], range(10)))
    assert after.nbytes == memory.nbytes + 10 * 8
    assert after.views[0].log_weights_M.shape == (NUM,)
    assert after.nbytes == memory.nbytes + 10 * 8
    rewritten = after.apply(changes([], range(10, 60), versions=(2, 3)))
    assert rewritten.nbytes == memory.nbytes * 40 / 100


def test_spans_are_counted_once_however_they_overlap():
    array, held = np.zeros(100, np.uint8), HeldBytes()
    for part in (array[10:20], array, array[90:]):
        held.add_array(part)
    assert held.total() == 100
    tensor = torch.zeros(50, dtype=torch.uint8)
    for part in (tensor[:10], tensor.numpy()[40:], None):
        (held.add_tensor if isinstance(part, torch.Tensor) else held.add_array)(part)
    assert held.total() == 150
    words = pa.table({"word": ["a", None, "a"]})
    held.add_table(words)
    held.add_table(words.slice(1))
    assert held.total() >= 150 + words.get_total_buffer_size()
    before = held.total()
    held.add_table(words)
    assert held.total() == before
