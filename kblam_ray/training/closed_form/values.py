"""What a head reads of a fact: by regression from a value's embedding to the model's own value vectors of its words.

Shape legend: P encoder dim, N query heads, K key/value heads, H head dim, V = K*H.

The model's value vectors stand in its answers' passes, where the value is written; they are what a head that attends to
the value's words reads. Two targets, the mean over a value's tokens and its first token's vector: the first word is
what cannot be guessed, the mean tells what it is about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kblam_ray.training.closed_form.collect import HeldOutRows
from kblam_ray.training.closed_form.discriminant import solve_ridge
from kblam_ray.training.closed_form.statistics import Statistics, with_one

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class ValueFit:
    """Regressions of one layer, float64.

    Attributes:
        mean_VP, first_VP: [V, P+1], to the mean over a value's tokens and to its first token.
        explained: share of the variance explained on held-out values, of either.
    """

    mean_VP: torch.Tensor
    first_VP: torch.Tensor
    explained: tuple[float, float]

    def weight(self, first_share: float, num_heads: int, head_dim: int) -> torch.Tensor:
        """[N*H, P+1] of a mixture of the two; query heads that share a key/value head read the same."""
        mixed_VP = torch.lerp(self.mean_VP, self.first_VP, first_share)
        mixed_KHP = mixed_VP.unflatten(0, (-1, head_dim))
        return mixed_KHP.repeat_interleave(num_heads // len(mixed_KHP), 0).flatten(0, 1)


def fit_values(
    statistics: Statistics,
    layer: int,
    rows: HeldOutRows,
    held_out_values_MP: np.ndarray,
    device: torch.device,
) -> ValueFit:
    """The regressions of one layer, each at the ridge that explains most on held-out values."""
    square_PP = _sum(statistics, "value_square").to(device)
    embeddings_nP = torch.from_numpy(np.asarray(held_out_values_MP[rows.stated], np.float64)).to(device)
    embeddings_nP = with_one(embeddings_nP)
    found = []
    for place, name in enumerate(("values", "first_values")):
        cross_PV = _sum(statistics, name, layer).to(device)
        target_nV = rows.values[layer][place].to(device)
        variance = (target_nV - target_nV.mean(0)).square().sum().clamp_min(1e-12)
        best: tuple[float, torch.Tensor] | None = None
        for ridge in RIDGES:
            weight_PV = solve_ridge(square_PP, cross_PV, ridge)
            error = (embeddings_nP @ weight_PV - target_nV).square().sum()
            explained = (1 - error / variance).item()
            if best is None or explained > best[0]:
                best = explained, weight_PV
        assert best is not None
        found.append(best)
    (mean_share, mean_PV), (first_share, first_PV) = found
    return ValueFit(mean_PV.T, first_PV.T, (mean_share, first_share))


def _sum(statistics: Statistics, *name: object) -> torch.Tensor:
    found = statistics.get(*name)
    assert found is not None, name
    return found
