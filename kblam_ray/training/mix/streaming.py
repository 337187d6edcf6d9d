"""A worker's examples as a Ray dataset: made on Ray's workers ahead of time, in the order of training, from any step.

Each trainer makes the dataset of its own share. A shard of one dataset for all trainers would deal blocks to whoever
asks first and begin anew at each restart; here the order is that of the numbers, and a dataset that begins at step s
makes nothing of what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kblam_ray.training.mix.examples import Example, ExampleMaker
from kblam_ray.training.mix.proportions import Share

if TYPE_CHECKING:
    from ray.data import Dataset

EXAMPLES_PER_TASK = 64
"""Fewest examples that one task makes: a task costs some ten milliseconds, an example one or two."""

MOST_TASKS = 4_000
"""Of one dataset; a longer training has longer tasks."""

_NUMBERS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("kind", pa.string()),
        ("answer_start", pa.int32()),
        ("input_ids", _NUMBERS),
        ("kb_rows", _NUMBERS),
        ("wanted_at", _NUMBERS),
        ("wanted_places", _NUMBERS),
    ]
)


def dataset(
    maker: ExampleMaker,
    first_step: int,
    last_step: int,
    share: Share | None = None,
    *,
    num_workers: int = 1,
    num_cpus: float = 0.0,
) -> Dataset:
    """The examples of a worker's steps `first_step` to `last_step - 1`, one row each.

    They come step by step, and in a step as `ExampleMaker.share` orders them: micro-batch by micro-batch. Ray must be
    running. The maker goes to the object store once, without its embeddings.

    Args:
        num_workers: tasks at work at a time.
        num_cpus: logical CPUs that each task asks for. By default none, so that they start though the trainers hold all
            of them: tasks that wait for CPUs which nobody gives back would wait forever.

    Raises:
        InputError: the batch cannot be dealt out evenly.
    """
    import ray

    share = share or Share()
    batch_size = maker.settings.batch_size
    per_step = len(share.numbers(first_step, batch_size))
    steps = max(1, -(-EXAMPLES_PER_TASK // per_step), -(-(last_step - first_step) // MOST_TASKS))
    tasks = [{"first": first, "last": min(first + steps, last_step)} for first in range(first_step, last_step, steps)]
    made = ray.data.from_items(tasks, override_num_blocks=max(1, len(tasks))).map_batches(
        _MakeExamples(ray.put(maker), share),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        concurrency=num_workers,
    )
    made.context.execution_options.preserve_order = True
    return made


def stream_examples(rows: Dataset, size: int, *, prefetch: int = 4) -> Iterator[list[Example]]:
    """The examples of a dataset in its order, `size` at a time.

    Args:
        prefetch: how many such batches are fetched ahead.
    """
    batches = rows.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=prefetch)
    for table in batches:
        yield examples_of(table)


def examples_table(examples: Sequence[Example]) -> pa.Table:
    """Examples as rows of `SCHEMA`."""
    columns = {name: [getattr(example, name) for example in examples] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def examples_of(table: pa.Table) -> list[Example]:
    """Rows of `SCHEMA` as examples."""
    columns: dict[str, Any] = {}
    for field in SCHEMA:
        column = table[field.name].combine_chunks()
        columns[field.name] = _split(column) if field.type == _NUMBERS else column.to_pylist()
    return [Example(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _split(column: pa.ListArray) -> list[np.ndarray]:
    # Not `column.values`: of a slice, that is all there was before it was cut.
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum([0 if length is None else length for length in column.value_lengths().to_pylist()])
    return np.split(numbers, ends[:-1]) if len(ends) else []


class _MakeExamples:
    """Makes the examples of a range of steps; sent to Ray's workers, where the maker is fetched once per process."""

    def __init__(self, maker: Any, share: Share) -> None:
        self._maker, self._share = maker, share

    def __call__(self, tasks: pa.Table) -> pa.Table:
        maker = _fetched(self._maker)
        steps = (step for task in tasks.to_pylist() for step in range(task["first"], task["last"]))
        return examples_table([example for step in steps for example in maker.share(step, self._share)])


@lru_cache(maxsize=2)
def _fetched(reference: Any) -> ExampleMaker:
    import ray

    maker: ExampleMaker = ray.get(reference)
    return maker
