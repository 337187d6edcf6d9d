"""Find facts whose key embedding equals another fact's: attention cannot tell such facts apart.

An uncased encoder maps `us` and `US` to one vector, and so do texts that differ only beyond what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kblam_ray.table.live import read_live
from kblam_ray.table.pipeline.write import WrittenFacts, key_digests, key_ids
from kblam_ray.table.schema import unpack_embeddings

MAX_COMPARED_FACTS = 250_000
"""Facts already in the table are compared too while they are at most this many: their keys have to be read."""


@dataclass(frozen=True)
class Ambiguity:
    """`fact_ids` are the written facts that share a key embedding; `example` names two such facts."""

    fact_ids: np.ndarray
    example: tuple[str, str] | None


def find_ambiguous_keys(kb_uri: str, version: int, num_facts: int, written: WrittenFacts, dim: int) -> Ambiguity:
    """Compare the keys of the facts just written with each other and with those of the table.

    Args:
        version: the version that holds the write.
        num_facts: live facts of that version; above MAX_COMPARED_FACTS only the written ones are compared.
    """
    ids, digests, names = written.fact_ids_W, written.key_digests_W, written.key_ids_W
    if num_facts > MAX_COMPARED_FACTS:
        return _compare(ids, names, digests, kb_uri, version)
    if not len(ids):
        return Ambiguity(ids, None)
    others = [(ids, names, digests)]
    columns = ["fact_id", "entity", "property", "key_embedding"]
    for rows in read_live(kb_uri, version, columns=columns):
        digests_of_rows = key_digests(unpack_embeddings(rows["key_embedding"], dim))
        # Facts of the table that only clash with each other are none of this write's news.
        met = np.isin(digests_of_rows, digests) & ~np.isin(rows["fact_id"].to_numpy(), ids)
        if met.any():
            rows = rows.filter(pa.array(met))
            others.append((rows["fact_id"].to_numpy(), key_ids(rows), digests_of_rows[met]))
    ids, names, digests = (np.concatenate(arrays) for arrays in zip(*others, strict=True))
    found = _compare(ids, names, digests, kb_uri, version)
    return Ambiguity(found.fact_ids[np.isin(found.fact_ids, written.fact_ids_W)], found.example)


def _compare(ids: np.ndarray, names: np.ndarray, digests: np.ndarray, kb_uri: str, version: int) -> Ambiguity:
    """Facts of different names and equal digests. Facts of one name (many values) share their key by design."""
    order = np.lexsort((names, digests))
    same_key = digests[order][1:] == digests[order][:-1]
    clashes = np.flatnonzero(same_key & (names[order][1:] != names[order][:-1]))
    if not len(clashes):
        return Ambiguity(np.empty(0, np.int64), None)
    ambiguous = np.unique(ids[np.isin(digests, digests[order][clashes])])
    pair = ids[order[clashes[0] : clashes[0] + 2]]
    rows = [
        f"the {row['property']} of {row['entity']}"
        for part in read_live(kb_uri, version, columns=["entity", "property"], fact_ids=pair)
        for row in part.to_pylist()
    ]
    # A later write may have deleted one of the pair, or both, already.
    return Ambiguity(ambiguous, (rows[0], rows[1]) if len(rows) == 2 else None)
