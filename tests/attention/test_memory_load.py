"""Loading: nothing copied that need not be, everything checked."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from memory_cases import DIM, changes, embeddings, expected, load, seen, text, texts, tiny_adapter

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import AdapterMismatchError, EmbeddingError, InputError
from kblam_ray.facts.fact import Fact

ADAPTER = tiny_adapter()


def from_embeddings(keys_MP, values_MP, **options) -> KnowledgeMemory:
    return KnowledgeMemory.from_embeddings(ADAPTER, keys_MP, values_MP, **options)


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_are_not_copied_and_nothing_warns(dtype, writeable):
    keys_MP, values_MP = (half_MP.astype(dtype) for half_MP in embeddings(range(5)))
    keys_MP.setflags(write=writeable)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = from_embeddings(keys_MP, values_MP)
    chunk = memory.views[0].chunk
    assert chunk.keys_MP.data_ptr() == keys_MP.ctypes.data
    assert chunk.values_MP.data_ptr() == values_MP.ctypes.data
    assert torch.equal(chunk.keys_MP, torch.tensor(keys_MP))
    assert memory.dtype == chunk.keys_MP.dtype == torch.from_numpy(np.empty(0, dtype)).dtype
    assert keys_MP.flags.writeable == writeable


def test_the_memory_keeps_a_read_only_array_alive():
    array = np.arange(2 * DIM, dtype=np.float32).reshape(2, DIM)
    bytes_ = array.tobytes()
    memory = from_embeddings(
        np.frombuffer(bytearray(bytes_), np.float32).reshape(2, DIM), np.frombuffer(bytes_, np.float32).reshape(2, DIM)
    )
    del bytes_
    _ = [bytearray(2 * DIM * 4) for _ in range(100)]  # would take the place of freed bytes
    assert torch.equal(memory.views[0].chunk.values_MP, torch.tensor(array))


def test_tensors_are_not_copied():
    keys_MP, values_MP = torch.randn(3, DIM, dtype=torch.bfloat16), torch.randn(3, DIM, dtype=torch.bfloat16)
    chunk = from_embeddings(keys_MP, values_MP).views[0].chunk
    assert chunk.keys_MP.data_ptr() == keys_MP.data_ptr()
    assert chunk.values_MP.data_ptr() == values_MP.data_ptr()


def test_a_dtype_converts_and_a_stride_is_taken_out():
    keys_MP, values_MP = embeddings(range(6))
    memory = from_embeddings(keys_MP[::2], values_MP[::-2], dtype=torch.float32)
    chunk = memory.views[0].chunk
    assert chunk.keys_MP.dtype == memory.dtype == torch.float32
    assert np.array_equal(chunk.keys_MP.numpy(), keys_MP[::2].astype(np.float32))
    assert np.array_equal(chunk.values_MP.numpy(), values_MP[::-2].astype(np.float32))
    swapped = from_embeddings(keys_MP.astype(">f2"), values_MP).views[0].chunk
    assert np.array_equal(swapped.keys_MP.numpy(), keys_MP)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_chunks_of_some_rows_hold_the_same_facts_over_the_same_memory(rows):
    ids = [5, 3, 9, 1, 2, 7, 8]
    whole, parts = load(ADAPTER, ids), load(ADAPTER, ids, chunk_rows=rows)
    assert parts.nbytes == whole.nbytes
    assert [view.num_rows for view in parts.views] == [len(ids[at : at + rows]) for at in range(0, len(ids), rows)]
    assert parts.fact_ids.tolist() == whole.fact_ids.tolist() == ids
    assert seen(parts) == seen(whole) == expected(dict.fromkeys(ids, 0))
    assert parts.lookup(ids) == whole.lookup(ids)


def test_no_facts_are_a_memory_too():
    memory = from_embeddings(*embeddings([]), version=3)
    assert (memory.views, memory.num_facts, memory.num_total, memory.nbytes) == ((), 0, 0, 0)
    assert memory.fact_ids.dtype == np.int64
    assert len(memory.fact_ids) == 0
    assert memory.log_num_facts == 0
    assert memory.with_prior(np.empty(0, np.float32)).priors == ()
    assert memory.select([]).views == ()
    grown = memory.apply(changes([4], versions=(3, 4)))
    assert seen(grown) == expected({4: 1})


def test_what_a_memory_says_of_itself():
    memory = load(ADAPTER, range(6), version=7)
    assert (memory.num_facts, memory.num_total, memory.version, memory.form) == (6, 6, 7, "latent")
    assert memory.log_num_facts == math.log(6)
    assert memory.device == torch.device("cpu")
    memory.check_adapter(ADAPTER)
    with pytest.raises(AdapterMismatchError):
        memory.check_adapter(tiny_adapter())


def test_auto_is_materialized_for_few_facts_of_the_papers_kind_and_follows_changes():
    few, many = range(256), range(257)
    assert load(ADAPTER, few, form="materialized").form == "materialized"
    assert load(ADAPTER, many, form="auto").form == "latent"
    assert load(tiny_adapter("shared"), few, form="auto").form == "latent"
    memory = load(ADAPTER, few, form="auto", version=1)
    assert memory.form == "materialized"
    grown = memory.apply(changes([256], versions=(1, 2)))
    assert (grown.form, grown.apply(changes([], [0], versions=(2, 3))).form) == ("latent", "materialized")


def test_ids_are_counted_or_come_from_the_facts_or_are_given():
    pair = embeddings(range(3))
    assert from_embeddings(*pair).fact_ids.tolist() == [0, 1, 2]
    assert from_embeddings(*pair, facts=texts([7, 5, 6])).fact_ids.tolist() == [7, 5, 6]
    for ids in ([7, -5, 2**62], torch.tensor([7, -5, 2**62]), pa.array([7, -5, 2**62]), np.array([7, -5, 2**62])):
        assert from_embeddings(*pair, fact_ids=ids).fact_ids.tolist() == [7, -5, 2**62]


def test_facts_may_be_rows():
    pair = embeddings(range(2))
    memory = from_embeddings(*pair, facts=[Fact("France", "capital", "Paris"), Fact("Peru", "capital", "Lima", "{}")])
    assert memory.lookup([1]) == [
        {"fact_id": 1, "entity": "Peru", "property": "capital", "value": "Lima", "metadata": "{}"}
    ]
    rows = [{"fact_id": 8, "entity": "e", "property": "p", "value": "v"}, {"fact_id": 9, **text(9)}]
    assert [row["metadata"] for row in from_embeddings(*pair, facts=rows).lookup([9, 8])] == [None, None]
    assert from_embeddings(*embeddings([]), facts=[]).has_texts


def test_metadata_of_rows_is_json_text_even_where_the_first_row_has_none():
    source = {"source": "Ämter", "pages": [1, 2]}
    rows = [{"entity": "e", "property": "p", "value": "v"}, {**text(1), "metadata": source}]
    found = from_embeddings(*embeddings(range(2)), facts=rows).lookup([0, 1])
    assert [row["metadata"] for row in found] == [None, '{"source": "Ämter", "pages": [1, 2]}']


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()])
def test_texts_of_any_arrow_type_merge_with_later_ones(kind):
    table = texts(range(4))
    table = table.set_column(1, "entity", table["entity"].cast(kind)).set_column(4, "metadata", pa.nulls(4))
    memory = from_embeddings(*embeddings(range(4)), facts=table, version=1)
    after = memory.apply(changes([2, 3], [0], versions=(1, 2)))
    assert len(after.views) == 1  # rewritten, the loaded chunk's texts beside the new ones
    assert after.lookup([1, 3]) == [{"fact_id": 1, **text(1)}, {"fact_id": 3, **text(3, 1)}]


def test_lookup_in_the_order_asked():
    memory = load(ADAPTER, range(10), chunk_rows=3)
    assert memory.lookup(np.array([9, 0, 4, 9])) == [{"fact_id": id_, **text(id_)} for id_ in (9, 0, 4, 9)]
    assert memory.lookup([]) == []
    with pytest.raises(InputError, match=r"2 facts: -1, 77"):
        memory.lookup([3, 77, -1])
    with pytest.raises(InputError, match="without the facts' texts"):
        from_embeddings(*embeddings([1])).lookup([0])


BAD_NUMBERS = [float("nan"), float("inf"), -float("inf"), -float("nan")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_number_that_is_not_finite_is_refused_naming_the_first_row_and_its_fact(dtype, number, which):
    ids = [4, 9, 2, 7]
    pair = {
        name: torch.tensor(half_MP).to(dtype) for name, half_MP in zip(("key", "value"), embeddings(ids), strict=True)
    }
    pair[which][2, 1] = pair[which][3, 0] = number
    with pytest.raises(EmbeddingError, match=rf"a {which} embedding .*row 2, fact 2: the p of e2"):
        from_embeddings(pair["key"], pair["value"], facts=texts(ids))
    with pytest.raises(EmbeddingError, match=r"row 2, fact 2\)"):
        from_embeddings(pair["key"], pair["value"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_and_smallest_finite_numbers_are_taken(dtype):
    about = torch.finfo(dtype)
    row_P = torch.tensor([about.max, about.min, about.tiny, -0.0], dtype=dtype)
    assert from_embeddings(row_P[None], -row_P[None]).num_facts == 1


def test_the_last_number_of_many_blocks_is_checked(monkeypatch):
    monkeypatch.setattr("kblam_ray.attention.memory.embeddings.NUMBERS_PER_BLOCK", 3 * DIM)
    for row in range(11):
        keys_MP, values_MP = embeddings(range(11))
        values_MP[row, DIM - 1] = np.inf
        with pytest.raises(EmbeddingError, match=f"row {row}, fact {row}"):
            from_embeddings(keys_MP, values_MP)


def test_numbers_that_the_wanted_type_cannot_hold_are_refused():
    keys_MP, values_MP = (half_MP.astype(np.float32) for half_MP in embeddings(range(3)))
    values_MP[1, 0] = 70_000
    assert from_embeddings(keys_MP, values_MP).num_facts == 3
    with pytest.raises(EmbeddingError, match=r"not finite in float16 .*row 1"):
        from_embeddings(keys_MP, values_MP, dtype=torch.float16)


HALF = np.zeros((3, DIM), np.float16)


def with_column(name: str, column) -> pa.Table:
    table = texts([1, 2, 3])
    return table.set_column(table.column_names.index(name), name, pa.array(column))


@pytest.mark.parametrize(
    ("keys_MP", "values_MP", "options", "error", "words"),
    [
        (HALF.tolist(), HALF, {}, EmbeddingError, "key embeddings are a list"),
        (HALF, HALF.astype(int), {}, EmbeddingError, "value embeddings are of type int64"),
        (torch.zeros(3, DIM, dtype=torch.int32), HALF, {}, EmbeddingError, "of type int32"),
        (HALF.astype(np.longdouble), HALF, {}, EmbeddingError, "of type float128"),
        (HALF.astype(complex), HALF, {}, EmbeddingError, "of type complex128"),
        (HALF[:, :3].copy(), HALF, {}, EmbeddingError, "3 numbers each, the adapter reads 4"),
        (HALF, np.zeros((3, 5), np.float16), {}, EmbeddingError, "5 numbers each"),
        (HALF[0], HALF, {}, EmbeddingError, "1 dimensions"),
        (HALF[None], HALF, {}, EmbeddingError, "3 dimensions"),
        (HALF[:2], HALF, {}, EmbeddingError, "2 key embeddings and 3 value"),
        (HALF.astype(np.float32), HALF, {}, EmbeddingError, "float32, the value embeddings torch.float16"),
        (HALF, HALF, {"dtype": torch.int8}, EmbeddingError, "kept as torch.int8"),
        (HALF, HALF, {"fact_ids": [1, 2]}, InputError, "2 fact ids and 3 embeddings"),
        (HALF, HALF, {"fact_ids": [5, 1, 5]}, InputError, "more than once .fact 5"),
        (HALF, HALF, {"fact_ids": ["1", "2", "3"]}, InputError, "whole numbers"),
        (HALF, HALF, {"fact_ids": [1.0, 2.0, 3.0]}, InputError, "whole numbers"),
        (HALF, HALF, {"fact_ids": [1, 2, 2**63]}, InputError, "whole numbers of 64 bits"),
        (HALF, HALF, {"fact_ids": [[1], [2], [3]]}, InputError, "in one row"),
        (HALF, HALF, {"fact_ids": 3}, InputError, "whole numbers"),
        (HALF, HALF, {"fact_ids": [True, False, True]}, InputError, "whole numbers"),
        (HALF, HALF, {"facts": texts([1, 2])}, InputError, "2 facts and 3 embeddings"),
        (HALF, HALF, {"facts": texts([1, 2, 1])}, InputError, "more than once"),
        (HALF, HALF, {"facts": texts([1, 2, 3]), "fact_ids": [1, 2, 4]}, InputError, "others than"),
        (HALF, HALF, {"facts": texts([1, 2, 3]).drop(["value"])}, InputError, "lack value"),
        (HALF, HALF, {"facts": "facts"}, InputError, "not rows of a table"),
        (HALF, HALF, {"facts": [{**text(1), "value": 1}] * 3}, InputError, "not rows of a table"),
        (HALF, HALF, {"facts": [text(1), {**text(1), "value": None}, text(1)]}, InputError, "no value .row 1"),
        (HALF, HALF, {"facts": with_column("value", [1, 2, 3])}, InputError, "value of facts is int64, not text"),
        (HALF, HALF, {"facts": with_column("metadata", [{"a": 1}] * 3)}, InputError, "struct.*JSON text"),
        (torch.zeros(3, DIM, device="meta"), HALF, {}, EmbeddingError, "a meta tensor"),
        (torch.zeros(3, DIM).to_sparse(), HALF, {}, EmbeddingError, "a sparse tensor"),
        (HALF, HALF, {"form": "compressed"}, InputError, "no form 'compressed'"),
        (HALF, HALF, {"chunk_rows": 0}, InputError, "0 rows"),
    ],
)
def test_bad_input(keys_MP, values_MP, options, error, words):
    with pytest.raises(error, match=words) as raised:
        from_embeddings(keys_MP, values_MP, **options)
    assert "Help: " in str(raised.value)


def test_embeddings_with_a_gradient_keep_it():
    keys_MP = torch.randn(3, DIM, requires_grad=True)
    chunk = from_embeddings(keys_MP, torch.randn(3, DIM)).views[0].chunk
    chunk.fact_scale_M(ADAPTER).sum().backward()
    assert keys_MP.grad.abs().sum() > 0
