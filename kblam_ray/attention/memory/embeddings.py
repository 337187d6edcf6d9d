"""Base embeddings as given by a caller: checked, and made tensors without copying where that is possible.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from kblam_ray.errors import EmbeddingError

NUMBERS_PER_BLOCK = 2**18
"""Numbers checked at a time: half a megabyte of float16 stays in a core's cache for both passes."""


class _Bits(NamedTuple):
    """A float type read as integers: from these numbers on they are infinite or not a number."""

    signed: torch.dtype
    unsigned: Any
    positive: int
    negative: int


_BITS = {
    torch.float16: _Bits(torch.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: _Bits(torch.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float32: _Bits(torch.int32, np.uint32, 0x7F80_0000, 0xFF80_0000),
    torch.float64: _Bits(torch.int64, np.uint64, 0x7FF0 << 48, 0xFFF0 << 48),
}

FLOATS = tuple(_BITS)
"""The types that embeddings may have."""


def as_embeddings(
    given: Any, name: str, *, dtype: torch.dtype | None, device: torch.device | str | None
) -> torch.Tensor:
    """A float tensor [M, P], contiguous, of `dtype` and on `device`; None keeps what the input has.

    A contiguous array or tensor that has them already is not copied: the tensor is a view of its memory, which must
    not be written to afterwards.

    Args:
        given: NumPy array or torch tensor of float16, float32 or float64; a tensor may be bfloat16.
        name: what the embeddings are, for messages: "key" or "value".

    Raises:
        EmbeddingError: another type, other numbers than floats, not a matrix, or no numbers at all (meta, sparse).
    """
    if isinstance(given, np.ndarray):
        tensor = _from_numpy(given, name)
    elif isinstance(given, torch.Tensor):
        tensor = given
    else:
        raise EmbeddingError(
            f"the {name} embeddings are a {type(given).__name__}", help="give a NumPy array or a torch tensor of floats"
        )
    if tensor.dtype not in FLOATS:
        raise _wrong_type(name, str(tensor.dtype).removeprefix("torch."))
    if dtype is not None and dtype not in FLOATS:
        raise EmbeddingError(f"embeddings cannot be kept as {dtype}", help="give one of the float types of torch")
    if tensor.dim() != 2:
        raise EmbeddingError(
            f"the {name} embeddings have {tensor.dim()} dimensions", help="give a matrix, one row per fact"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise EmbeddingError(
            f"the {name} embeddings are a {'meta' if tensor.is_meta else 'sparse'} tensor", help="give a dense matrix"
        )
    with torch.inference_mode(False):
        return tensor.to(device=device, dtype=dtype).contiguous()


def first_bad_row(embeddings_MP: torch.Tensor) -> int | None:
    """The first row with a number that is infinite or not a number, or None when all numbers are finite.

    Reads the numbers' bits as integers, block by block: no copy of any size, at the speed of memory.
    """
    num_rows, dim = embeddings_MP.shape
    rows_per_block = max(1, NUMBERS_PER_BLOCK // max(1, dim))
    if embeddings_MP.device.type == "cpu":
        bits = _BITS[embeddings_MP.dtype]
        signed_MP = embeddings_MP.detach().view(bits.signed).numpy()
        unsigned_MP = signed_MP.view(bits.unsigned)
        for start in range(0, num_rows if dim else 0, rows_per_block):
            block = slice(start, start + rows_per_block)
            if signed_MP[block].max() >= bits.positive or unsigned_MP[block].max() >= bits.negative:
                return start + _first_bad(embeddings_MP[block])
        return None
    rows_per_block *= 256  # a device is asked rarely: each answer waits for all its work
    for start in range(0, num_rows, rows_per_block):
        block_MP = embeddings_MP[start : start + rows_per_block]
        if not torch.isfinite(block_MP).all():
            return start + _first_bad(block_MP)
    return None


def _first_bad(block_MP: torch.Tensor) -> int:
    return int(torch.isfinite(block_MP).all(dim=1).logical_not().nonzero()[0])


def _from_numpy(array: np.ndarray, name: str) -> torch.Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise _wrong_type(name, str(array.dtype))
    with torch.inference_mode(False):
        return torch.from_numpy(_writable(np.ascontiguousarray(array, array.dtype.newbyteorder("="))))


class _Memory:
    """Offers an array's memory as writable, and keeps the array alive."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _writable(array: np.ndarray) -> np.ndarray:
    # Tensors cannot be read-only, so torch warns about a read-only array, and silencing a warning is not possible for
    # one thread alone. A second array over the same memory says that it may be written; nothing here ever does.
    return array if array.flags.writeable else np.asarray(_Memory(array))


def _wrong_type(name: str, found: str) -> EmbeddingError:
    return EmbeddingError(
        f"the {name} embeddings are of type {found}", help="give float16, bfloat16, float32 or float64"
    )
