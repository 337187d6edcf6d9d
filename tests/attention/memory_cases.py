"""Small adapters, facts and changes for the tests of memories, and reading a memory as an attention does.

Every fact's embeddings and texts follow from its id and a revision, so that a mix-up of facts shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.attention.memory import KnowledgeMemory

DIM = 4


def tiny_adapter(kind: str = "paper", **settings: Any) -> KnowledgeAdapter:
    shape = BaseShape(model_type="llama", hidden_size=8, num_layers=4, num_heads=2, head_dim=4)
    config = AdapterConfig(kind=kind, base_shape=shape, dim=DIM, kb_layer_frequency=2, slots=2, **settings)
    torch.manual_seed(0)
    return KnowledgeAdapter(config).eval().requires_grad_(False)


def embeddings(ids: Any, revision: int = 0, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values, float16, of facts with these ids."""
    rows = [np.random.default_rng([int(id_) % 2**32, revision]).standard_normal((2, dim)) for id_ in ids]
    both_M2P = np.array(rows, np.float16).reshape(len(rows), 2, dim)
    return both_M2P[:, 0].copy(), both_M2P[:, 1].copy()


def texts(ids: Any, revision: int = 0) -> pa.Table:
    names = pa.schema([(name, pa.string()) for name in ("entity", "property", "value", "metadata")])
    rows = [text(id_, revision) for id_ in ids]
    table = pa.Table.from_pylist(rows, names)
    return table.add_column(0, "fact_id", pa.array([int(id_) for id_ in ids], pa.int64()))


def text(id_: int, revision: int = 0) -> dict[str, str | None]:
    return {"entity": f"e{id_}", "property": "p", "value": f"v{revision}", "metadata": None if id_ % 2 else "{}"}


def load(adapter: KnowledgeAdapter, ids: Any, **options: Any) -> KnowledgeMemory:
    """A memory with texts of facts at revision 0."""
    return KnowledgeMemory.from_embeddings(adapter, *embeddings(ids), facts=texts(ids), **options)


@dataclass
class Upserts:
    facts: pa.Table
    key_embeddings_MP: np.ndarray
    value_embeddings_MP: np.ndarray


@dataclass
class Changes:
    from_version: int | None
    to_version: int | None
    upserts: Upserts
    deleted_ids: np.ndarray


def changes(upserted: Any = (), deleted: Any = (), *, revision: int = 1, versions: Any = (1, 2)) -> Changes:
    upserts = Upserts(texts(upserted, revision), *embeddings(upserted, revision))
    return Changes(*versions, upserts, np.array(list(deleted), np.int64))


def seen(memory: KnowledgeMemory) -> dict[int, tuple[bytes, bytes]]:
    """Key and value bytes of each fact that an attention over the views sees, by id; fails if one is seen twice."""
    found: dict[int, tuple[bytes, bytes]] = {}
    for view in memory.views:
        weights_M = view.log_weights_M
        keys_MP, values_MP = view.rows(view.chunk.keys_MP), view.rows(view.chunk.values_MP)
        ids_M = view.rows(torch.tensor(view.chunk.fact_ids))
        assert len(keys_MP) == len(values_MP) == view.num_rows
        for row in range(view.num_rows):
            if weights_M is None or weights_M[row] == 0:
                assert int(ids_M[row]) not in found
                found[int(ids_M[row])] = (_bytes(keys_MP[row]), _bytes(values_MP[row]))
            else:
                assert weights_M[row] == float("-inf")
    return found


def expected(revisions: dict[int, int]) -> dict[int, tuple[bytes, bytes]]:
    """What `seen` should give for facts at these revisions."""
    found = {}
    for id_, revision in revisions.items():
        keys_MP, values_MP = embeddings([id_], revision)
        found[id_] = (keys_MP.tobytes(), values_MP.tobytes())
    return found


def _bytes(row_P: torch.Tensor) -> bytes:
    return row_P.numpy().tobytes()
