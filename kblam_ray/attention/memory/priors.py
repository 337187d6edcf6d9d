"""Priors over the facts of a memory: from one vector in the memory's order to one per view, and through selections.

Shape legend: M facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kblam_ray.attention.memory.chunk import ChunkView
from kblam_ray.errors import InputError

HIDDEN = float("-inf")


def split_prior(given: Any, views: Sequence[ChunkView], device: torch.device) -> tuple[torch.Tensor, ...]:
    """A prior [M] over the live facts of all views as float32 [num_rows] for each, -inf on hidden rows.

    Raises:
        InputError: not floats, another length, NaN, +inf.
    """
    num_facts = sum(view.num_live for view in views)
    is_float = (isinstance(given, np.ndarray) and given.dtype.kind == "f") or (
        isinstance(given, torch.Tensor) and given.is_floating_point()
    )
    if not is_float or given.ndim != 1 or len(given) != num_facts:
        shape = f"{given.dtype} {list(given.shape)}" if hasattr(given, "shape") else type(given).__name__
        raise InputError(
            f"a prior is one float for each of the {num_facts} facts",
            where=f"got {shape}",
            help="give an array or a tensor in the order of memory.fact_ids",
        )
    with torch.inference_mode(False):
        # Copied even where it has the type: the caller may go on writing to its vector.
        if isinstance(given, np.ndarray):
            with np.errstate(over="ignore"):
                prior_M = torch.from_numpy(given.astype(np.float32)).to(device)
        else:
            prior_M = given.to(device=device, dtype=torch.float32, copy=True)
        bad_M = prior_M.isnan() | prior_M.isposinf()
        if bad_M.any():
            row = int(bad_M.nonzero()[0])
            fact_id = np.concatenate([view.fact_ids for view in views])[row]
            raise InputError(
                f"the prior of a fact is {given[row]}",
                where=f"position {row}, fact {fact_id}",
                help="give finite numbers that float32 holds, or -inf to hide a fact",
            )
        parts = prior_M.split([view.num_live for view in views])
        return tuple(_spread(part_M, view) for part_M, view in zip(parts, views, strict=True))


def _spread(live_M: torch.Tensor, view: ChunkView) -> torch.Tensor:
    if view.hidden is None:
        return live_M
    rows_M = live_M.new_full((view.num_rows,), HIDDEN)
    rows_M[torch.tensor(view.live_positions(), device=live_M.device)] = live_M
    return rows_M


def selected_prior(prior_M: torch.Tensor, view: ChunkView, selected: ChunkView) -> torch.Tensor:
    """The prior of a view's rows as that of a part of the view, `view.only(...)`."""
    if selected is view:
        return prior_M
    with torch.inference_mode(False):
        if selected.positions is not None:
            at = selected.positions
            return prior_M[at if view.positions is None else torch.searchsorted(view.positions, at)]
        assert selected.hidden_rows is not None
        return prior_M.index_fill(0, selected.hidden_rows, HIDDEN)
