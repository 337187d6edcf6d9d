"""Embeddings survive the way into bytes and back, and numbers that float16 cannot hold are refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kblam_ray.errors import InputError, TableError
from kblam_ray.table.schema import SCHEMA, delete_rows, pack_embeddings, unpack_embeddings

halves = arrays(
    np.float16,
    st.tuples(st.integers(0, 20), st.integers(1, 9)),
    elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
)


@given(halves, st.data())
def test_embeddings_come_back_bit_for_bit_whatever_the_chunks(embeddings_MP, data):
    packed = pack_embeddings(embeddings_MP)
    cut = data.draw(st.integers(0, len(packed)))
    chunked = pa.chunked_array([packed[:cut], packed[cut:]], pa.binary())
    dim = embeddings_MP.shape[1]
    for array in (packed, chunked):
        unpacked = unpack_embeddings(array, dim)
        assert unpacked.dtype == np.float16
        np.testing.assert_array_equal(unpacked.view(np.uint16), embeddings_MP.view(np.uint16))


def test_one_contiguous_chunk_is_not_copied():
    packed = pack_embeddings(np.ones((3, 4), np.float32))
    unpacked = unpack_embeddings(packed, 4)
    assert unpacked.ctypes.data == packed.buffers()[2].address


def test_a_slice_starts_at_its_own_row():
    packed = pack_embeddings(np.arange(12, dtype=np.float32).reshape(4, 3))
    np.testing.assert_array_equal(unpack_embeddings(packed[2:], 3), [[6, 7, 8], [9, 10, 11]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 70_000.0])
def test_numbers_that_float16_cannot_hold_are_refused_with_their_row(bad):
    embeddings_MP = np.ones((3, 4), np.float32)
    embeddings_MP[2, 1] = bad
    with pytest.raises(InputError, match=r"row 2 of the batch.*Help:"):
        pack_embeddings(embeddings_MP)


@pytest.mark.parametrize("stored", [[b"\0" * 6, None], [b"\0" * 6, b"\0" * 8], [b"\0" * 2, b"\0" * 10]])
def test_missing_and_odd_embeddings_are_refused(stored):
    with pytest.raises(TableError, match="have not 3 numbers"):
        unpack_embeddings(pa.array(stored, pa.binary()), 3)


def test_delete_rows_keep_the_identity_readable_and_hold_nothing_else():
    rows = delete_rows(fact_ids=[7], entities=["France"], properties=["capital"], updated_at=5, write_id="w")
    assert rows.schema == SCHEMA
    row = rows.to_pylist()[0]
    assert (row["op"], row["entity"], row["property"], row["value"]) == ("delete", "France", "capital", None)
    assert row["key_embedding"] is None
