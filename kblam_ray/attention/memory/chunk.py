"""A chunk is an immutable run of facts in memory; a chunk view is what one version or selection sees of it.

Versions of a knowledge base share chunks, and each has its own views: a fact that is deleted, replaced or not selected
is hidden in a view while the chunk stays as it is. Shape legend: M facts, P encoder dim, N query heads, H head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kblam_ray.attention import projections
from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.memory.fact_texts import frozen, is_ascending
from kblam_ray.attention.memory.held_bytes import HeldBytes

if TYPE_CHECKING:
    import pyarrow as pa

SPARSE = 4
"""A selection of less than one fact in this many is gathered; else the whole chunk is scanned and the rest hidden."""

_serials = itertools.count()


class DerivedName(NamedTuple):
    """A value made from embeddings and an adapter's weights: the facts' scale, or one layer's keys and values."""

    layer: int | None = None
    dtype: torch.dtype | None = None


FACT_SCALE = DerivedName()


class _Derived(NamedTuple):
    weights_key: Hashable
    tensors: tuple[torch.Tensor | None, ...]


class Chunk:
    """Base embeddings, ids and texts of some facts. Nothing of it changes; values derived from it are kept when made.

    Attributes:
        keys_MP, values_MP: base embeddings, float16, bfloat16, float32 or float64, on one device.
        fact_ids: NumPy int64 [M].
        facts: entity, property, value and metadata of each, or None.
        is_loaded: it came with a whole knowledge base, and not from changes to one.
    """

    def __init__(
        self,
        keys_MP: torch.Tensor,
        values_MP: torch.Tensor,
        fact_ids: np.ndarray,
        facts: pa.Table | None = None,
        *,
        is_loaded: bool = False,
    ) -> None:
        self.keys_MP, self.values_MP = keys_MP, values_MP
        self.fact_ids = frozen(fact_ids)
        self.facts = facts
        self.is_loaded = is_loaded
        self._is_ascending = is_ascending(fact_ids)
        self._order: np.ndarray | None = None
        self._derived: dict[DerivedName, _Derived] = {}

    @property
    def num_rows(self) -> int:
        return len(self.fact_ids)

    def find(self, fact_ids: np.ndarray) -> np.ndarray:
        """Where facts stand in this chunk: int64, -1 for those that do not."""
        if not self.num_rows:
            return np.full(len(fact_ids), -1)
        if not self._is_ascending and self._order is None:
            self._order = np.argsort(self.fact_ids)
        at = np.searchsorted(self.fact_ids, fact_ids, sorter=self._order)
        at = np.minimum(at, self.num_rows - 1)
        positions = at if self._order is None else self._order[at]
        return np.where(self.fact_ids[positions] == fact_ids, positions, -1)

    def fact_scale_M(self, adapter: KnowledgeAdapter) -> torch.Tensor | None:
        """r_m of each fact (see `projections.fact_scale`), float32 [M]; None for kind "shared", which has none.

        Kept for the weights it was made with. While autograd records the adapter it is made anew at each call.
        """
        return self._derive(FACT_SCALE, adapter)[0] if adapter.config.kind == "paper" else None

    def materialized(
        self, adapter: KnowledgeAdapter, layer: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Keys and values of one KB layer, see `projections.materialize`; kept like the facts' scale."""
        keys, values = self._derive(DerivedName(layer, dtype), adapter)
        assert values is not None
        return keys, values

    def inherit(self, views: Sequence[ChunkView], adapter: KnowledgeAdapter) -> None:
        """Take over derived values: this chunk holds the live facts of `views`, in their order.

        What at least one of them has for the adapter's weights is made for the others, so that a fact's share of work
        is done once and not again each time that chunks merge.
        """
        weights_key = adapter.weights_key()
        known = {name for view in views for name in view.chunk._names_for(weights_key)}
        with projections.for_keeping(self.keys_MP.device):
            for name in known:
                dim = 0 if name == FACT_SCALE or adapter.config.kind == "shared" else 1
                parts = [
                    [None if part is None else view.live_rows(part, dim) for part in view.chunk._derive(name, adapter)]
                    for view in views
                ]
                tensors = tuple(_joined(same, dim) for same in zip(*parts, strict=True))
                self._derived[name] = _Derived(weights_key, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that the chunk keeps alive."""
        held = HeldBytes()
        self.add_to(held)
        return held.total()

    def add_to(self, held: HeldBytes) -> None:
        for derived in list(self._derived.values()):
            for tensor in derived.tensors:
                held.add_tensor(tensor)
        held.add_tensor(self.keys_MP)
        held.add_tensor(self.values_MP)
        held.add_array(self.fact_ids)
        held.add_array(self._order)
        held.add_table(self.facts)

    def __getstate__(self) -> dict[str, Any]:
        # What is derived holds for weights of this process only, see `KnowledgeAdapter.weights_key`.
        return {**self.__dict__, "_derived": {}}

    def _names_for(self, weights_key: Hashable) -> list[DerivedName]:
        return [name for name, derived in list(self._derived.items()) if derived.weights_key == weights_key]

    def _derive(self, name: DerivedName, adapter: KnowledgeAdapter) -> tuple[torch.Tensor | None, ...]:
        has_gradient = self.keys_MP.requires_grad or self.values_MP.requires_grad
        if torch.is_grad_enabled() and (has_gradient or projections.requires_grad(adapter)):
            return self._make(name, adapter)
        weights_key = adapter.weights_key()
        known = self._derived.get(name)
        if known is None or known.weights_key != weights_key:
            with projections.for_keeping(self.keys_MP.device):
                known = _Derived(weights_key, self._make(name, adapter))
            # Two threads may both come here: either result is the right one.
            self._derived[name] = known
        return known.tensors

    def _make(self, name: DerivedName, adapter: KnowledgeAdapter) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(self.keys_MP.device.type, enabled=False):
            if name.layer is None or name.dtype is None:
                return (projections.fact_scale(adapter, self.keys_MP),)
            return projections.materialize(adapter, name.layer, self.keys_MP, self.values_MP, name.dtype)


def _joined(parts: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors, dim) if tensors else None


class ChunkView:
    """The facts of a chunk that one version or selection sees; never none.

    Attributes:
        positions: int64 tensor, ascending: the rows to gather, of a sparse selection. None: all rows are scanned.
        hidden: NumPy int64, ascending: rows that are scanned and must not be seen. None: there are none.
        hidden_rows: the same as a tensor beside the embeddings.
        serial: tells it from every other view that ever was in this process.
    """

    def __init__(self, chunk: Chunk, *, positions: np.ndarray | None = None, hidden: np.ndarray | None = None) -> None:
        assert positions is None or hidden is None
        self.chunk = chunk
        self.serial = next(_serials)
        self.hidden = frozen(hidden) if hidden is not None and len(hidden) else None
        self._host_positions = positions
        device = chunk.keys_MP.device
        with torch.inference_mode(False):
            self.positions = None if positions is None else torch.from_numpy(positions).to(device)
            self.hidden_rows = None if self.hidden is None else torch.from_numpy(hidden).to(device)

    def __reduce__(self) -> tuple:
        # Copied or sent to another process, it is another view: its serial may be taken there.
        return _view_again, (self.chunk, self._host_positions, self.hidden)

    @property
    def num_rows(self) -> int:
        """Rows that an attention over this view goes through."""
        return self.chunk.num_rows if self._host_positions is None else len(self._host_positions)

    @property
    def num_live(self) -> int:
        """Facts seen."""
        return self.num_rows if self.hidden is None else self.num_rows - len(self.hidden)

    @property
    def log_weights_M(self) -> torch.Tensor | None:
        """What to add to the logits of the rows: float32 [num_rows], 0 or -inf where hidden; None when all are seen.

        Made at each call: kept, every version of a knowledge base would cost a number per fact.
        """
        if self.hidden_rows is None:
            return None
        with torch.inference_mode(False):
            weights_M = torch.zeros(self.num_rows, dtype=torch.float32, device=self.hidden_rows.device)
            return weights_M.index_fill_(0, self.hidden_rows, float("-inf"))

    def rows(self, tensor: torch.Tensor, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Of a tensor with one entry per fact of the chunk along `dim`, the rows of this view from `start` to `stop`.

        A view of the tensor where rows are scanned, a copy where they are gathered.
        """
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        if self.positions is not None:
            return tensor.index_select(dim, self.positions[start:stop])
        return tensor if start == 0 and stop == self.num_rows else tensor.narrow(dim, start, stop - start)

    def live_positions(self) -> np.ndarray | None:
        """Where the facts seen stand in the chunk: int64, ascending; None when that is everywhere."""
        if self._host_positions is not None or self.hidden is None:
            return self._host_positions
        seen = np.ones(self.chunk.num_rows, bool)
        seen[self.hidden] = False
        return np.flatnonzero(seen)

    def live_rows(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Like `rows`, of the facts seen only: the tensor itself when that is all of them, else a copy."""
        positions = self.live_positions()
        if positions is None:
            return tensor
        return tensor.index_select(dim, torch.tensor(positions, device=tensor.device))

    @property
    def fact_ids(self) -> np.ndarray:
        """Ids of the facts seen, int64 [num_live], in the chunk's order."""
        positions = self.live_positions()
        return self.chunk.fact_ids if positions is None else self.chunk.fact_ids[positions]

    def find(self, fact_ids: np.ndarray) -> np.ndarray:
        """Where facts stand in the chunk: int64, -1 for those that are not seen."""
        found = self.chunk.find(fact_ids)
        if self._host_positions is not None:
            return np.where(_contains(self._host_positions, found), found, -1)
        return found if self.hidden is None else np.where(_contains(self.hidden, found), -1, found)

    def without(self, positions: np.ndarray) -> ChunkView | None:
        """The view with more rows hidden: positions of facts seen, ascending. None when nothing is left.

        Only for views that scan.
        """
        assert self._host_positions is None
        if len(positions) == self.num_live:
            return None
        hidden = np.zeros(0, np.int64) if self.hidden is None else self.hidden
        return ChunkView(self.chunk, hidden=np.insert(hidden, np.searchsorted(hidden, positions), positions))

    def only(self, positions: np.ndarray) -> ChunkView | None:
        """The view with only these rows: positions of facts seen, ascending. None when there are none."""
        if not len(positions):
            return None
        if len(positions) == self.num_live:
            return self
        if self._host_positions is not None or len(positions) * SPARSE < self.chunk.num_rows:
            return ChunkView(self.chunk, positions=positions)
        hidden = np.ones(self.chunk.num_rows, bool)
        hidden[positions] = False
        return ChunkView(self.chunk, hidden=np.flatnonzero(hidden))

    def add_to(self, held: HeldBytes) -> None:
        self.chunk.add_to(held)
        held.add_array(self.hidden)
        held.add_array(self._host_positions)
        held.add_tensor(self.positions)
        held.add_tensor(self.hidden_rows)


def _view_again(chunk: Chunk, positions: np.ndarray | None, hidden: np.ndarray | None) -> ChunkView:
    # Arrays may come out of a store that cannot be written to, which torch warns about.
    positions, hidden = (None if rows is None else rows.copy() for rows in (positions, hidden))
    return ChunkView(chunk, positions=positions, hidden=hidden)


def _contains(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(wanted), bool)
    at = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return ascending[at] == wanted
