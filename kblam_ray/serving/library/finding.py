"""Look facts up in a memory: filtered pages by ascending fact id, scanned chunk by chunk, with no index.

A page begins after an id and not at a row, so facts that stay are found once each whatever changes between two pages.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.memory.chunk import Chunk, ChunkView
from kblam_ray.attention.memory.fact_texts import is_ascending
from kblam_ray.errors import InputError
from kblam_ray.serving.messages import FactFilter, FactsPage

MAX_LIMIT = 1_000
ROWS_PER_STEP = 16_384
"""Rows of a chunk looked at before the page may be full."""

_DECIMAL = re.compile(r"-?[0-9]{1,19}")
_IDS = np.iinfo(np.int64)

_ORDERS: weakref.WeakKeyDictionary[Chunk, np.ndarray | None] = weakref.WeakKeyDictionary()
"""Rows of a chunk by ascending id, None where they are already. Two threads may both make one: either is right."""


def find_facts(memory: KnowledgeMemory, which: FactFilter) -> FactsPage:
    """One page of the facts that a filter lets through.

    Args:
        memory: a whole memory of some version, with texts.

    Raises:
        InputError: a limit out of range, an `after` that is no fact id, a text that cannot be looked for.
    """
    assert memory.version is not None
    ids = _matching_ids(memory, which, _checked_limit(which.limit) + 1, _checked_after(which.after))
    page = ids[: which.limit]
    return FactsPage(
        data=tuple(_to_json(row) for row in memory.lookup(page)),
        next=str(page[-1]) if len(ids) > len(page) else None,
        kb_version=memory.version,
    )


def _matching_ids(memory: KnowledgeMemory, which: FactFilter, num_wanted: int, after: int | None) -> np.ndarray:
    """The smallest ids above `after` that match, ascending, at most `num_wanted`."""
    runs = [_Run(view) for view in memory.views]
    if after is not None:
        for run in runs:
            run.skip(after)
    found = np.empty(0, np.int64)
    while len(found) < num_wanted and any(run.is_left for run in runs):
        # Up to here every chunk has been looked at after this step, so what is found is in order with what follows.
        reached = min(run.reach() for run in runs if run.is_left)
        new = np.concatenate([run.take(reached, which) for run in runs])
        found = np.concatenate([found, np.sort(new)])
    return found[:num_wanted]


class _Run:
    """The facts that a view sees, by ascending id, from a place on."""

    def __init__(self, view: ChunkView) -> None:
        chunk = view.chunk
        if chunk not in _ORDERS:
            _ORDERS[chunk] = None if is_ascending(chunk.fact_ids) else np.argsort(chunk.fact_ids)
        self._view, self._order = view, _ORDERS[chunk]
        self._ids = chunk.fact_ids if self._order is None else chunk.fact_ids[self._order]
        self._at = 0

    @property
    def is_left(self) -> bool:
        return self._at < len(self._ids)

    def skip(self, after: int) -> None:
        self._at = int(np.searchsorted(self._ids, after, "right"))

    def reach(self) -> int:
        """The id that a step of ROWS_PER_STEP comes to."""
        return int(self._ids[min(self._at + ROWS_PER_STEP, len(self._ids)) - 1])

    def take(self, reached: int, which: FactFilter) -> np.ndarray:
        """Ids up to `reached` that match; the run goes on behind them."""
        start, stop = self._at, int(np.searchsorted(self._ids, reached, "right"))
        self._at = stop
        if start == stop:
            return np.empty(0, np.int64)
        ids, facts = self._ids[start:stop], self._view.chunk.facts
        assert facts is not None
        if self._order is None:
            rows, positions = facts.slice(start, stop - start), np.arange(start, stop)
        else:
            positions = self._order[start:stop]
            rows = facts.take(pa.array(positions))
        matches = _matches(rows, which)
        hidden = self._view.hidden
        if hidden is not None:
            places = np.minimum(np.searchsorted(hidden, positions), len(hidden) - 1)
            matches &= hidden[places] != positions
        return ids[matches]


def _matches(rows: pa.Table, which: FactFilter) -> np.ndarray:
    """For each row whether the filter lets it through, bool."""
    found = np.ones(len(rows), bool)
    try:
        for name in ("entity", "property"):
            wanted = getattr(which, name)
            if wanted is not None:
                found &= pc.equal(rows[name], wanted).to_numpy()
        if which.text and found.any():
            candidates = rows if found.all() else rows.filter(pa.array(found))
            contains = np.zeros(len(candidates), bool)
            for name in ("entity", "property", "value"):
                contains |= pc.match_substring(candidates[name], which.text, ignore_case=True).to_numpy()
            found[found] = contains
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        raise InputError(
            f"the text cannot be looked for: {error}", where="q, entity, property", help="give a shorter, plain text"
        ) from None
    return found


def _to_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "fact_id": str(row["fact_id"]),
        **{name: row[name] for name in ("entity", "property", "value", "metadata")},
    }


def _checked_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_LIMIT:
        raise InputError(f"a limit of {limit}", where="limit", help=f"give 1 to {MAX_LIMIT}")
    return limit


def _checked_after(after: str | None) -> int | None:
    if after is None:
        return None
    if not _DECIMAL.fullmatch(after) or not _IDS.min <= int(after) <= _IDS.max:
        raise InputError(
            f"{after[:40]!r} is no fact id", where="after", help="give what `next` of the page before says, or nothing"
        )
    return int(after)
