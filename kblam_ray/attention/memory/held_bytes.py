"""How many bytes a set of tensors, arrays and tables keeps alive, memory that they share counted once."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import pyarrow as pa


class HeldBytes:
    """Collects spans of memory. A view counts with the whole of what it is a view of, as that stays alive with it."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def add_tensor(self, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            storage = tensor.untyped_storage()
            self._add(str(tensor.device), storage.data_ptr(), storage.nbytes())

    def add_array(self, array: np.ndarray | None) -> None:
        if array is not None:
            while isinstance(array.base, np.ndarray):
                array = array.base
            self._add("cpu", array.__array_interface__["data"][0], array.nbytes)

    def add_table(self, table: pa.Table | None) -> None:
        for column in table.columns if table is not None else ():
            for chunk in column.chunks:
                for buffer in chunk.buffers():
                    if buffer is not None:
                        self._add("cpu", buffer.address, buffer.size)

    def total(self) -> int:
        """Bytes in the union of all spans."""
        total = 0
        for spans in self._spans.values():
            reached = 0
            for start, stop in sorted(spans):
                total += max(0, stop - max(start, reached))
                reached = max(reached, stop)
        return total

    def _add(self, place: str, address: int, size_bytes: int) -> None:
        self._spans[place].append((address, address + size_bytes))
