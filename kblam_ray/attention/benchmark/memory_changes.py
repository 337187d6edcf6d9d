"""What a change of a knowledge memory costs, against loading all of it again.

The embeddings are random, and ready in memory: reading them from a table, which a load needs for all facts and a change
only for those that changed, is not part of what is measured. Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.memory.held_bytes import HeldBytes

_DISTINCT_ROWS = 65_536


@dataclass(frozen=True)
class RandomUpserts:
    """Facts with random embeddings, in the form of a table's snapshot."""

    facts: pa.Table
    key_embeddings_MP: np.ndarray
    value_embeddings_MP: np.ndarray


@dataclass(frozen=True)
class RandomChanges:
    """Changes in the form that `KnowledgeBase.changes` gives."""

    from_version: int
    to_version: int
    upserts: RandomUpserts
    deleted_ids: np.ndarray


def random_embeddings(num_facts: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values, float16 [M, P] of norm near 1; they repeat after 65,536 facts, which costs no less to use."""
    rows = min(num_facts, _DISTINCT_ROWS)
    both_2MP = np.random.default_rng(seed).standard_normal((2, rows, dim), np.float32) / np.sqrt(np.float32(dim))
    return tuple(np.resize(half_MP.astype(np.float16), (num_facts, dim)) for half_MP in both_2MP)  # type: ignore[return-value]


def random_changes(memory: KnowledgeMemory, num_changes: int, seed: int = 0) -> RandomChanges:
    """Changes of a memory with ids 0 to M-1: half are new values of facts, a quarter new facts, the rest deletions."""
    random = np.random.default_rng(seed)
    num_new = num_changes // 4
    touched = random.choice(memory.num_facts, num_changes - num_new, replace=False)
    changed_ids, deleted_ids = np.split(touched, [num_changes // 2])
    version = memory.version or 0
    ids = np.sort(np.concatenate([changed_ids, memory.num_facts + np.arange(num_new)]))
    return RandomChanges(version, version + 1, _upserts(ids, memory.adapter.config.dim, seed), np.sort(deleted_ids))


def apply_one_by_one(memory: KnowledgeMemory, num_applies: int, seed: int = 0) -> KnowledgeMemory:
    """The memory after that many changes of one fact each: new values for facts with ids 0 to M-1, taken at random."""
    ids = np.random.default_rng(seed).integers(0, memory.num_facts, num_applies)
    for number, fact_id in enumerate(ids):
        upserts = _upserts(np.array([fact_id]), memory.adapter.config.dim, number)
        version = memory.version or 0
        memory = memory.apply(RandomChanges(version, version + 1, upserts, np.empty(0, np.int64)))
    return memory


def measure_apply(num_facts: int, num_changes: int, dim: int, *, rounds: int = 5) -> dict[str, Any]:
    """Applying changes against a full load, for kind "paper" in the latent form; every time is the median of `rounds`.

    Returns:
        `seconds`: of `load` and `apply`, and of `load_ready` and `apply_ready`, which include each fact's scale, after
        which a prompt can attend. `bytes`: `load`, what the memory holds once ready, and `apply`, what the next
        version holds that the one before does not. `ratio`: load over apply, of each.
    """
    adapter = _adapter(dim)
    keys_MP, values_MP = random_embeddings(num_facts, dim)
    with torch.inference_mode():
        # The projections are derived once per adapter, whatever is loaded.
        _get_ready(KnowledgeMemory.from_embeddings(adapter, keys_MP[:1], values_MP[:1]))

        def load() -> KnowledgeMemory:
            return KnowledgeMemory.from_embeddings(adapter, keys_MP, values_MP, version=0)

        load_s, load_ready_s, memory = _measure(load, rounds)
        changes = random_changes(memory, num_changes)
        apply_s, apply_ready_s, after = _measure(lambda: memory.apply(changes), rounds)
    held = HeldBytes()
    memory.add_to(held)
    size_bytes = {"load": held.total()}
    after.add_to(held)
    size_bytes["apply"] = held.total() - size_bytes["load"]
    seconds = {"load": load_s, "load_ready": load_ready_s, "apply": apply_s, "apply_ready": apply_ready_s}
    return {
        "num_facts": num_facts,
        "num_changes": num_changes,
        "dim": dim,
        "seconds": seconds,
        "bytes": size_bytes,
        "ratio": {
            "seconds": load_s / apply_s,
            "seconds_ready": load_ready_s / apply_ready_s,
            "bytes": size_bytes["load"] / size_bytes["apply"],
        },
        "num_chunks": len(after.views),
    }


def _measure(make: Callable[[], KnowledgeMemory], rounds: int) -> tuple[float, float, KnowledgeMemory]:
    made_s, ready_s = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        memory = make()
        made_s.append(time.perf_counter() - started)
        _get_ready(memory)
        ready_s.append(time.perf_counter() - started)
    return statistics.median(made_s), statistics.median(ready_s), memory


def _get_ready(memory: KnowledgeMemory) -> None:
    for view in memory.views:
        view.chunk.fact_scale_M(memory.adapter)


def _upserts(ids: np.ndarray, dim: int, seed: int) -> RandomUpserts:
    names = [f"entity {id_}" for id_ in ids]
    facts = pa.table({"fact_id": ids, "entity": names, "property": ["property"] * len(ids), "value": names})
    return RandomUpserts(facts, *random_embeddings(len(ids), dim, seed))


def _adapter(dim: int) -> KnowledgeAdapter:
    shape = BaseShape(model_type="llama", hidden_size=2048, num_layers=16, num_heads=32, head_dim=64)
    config = AdapterConfig(kind="paper", base_shape=shape, dim=dim, kb_layer_frequency=3, slots=6)
    torch.manual_seed(0)
    return KnowledgeAdapter(config).eval()
