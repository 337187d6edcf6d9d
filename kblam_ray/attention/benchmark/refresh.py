"""Decoding after many changes of one fact each, against the same facts loaded at once; what old versions keep.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.benchmark.machine import Machine
from kblam_ray.attention.benchmark.memory_changes import apply_one_by_one, random_embeddings
from kblam_ray.attention.benchmark.turns import Prompt
from kblam_ray.attention.benchmark.ways import Ours, derive
from kblam_ray.attention.memory import KnowledgeMemory

WATCHED_VERSIONS = 100


def measure_refresh(
    adapter: KnowledgeAdapter,
    prompt: Prompt,
    machine: Machine,
    dtype: torch.dtype,
    memory_dtype: torch.dtype,
    *,
    num_facts: int,
    num_applies: int,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Change one fact after another, then decode with the outcome and with a fresh load of its facts, in turns.

    Versions are watched on the way: as nobody uses them, they and the chunks that only they had must be gone without
    the help of the garbage collector.

    Returns:
        `decode_ratio` and `prefill_ratio`: after the changes over the fresh load, median of `rounds`; `bytes` of both
        and their ratio; `old_versions_alive` of `old_versions_watched`, and chunks likewise; seconds per change.
    """
    keys_MP, values_MP = random_embeddings(num_facts, adapter.config.dim, seed)
    memory = KnowledgeMemory.from_embeddings(adapter, keys_MP, values_MP, dtype=memory_dtype, version=0)
    derive(memory, dtype)
    steps = min(WATCHED_VERSIONS, num_applies)
    versions: list[weakref.ref] = []
    chunks: set[weakref.ref] = set()
    with _no_garbage_collection():
        started = time.perf_counter()
        for step in range(steps):
            versions.append(weakref.ref(memory))
            chunks |= {weakref.ref(view.chunk) for view in memory.views}
            number = num_applies * (step + 1) // steps - num_applies * step // steps
            memory = apply_one_by_one(memory, number, seed + step)
        apply_s = (time.perf_counter() - started) / num_applies
        old_chunks = chunks - {weakref.ref(view.chunk) for view in memory.views}
        versions_alive = sum(version() is not None for version in versions)
        chunks_alive = sum(chunk() is not None for chunk in old_chunks)
    derive(memory, dtype)
    fresh = _fresh(memory)
    derive(fresh, dtype)
    ways = {"after": Ours(memory), "fresh": Ours(fresh)}
    for way in ways.values():
        prompt.turn(way)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(prompt.turn(way))
    prefill_ratios, decode_ratios = (
        [after[part] / other[part] for after, other in zip(taken["after"], taken["fresh"], strict=True)]
        for part in range(2)
    )
    size_bytes = {name: way.nbytes for name, way in ways.items()}
    return {
        "kind": adapter.config.kind,
        "num_facts": memory.num_facts,
        "num_applies": num_applies,
        "apply_ms": round(1_000 * apply_s, 4),
        "num_chunks": len(memory.views),
        "prefill_ratio": round(statistics.median(prefill_ratios), 3),
        "decode_ratio": round(statistics.median(decode_ratios), 3),
        "decode_ratios": [round(ratio, 3) for ratio in decode_ratios],
        "bytes": {**size_bytes, "ratio": round(size_bytes["after"] / size_bytes["fresh"], 3)},
        "old_versions_watched": len(versions),
        "old_versions_alive": versions_alive,
        "old_chunks_watched": len(old_chunks),
        "old_chunks_alive": chunks_alive,
    }


def _fresh(memory: KnowledgeMemory) -> KnowledgeMemory:
    """The same facts, loaded at once."""
    keys_MP, values_MP = (
        torch.cat([view.live_rows(part(view.chunk)) for view in memory.views])
        for part in (lambda chunk: chunk.keys_MP, lambda chunk: chunk.values_MP)
    )
    return KnowledgeMemory.from_embeddings(
        memory.adapter, keys_MP, values_MP, fact_ids=memory.fact_ids, form=memory.form, version=memory.version
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
