"""Which facts a run writes and which distinct texts it needs, as arrays that every worker can share.

Texts are numbered in the order of their first use, so the texts of neighbouring facts stand in few blocks and
few spool files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.facts.fact import key_text
from kblam_ray.table.pipeline.scan import Block, fetch_rows

UNENCODED = -1


@dataclass(frozen=True)
class Work:
    """The W facts to write, in input order, and their D distinct texts.

    Attributes:
        block_W, row_W: int32, where each fact stands in the scan.
        text_bytes_W: int32, the size of each fact's texts.
        text_ids_W2: int64 [W, 2], the numbers of each fact's key text and value text.
        owner_D: int64, where each text is used first, as a position in the flattened text_ids_W2.
        hashes_D: 16-byte hash of each text.
        file_D, place_D: int32, where each text's embedding stands: spool file and row; UNENCODED until it does.
        files: URIs of the spool files.
    """

    block_W: np.ndarray
    row_W: np.ndarray
    text_bytes_W: np.ndarray
    text_ids_W2: np.ndarray
    owner_D: np.ndarray
    hashes_D: pa.Array
    file_D: np.ndarray
    place_D: np.ndarray
    files: tuple[str, ...] = ()

    @property
    def num_facts(self) -> int:
        return len(self.block_W)

    def unencoded(self) -> np.ndarray:
        """The numbers of the texts that have no embedding yet, ascending."""
        return np.flatnonzero(self.file_D == UNENCODED)

    def encoded_hashes(self) -> pa.Array:
        """The hashes of the texts that have an embedding."""
        return self.hashes_D.filter(pa.array(self.file_D != UNENCODED))

    def texts(self, blocks: Sequence[Block], text_ids_B: np.ndarray) -> list[str]:
        """The texts of the given numbers, read from the facts that use them first."""
        owner_B = self.owner_D[text_ids_B]
        rows_B = owner_B // 2
        facts = fetch_rows(blocks, self.block_W[rows_B], self.row_W[rows_B], ["entity", "property", "value"])
        is_value_B = (owner_B % 2).astype(bool).tolist()
        return [
            fact["value"] if is_value else key_text(fact["entity"], fact["property"])
            for fact, is_value in zip(facts.to_pylist(), is_value_B, strict=True)
        ]

    def placed(self, files: list[str], text_ids: list[np.ndarray]) -> Work:
        """The same work, knowing that spool file `files[i]` holds the texts `text_ids[i]` in that order.

        A text may stand in several files (a worker that was killed after writing ran again): one place is kept.
        """
        file_D, place_D = self.file_D.copy(), self.place_D.copy()
        for number, ids in enumerate(text_ids):
            file_D[ids] = number
            place_D[ids] = np.arange(len(ids))
        return replace(self, file_D=file_D, place_D=place_D, files=tuple(files))


MAX_TEXT_BYTES = 64_000_000
"""Texts that one task of a worker holds; it makes a few copies of them."""


def ranges(text_bytes_N: np.ndarray, max_items: int) -> list[dict[str, int]]:
    """Cut N items into runs `start:stop` of at most `max_items`, and of at most MAX_TEXT_BYTES unless of one item."""
    ends_N = np.cumsum(text_bytes_N, dtype=np.int64)
    found, start = [], 0
    while start < len(ends_N):
        before = ends_N[start - 1] if start else 0
        fitting = int(np.searchsorted(ends_N, before + MAX_TEXT_BYTES, side="right"))
        stop = max(start + 1, min(start + max_items, fitting))
        found.append({"start": start, "stop": stop})
        start = stop
    return found


def plan_work(index: pa.Table, written: np.ndarray) -> Work:
    """Number the distinct texts of the facts to write.

    Args:
        index: the scan's index.
        written: row numbers into the index, ascending and at least one.
    """
    facts = index.select(["key_hash", "value_hash", "text_bytes", "block", "row"]).take(written)
    both = pa.concat_arrays([*facts["key_hash"].chunks, *facts["value_hash"].chunks])
    # Interleaved, key before value: texts then get their numbers in the order in which facts use them.
    interleaved = both.take(np.arange(2 * len(facts)).reshape(2, -1).T.ravel())
    encoded = pc.dictionary_encode(interleaved)
    text_ids = encoded.indices.to_numpy().astype(np.int64)
    num_texts = len(encoded.dictionary)
    # Numbers are given in the order of first use, so a text is new where the largest number so far grows.
    is_first = np.diff(np.maximum.accumulate(text_ids), prepend=-1) > 0
    return Work(
        block_W=facts["block"].to_numpy(),
        row_W=facts["row"].to_numpy(),
        text_bytes_W=facts["text_bytes"].to_numpy(),
        text_ids_W2=text_ids.reshape(-1, 2),
        owner_D=np.flatnonzero(is_first),
        hashes_D=encoded.dictionary,
        file_D=np.full(num_texts, UNENCODED, np.int32),
        place_D=np.full(num_texts, UNENCODED, np.int32),
    )
