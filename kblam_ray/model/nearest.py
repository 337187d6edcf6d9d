"""Approximate indexes of large chunks' keys: which facts a question is nearest to, without comparing them all.

Only candidates come out of an index: more than asked for, to be compared exactly afterwards. So it may be coarse: four
bits for two numbers of a key (product quantization scanned in registers: F. André et al., arXiv 1812.09162), in lists
by nearest centre, of which the nearest are looked through.

An index belongs to an immutable chunk and dies with it. A chunk that changes left behind, or that several became, has
none until `index_memory` is called again: it is searched exactly. Shape legend: M facts, P encoder dim, D P padded.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kblam_ray.attention.memory.held_bytes import HeldBytes
from kblam_ray.errors import MissingDependencyError
from kblam_ray.model import mentions

if TYPE_CHECKING:
    from kblam_ray.attention.memory import KnowledgeMemory
    from kblam_ray.attention.memory.chunk import Chunk, ChunkView

LEAST_ROWS = 1_000
"""Smaller chunks never have an index: there is too little to train it on, and an exact search takes microseconds."""

PROBED_ROWS = 500_000
PROBED_SHARE = 0.25
"""How much of a chunk is looked through: about so many rows at least, and this share of the lists."""

CANDIDATES_PER_FACT = 3
EXTRA_CANDIDATES = 50
"""How many candidates there are for K facts: the codes rank them roughly."""

LEAST_SHARE = 4
"""An index is asked for at most one fact in this many; for more, an exact search costs no more."""

BLOCK_ROWS = 16_384
"""Keys that are float32 at a time while an index is built."""

_MOST_CODES = 256
"""Sums of more would be too coarse: the scan adds in 16 bits."""

_POINTS_PER_LIST = 40
_LEAST_POINTS = 20_000
_ROUNDS = 6


class ChunkIndex:
    """The index of one chunk. Any number of threads may search it.

    Args:
        keys_MP: the chunk's keys, on the CPU, M >= LEAST_ROWS.

    Attributes:
        nbytes: memory that it takes.
    """

    def __init__(self, keys_MP: torch.Tensor) -> None:
        faiss = _faiss()
        num_rows, dim = keys_MP.shape
        code_dim = max(2, math.ceil(dim / _MOST_CODES))
        num_codes = math.ceil(dim / code_dim)
        self._dim = num_codes * code_dim
        num_lists = max(1, min(round(math.sqrt(num_rows) / 2), num_rows // _POINTS_PER_LIST))
        self._num_probed = math.ceil(min(1.0, max(PROBED_SHARE, PROBED_ROWS / num_rows)) * num_lists)
        quantizer = faiss.IndexFlatIP(self._dim)
        index = faiss.IndexIVFPQFastScan(quantizer, self._dim, num_lists, num_codes, 4, faiss.METRIC_INNER_PRODUCT)
        index.cp.spherical = True
        index.cp.niter = _ROUNDS
        index.cp.max_points_per_centroid = max(_POINTS_PER_LIST, _LEAST_POINTS // num_lists)
        num_points = min(num_rows, max(_LEAST_POINTS, _POINTS_PER_LIST * num_lists))
        points = np.sort(np.random.default_rng(0).choice(num_rows, num_points, replace=False))
        with _one_thread(faiss):
            index.train(self._directions(keys_MP[torch.from_numpy(points)]))
            for start in range(0, num_rows, BLOCK_ROWS):
                index.add(self._directions(keys_MP[start : start + BLOCK_ROWS]))
        self._index = index
        self.nbytes = _nbytes(index, num_codes)

    def nearest(self, question_P: np.ndarray, num: int, seen: _Seen | None) -> np.ndarray:
        """Rows whose keys point about where a question does, int64, in no order; fewer than `num` if not found."""
        faiss = _faiss()
        question_1D = np.zeros((1, self._dim), np.float32)
        question_1D[0, : len(question_P)] = question_P
        parameters = faiss.SearchParametersIVF(nprobe=self._num_probed, sel=None if seen is None else seen.selector)
        with _one_thread(faiss):
            _, rows = self._index.search(question_1D, num, params=parameters)
        return rows[0][rows[0] >= 0]

    def _directions(self, keys_mP: torch.Tensor) -> np.ndarray:
        """Keys as unit vectors, float32 [m, D]: then the inner product is the cosine."""
        directions_mP = torch.nn.functional.normalize(keys_mP.float(), dim=1).numpy()
        num_missing = self._dim - directions_mP.shape[1]
        return np.pad(directions_mP, ((0, 0), (0, num_missing))) if num_missing else directions_mP


@dataclass(frozen=True)
class _Seen:
    """Which rows of a chunk a view sees, as the library asks for it: it keeps a pointer to the bits."""

    bits: np.ndarray
    selector: Any

    @classmethod
    def of(cls, view: ChunkView) -> _Seen | None:
        positions = view.live_positions()
        if positions is None:
            return None
        seen = np.zeros(view.chunk.num_rows, bool)
        seen[positions] = True
        bits = np.packbits(seen, bitorder="little")
        return cls(bits, _faiss().IDSelectorBitmap(bits))


_INDEXES: weakref.WeakKeyDictionary[Chunk, ChunkIndex] = weakref.WeakKeyDictionary()
_SEEN: weakref.WeakKeyDictionary[ChunkView, _Seen] = weakref.WeakKeyDictionary()

_BUILDING = threading.Lock()
"""One at a time, whatever the number of knowledge bases: building takes a core, and no chunk is indexed twice."""


def index_memory(memory: KnowledgeMemory, *, min_rows: int) -> None:
    """Build and keep an index of each chunk with at least `min_rows` rows that has none; any thread may call it.

    A million facts take about 20 seconds of one core, 150 MB to keep and as much again meanwhile; a call for the
    same chunks waits for the one that builds them. Until then, and in all other chunks, facts are searched exactly;
    so they are on a GPU, where that is fast: chunks there get no index. The words of the facts are indexed too, where
    there are texts.

    Raises:
        MissingDependencyError: faiss is not installed.
    """
    large = [view.chunk for view in memory.views if view.chunk.num_rows >= max(min_rows, LEAST_ROWS)]
    large = [chunk for chunk in large if chunk.keys_MP.device.type == "cpu"]
    with _BUILDING:
        for chunk in large:
            if chunk not in _INDEXES:
                _INDEXES[chunk] = ChunkIndex(chunk.keys_MP.detach())
        if large and memory.has_texts:
            mentions.index_words(memory)


def index_nbytes(memory: KnowledgeMemory) -> int:
    """Bytes that the indexes of a memory's chunks take, those of words too, beside `memory.nbytes`."""
    held = HeldBytes()
    memory.add_to(held)
    before = held.total()
    mentions.add_indexes_to(held, memory)
    for view in memory.views:
        if (seen := _SEEN.get(view)) is not None:
            held.add_array(seen.bits)
    indexes = {index for view in memory.views if (index := _INDEXES.get(view.chunk)) is not None}
    return held.total() - before + sum(index.nbytes for index in indexes)


