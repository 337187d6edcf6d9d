"""Batches are a worker's share of the examples: the same for any number of workers, from any step, also through Ray."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from training.mix_samples import make

from kblam_ray.errors import InputError
from kblam_ray.training.mix.batches import Share, TrainingBatch, batches, dataset, stream_batches
from kblam_ray.training.mix.examples import TEXT
from kblam_ray.training.mix.streaming import EXAMPLES_PER_TASK, SCHEMA, examples_of, examples_table


def same_batches(first: TrainingBatch, second: TrainingBatch) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        elif name in ("keys_MP", "values_MP"):
            assert all(torch.equal(*pair) for pair in zip(value, other, strict=True))
        else:
            assert value == other


def test_a_batch_holds_its_examples():
    maker = make()
    examples = [maker.example(number) for number in range(16)]
    batch = TrainingBatch.collate(examples, maker, dtype=torch.float32)
    assert batch.kinds == tuple(example.kind for example in examples)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert batch.input_ids_BT[row, :length].tolist() == example.input_ids.tolist()
        assert batch.attention_mask_BT[row].tolist() == [1] * length + [0] * (batch.input_ids_BT.shape[1] - length)
        assert batch.labels_BT[row, :length].tolist() == example.labels.tolist()
        assert (batch.labels_BT[row, length:] == -100).all()
        assert batch.is_text_B[row] == (example.kind == TEXT)
        assert batch.is_unanswerable_B[row] == (example.kind == "unanswerable")
        assert np.array_equal(batch.keys_MP[row].numpy(), maker.facts.keys_MP[example.kb_rows].astype(np.float32))
        assert np.array_equal(batch.values_MP[row].numpy(), maker.facts.values_MP[example.kb_rows].astype(np.float32))
        mine = batch.wanted_row_W == row
        assert batch.wanted_at_W[mine].tolist() == example.wanted_at.tolist()
        assert batch.wanted_place_W[mine].tolist() == example.wanted_places.tolist()
        for at, part in zip(batch.wanted_at_W[mine].tolist(), batch.wanted_part_W[mine].tolist(), strict=True):
            assert part == pytest.approx(1 / (example.wanted_at == at).sum())
    assert not batch.is_shared
    assert batch.num_facts_B == [len(example.kb_rows) for example in examples]


def test_one_knowledge_base_is_one_memory():
    maker = make(kb_per="batch", kb_size=(16, 30))
    (batch,) = next(batches(maker, 0, 1))
    assert batch.is_shared
    assert len(batch.keys_MP) == 1
    assert batch.num_facts_B == [len(maker.example(0).kb_rows)] * 16


@pytest.mark.parametrize("kb_per", ["example", "batch"])
def test_the_examples_of_a_step_do_not_depend_on_how_many_do_it(kb_per):
    maker = make(kb_per=kb_per)
    for world, accumulation in ((1, 1), (2, 1), (1, 4), (4, 2)):
        parts = [part for rank in range(world) for part in next(batches(maker, 5, 6, Share(rank, world, accumulation)))]
        assert len(parts) == world * accumulation
        assert sorted(number for part in parts for number in part.numbers) == list(range(80, 96))
        for part in parts:
            alone = TrainingBatch.collate(maker.examples(part.numbers), maker)
            same_batches(part, alone)
        for rank in range(world):
            mine = parts[rank * accumulation : (rank + 1) * accumulation]
            lengths = [int(length) for part in mine for length in part.attention_mask_BT.sum(1)]
            assert lengths == sorted(lengths)  # so that rows of about one length are padded together


def test_a_training_goes_on_from_any_step():
    share = Share(1, 2, 2)
    whole = list(batches(make(), 0, 4, share))
    rest = list(batches(make(), 2, 4, share))
    for first, second in zip(whole[2:], rest, strict=True):
        for pair in zip(first, second, strict=True):
            same_batches(*pair)


def test_examples_survive_a_table():
    maker = make()
    examples = [maker.example(number) for number in range(20)]
    table = examples_table(examples)
    assert table.schema == SCHEMA
    # A part of a table looks into the middle of its lists.
    again = examples_of(pa.concat_tables([table.slice(0, 7), table.slice(7)]).slice(3, 12))
    for first, second in zip(examples[3:15], again, strict=True):
        assert (first.number, first.kind, first.answer_start) == (second.number, second.kind, second.answer_start)
        for name in ("input_ids", "kb_rows", "wanted_at", "wanted_places"):
            assert np.array_equal(getattr(first, name), getattr(second, name))
    assert examples_of(table.slice(0, 0)) == []


def test_a_copy_without_embeddings_collates_nothing():
    import pickle

    maker = make()
    sent = pickle.loads(pickle.dumps(maker))
    with pytest.raises(InputError, match="no embeddings"):
        TrainingBatch.collate([sent.example(0)], sent)
    assert len(pickle.dumps(maker)) < len(pickle.dumps(maker.facts)) + 2_000_000


def test_ray_makes_the_same_batches_in_the_same_order(ray_session):
    maker = make(batch_size=8)
    share = Share(1, 2, 2)
    last = 2 * EXAMPLES_PER_TASK // 4 + 5  # several tasks, the last one shorter
    rows = dataset(maker, 3, last, share)
    streamed = list(stream_batches(rows, maker, share))
    here = list(batches(maker, 3, last, share))
    assert len(streamed) == last - 3
    for first, second in zip(streamed, here, strict=True):
        for pair in zip(first, second, strict=True):
            same_batches(*pair)
