"""How much each head listens to the facts at each token, by regression on the frozen model's own softmax.

Shape legend: X hidden size, N query heads, M facts.

A head gives the facts half of its attention where its gate is `text log-sum-exp - log-sum-exp of the facts' scores`.
The first is regressed on the hidden state; of the second the mean per part of an answer is taken. On top comes a
margin: plus before a value's words, minus elsewhere, by the regression of "a value's word comes next" on the hidden
state. Two numbers, the margin and a shift, are left to be chosen by the loss of held-out answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kblam_ray.training.closed_form.discriminant import solve_ridge
from kblam_ray.training.closed_form.positions import COPY, OTHER, PARTS, PROMPT, VALUE
from kblam_ray.training.closed_form.statistics import Statistics

MARGINS = (0.0, 4.0, 8.0, 12.0, 16.0, 24.0)
SHIFTS = (-12.0, -8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)
GATE_RIDGE = 1e-2


@dataclass(frozen=True)
class GateFit:
    """The two regressions of one layer, each with a column for the appended 1; float64.

    Attributes:
        balance_NX: [N, X+1], gives a head's gate of equal shares.
        is_value_X: [X+1], about 1 before a value's word, 0 elsewhere.
        has_one: the last column is not zero.
    """

    balance_NX: torch.Tensor
    is_value_X: torch.Tensor
    has_one: bool

    def gate(self, margin: float, shift: float) -> torch.Tensor:
        """The gate's weight [N, X+1]: the margin is added before a value's word and taken off elsewhere."""
        gate_NX = self.balance_NX + 2 * margin * self.is_value_X
        if self.has_one:
            gate_NX[:, -1] += shift - margin
        return gate_NX


def fit_gate(
    statistics: Statistics, layer: int, facts_log_sum_exp: Mapping[int, float], device: torch.device, *, has_one: bool
) -> GateFit:
    """The regressions of one layer; each part of the answers weighs the same, however many tokens it has.

    Args:
        facts_log_sum_exp: by part, what the facts' log-sum-exp is expected to be.
        has_one: gates have a bias.
    """
    hidden_XX = balance_XN = is_value_X1 = None
    seen = [part for part in range(len(PARTS)) if statistics.get("hidden", layer, part) is not None]
    for part in seen:
        product_XX, lse_XN = statistics.get("hidden", layer, part), statistics.get("log_sum_exp", layer, part)
        assert product_XX is not None
        assert lse_XN is not None
        product_XX, lse_XN = product_XX.to(device), lse_XN.to(device)
        count = product_XX[-1, -1]
        wanted_XN = (lse_XN - product_XX[:, -1:] * facts_log_sum_exp[part]) / count
        value_X1 = product_XX[:, -1:] / count if part == VALUE else torch.zeros_like(product_XX[:, -1:])
        hidden_XX = product_XX / count if hidden_XX is None else hidden_XX.add_(product_XX / count)
        balance_XN = wanted_XN if balance_XN is None else balance_XN.add_(wanted_XN)
        is_value_X1 = value_X1 if is_value_X1 is None else is_value_X1.add_(value_X1)
    assert hidden_XX is not None
    assert balance_XN is not None
    assert is_value_X1 is not None
    cross_XA = torch.cat([balance_XN, is_value_X1], 1)
    if not has_one:
        hidden_XX, cross_XA = hidden_XX[:-1, :-1], cross_XA[:-1]
    weight_XA = solve_ridge(hidden_XX, cross_XA, GATE_RIDGE, has_one=has_one)
    if not has_one:
        weight_XA = torch.cat([weight_XA, weight_XA.new_zeros(1, weight_XA.shape[1])])
    return GateFit(weight_XA[:, :-1].T.contiguous(), weight_XA[:, -1].contiguous(), has_one)


def expected_log_sum_exp(
    scores_of_part: Mapping[int, torch.Tensor], shift: float, default_part: int = PROMPT
) -> dict[int, float]:
    """By part the mean log-sum-exp of the facts' scores [n, M], plus the shift `log C - log M` where there is one."""
    means = {
        part: torch.logsumexp(scores_nM, 1).mean().item() + shift
        for part, scores_nM in scores_of_part.items()
        if len(scores_nM)
    }
    known = means.get(default_part, next(iter(means.values())))
    return {part: means.get(part, known) for part in (OTHER, PROMPT, COPY, VALUE)}


def search(
    loss: Callable[[dict[str, float]], float], grid: Mapping[str, Sequence[float]], start: dict[str, float]
) -> tuple[dict[str, float], float]:
    """Coordinate search: each setting in turn takes the value with the least loss, the others fixed; twice.

    Returns:
        The best settings and their loss.
    """
    known: dict[tuple, float] = {}

    def of(settings: dict[str, float]) -> float:
        key = tuple(sorted(settings.items()))
        if key not in known:
            known[key] = loss(settings)
        return known[key]

    best = dict(start)
    for _ in range(2):
        before = dict(best)
        for name, values in grid.items():
            tried = [{**best, name: value} for value in dict.fromkeys((best[name], *values))]
            best = min(tried, key=of)
        if best == before:
            break
    return best, of(best)
