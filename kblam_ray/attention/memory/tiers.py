"""When chunks that changes left behind are merged or rewritten, so that their number and their dead rows stay bounded.

A log-structured merge: chunks belong to tiers by the number of their live facts, each tier four times as large as the
one below. A chunk too small for the lowest tier is merged into the next change's, and four chunks of one tier become
one. So M changed facts leave about 3 log4(M / 1,024) chunks, and each fact is copied as often, once the first 1,024
are together. What a load made is left as it is: it may have any number of chunks, and merging those would make a small
change cost a whole load. A chunk more than half of whose facts are dead is rewritten: the deletions have paid for that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.memory import fact_texts
from kblam_ray.attention.memory.chunk import Chunk, ChunkView

if TYPE_CHECKING:
    import pyarrow as pa

SMALLEST = 1_024
"""Facts of the smallest chunk that is left alone: below it, copying costs less than one more chunk to attend to."""

CHUNKS_PER_TIER = 4


def consolidate(views: Sequence[ChunkView], adapter: KnowledgeAdapter) -> tuple[ChunkView, ...]:
    """The same live facts in few chunks with few dead rows; views that need no change are the same objects."""
    kept: list[ChunkView] = []
    movable: list[ChunkView] = []
    for view in views:
        (kept if view.chunk.is_loaded and not _is_half_dead(view) else movable).append(view)
    for group in merge_groups([view.num_live for view in movable]):
        members = [movable[at] for at in group]
        as_it_is = len(members) == 1 and not _is_half_dead(members[0])
        kept.append(members[0] if as_it_is else ChunkView(merge(members, adapter)))
    return tuple(kept)


def merge_groups(sizes: Sequence[int]) -> list[list[int]]:
    """Which chunks become one, by their numbers of live facts: lists of indices, together all of them, ascending.

    Afterwards at most one group is smaller than SMALLEST, and fewer than CHUNKS_PER_TIER are of one tier.
    """
    groups = [[at] for at in range(len(sizes))]
    while True:
        tiers: dict[int, list[list[int]]] = defaultdict(list)
        for group in groups:
            tiers[_tier(sum(sizes[at] for at in group))].append(group)
        full = [tier for tier, members in tiers.items() if len(members) >= (2 if tier < 0 else CHUNKS_PER_TIER)]
        if not full:
            return sorted(groups)
        together = tiers[min(full)]
        groups = [group for group in groups if group not in together]
        groups.append(sorted(at for group in together for at in group))


def merge(views: Sequence[ChunkView], adapter: KnowledgeAdapter) -> Chunk:
    """One chunk with the live facts of some views, in their order, and what is derived from them for the adapter."""
    with torch.inference_mode(False):
        keys_MP = torch.cat([view.live_rows(view.chunk.keys_MP) for view in views])
        values_MP = torch.cat([view.live_rows(view.chunk.values_MP) for view in views])
    fact_ids = np.concatenate([view.fact_ids for view in views])
    chunk = Chunk(keys_MP, values_MP, fact_ids, _texts(views))
    chunk.inherit(views, adapter)
    return chunk


def _texts(views: Sequence[ChunkView]) -> pa.Table | None:
    parts = []
    for view in views:
        if view.chunk.facts is None:
            return None
        positions = view.live_positions()
        parts.append(view.chunk.facts if positions is None else fact_texts.take(view.chunk.facts, positions))
    return fact_texts.joined(parts)


def _is_half_dead(view: ChunkView) -> bool:
    return 2 * view.num_live < view.chunk.num_rows


def _tier(size: int) -> int:
    """-1 below SMALLEST; else the number of times that a chunk of SMALLEST facts was multiplied by CHUNKS_PER_TIER."""
    tier = -1
    while size >= SMALLEST:
        tier, size = tier + 1, size // CHUNKS_PER_TIER
    return tier