def near_rows(view: ChunkView, question_P: torch.Tensor, num_facts: int) -> np.ndarray | None:
    """Rows of a view's chunk among which the `num_facts` nearest to a question are, most likely; int64, ascending.

    All of them are seen by the view. None where all must be compared: the chunk has no index, the view gathers rows,
    or so many facts are wanted that an index would not pay.

    Args:
        question_P: a unit vector, float32.
    """
    index = _INDEXES.get(view.chunk)
    num_candidates = CANDIDATES_PER_FACT * num_facts + EXTRA_CANDIDATES
    if index is None or view.positions is not None or num_candidates * LEAST_SHARE > view.num_live:
        return None
    seen = None
    if view.hidden is not None:
        seen = _SEEN.get(view)
        if seen is None:
            seen = _Seen.of(view)
            if seen is not None:
                _SEEN[view] = seen
    rows = index.nearest(question_P.cpu().numpy(), num_candidates, seen)
    # Lists whose facts are hidden may leave too few.
    return np.sort(rows) if len(rows) >= num_facts else None


def _nbytes(index: Any, num_codes: int) -> int:
    """Of lists, centres and codebook: the library rounds the codes of each list up to a power of two."""
    sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
    blocks = [math.ceil(size / index.bbs) * index.bbs * (num_codes + num_codes % 2) // 2 for size in sizes]
    codes = sum(1 << max(8, (block - 1).bit_length()) for block in blocks if block)
    return codes + 8 * sum(sizes) + 4 * index.d * (index.nlist + index.pq.ksub)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "an index of facts needs the package faiss-cpu", help='pip install "kblam-ray[serve]"'
        ) from None
    return faiss


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """The setting is this thread's own; beside torch's threads, more of the library's would fight for the cores."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
