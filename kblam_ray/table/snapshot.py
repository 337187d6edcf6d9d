"""The live facts of one version and their embeddings, in memory, read when first asked for.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from kblam_ray.errors import TableError
from kblam_ray.table.live import Winners, find_winners
from kblam_ray.table.log import TableLog
from kblam_ray.table.schema import EMBEDDING_COLUMNS, EMBEDDING_DTYPE, FACT_COLUMNS, unpack_embeddings


class Snapshot:
    """Facts of one version, and their embeddings; row m of every part is the same fact.

    Facts and embeddings are read from the table's files when first used and kept. Once read they do not change,
    whatever is written to the table.

    Attributes:
        version: the table version read.
        fact_ids_M: int64 [M], ascending.
    """

    def __init__(self, winners: Winners) -> None:
        self._live = winners.live()
        self.version = winners.log.version
        self.fact_ids_M = self._live.fact_ids_M

    @property
    def num_facts(self) -> int:
        return len(self._live)

    @cached_property
    def facts(self) -> pa.Table:
        """fact_id, entity, property, value, metadata, content_hash and updated_at, by ascending fact_id."""
        return self._live.read_sorted(FACT_COLUMNS)

    @property
    def key_embeddings_MP(self) -> np.ndarray:
        """Base embeddings of the key texts: float16 [M, P]."""
        return self._embeddings[0]

    @property
    def value_embeddings_MP(self) -> np.ndarray:
        """Base embeddings of the value texts: float16 [M, P]."""
        return self._embeddings[1]

    @cached_property
    def _embeddings(self) -> tuple[np.ndarray, np.ndarray]:
        dim = self._live.log.info.encoder.dim
        keys_MP, values_MP = (np.empty((self.num_facts, dim), EMBEDDING_DTYPE) for _ in EMBEDDING_COLUMNS)
        for at, rows in self._live.read(EMBEDDING_COLUMNS):
            # A sorted file's row group fills one run of rows: a plain copy, several times faster than by index.
            run = slice(at[0], at[-1] + 1) if at[-1] - at[0] + 1 == len(at) else at
            for name, target_MP in zip(EMBEDDING_COLUMNS, (keys_MP, values_MP), strict=True):
                target_MP[run] = _unpacked(rows[name], dim, self._live.log.uri)
        return keys_MP, values_MP


def read_snapshot(table: str | TableLog, version: int | None = None) -> Snapshot:
    """The live facts of the table at `version`, by default its newest.

    Raises:
        TableNotFoundError, TableError, StorageError: see `TableLog.open`.
    """
    return Snapshot(find_winners(table, version))


def _unpacked(column: pa.ChunkedArray, dim: int, uri: str) -> np.ndarray:
    try:
        return unpack_embeddings(column, dim)
    except TableError as error:
        raise TableError(error.what, where=uri, help=error.help) from None
