"""From embedded facts in memory to a knowledge memory for one adapter.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.model.matching import require_encoder
from kblam_ray.table.embedded import EmbeddedFacts


def memory_of(
    adapter: KnowledgeAdapter,
    facts: EmbeddedFacts,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    form: str = "latent",
    with_texts: bool = True,
) -> KnowledgeMemory:
    """The facts of some rows, or all of them, ready to attend to; fact m of the memory is `rows[m]`.

    Args:
        rows: row numbers, each at most once; None: all rows, whose embeddings are then not copied.
        device: None is the adapter's.
        dtype: of the embeddings; None keeps float16.
        form: "latent", "materialized" or "auto".
        with_texts: the memory knows entity, property, value and metadata, as citations need.

    Raises:
        EncoderMismatchError: the facts were embedded by another encoder than the adapter's.
        InputError: rows that are not there, an unknown form.
        EmbeddingError: numbers that are not finite.
    """
    require_encoder(adapter.config, facts.encoder, where="embedded facts")
    chosen = facts if rows is None else facts.take(rows)
    return KnowledgeMemory.from_embeddings(
        adapter,
        chosen.keys_MP,
        chosen.values_MP,
        facts=_texts(chosen) if with_texts else None,
        fact_ids=chosen.fact_ids_M,
        form=form,
        dtype=dtype,
        device=device,
    )


def _texts(facts: EmbeddedFacts) -> pa.Table:
    columns = {name: [getattr(fact, name) for fact in facts.facts] for name in ("entity", "property", "value")}
    columns["metadata"] = [fact.metadata for fact in facts.facts]
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
