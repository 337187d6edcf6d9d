"""How a worker tells the driver what it did, or which of our errors it met.

Ray turns an exception of a worker into a traceback and retries an actor that fails to start, so an error that
is meant for the user would be repeated, wrapped and lost. Errors raised on purpose travel as data instead.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kblam_ray.errors import KblamError

if TYPE_CHECKING:
    from ray.data import Dataset

_SCHEMA = pa.schema([("report", pa.binary())])


def reporting(work: Callable[..., Any]) -> Callable[..., pa.Table]:
    """Make a function that returns one report (None: nothing to say) fit for `Dataset.map_batches`."""

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> pa.Table:
        try:
            report = work(*args, **kwargs)
        except KblamError as error:
            report = error
        return pa.table([[] if report is None else [pickle.dumps(report)]], schema=_SCHEMA)

    return run


def reports(dataset: Dataset) -> Iterator[Any]:
    """Run the dataset and yield its workers' reports as they come.

    Raises:
        KblamError: the first one that a worker met.
    """
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for data in batch["report"].to_pylist():
            report = pickle.loads(data)
            if isinstance(report, KblamError):
                raise report
            yield report
