"""From statistics to a query: which linear map of a hidden state ranks the asked fact's key first.

Shape legend: n rows, X hidden size, P encoder dim, M facts.

Ridge regression predicts the asked key, `ê = B h`, with `B = (H^T H + ridge)^-1 H^T E`. Taken as normal around it with
covariance R, the log-likelihood of fact m's key is `ê^T R^-1 e_m - e_m^T R^-1 e_m / 2 + terms that all facts share`
(linear discriminant analysis; Fisher 1936; Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning",
section 4.3). Its first term is what a shared-score adapter computes; the second belongs to the fact alone and is left
out: with MiniLM's keys, all of length 1, facts were found more often without it than with it or its best linear
stand-in. R is the covariance of the residuals, shrunk towards that of all keys and towards a multiple of the identity;
with the identity alone the score is the plain inner product of prediction and key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kblam_ray.errors import AdapterError
from kblam_ray.training.closed_form.statistics import Statistics

TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(-12, 11))
"""Factors on the scores of which the one with the least cross-entropy is taken."""


def solve_ridge(square_AA: torch.Tensor, cross_AB: torch.Tensor, ridge: float, *, has_one: bool = True) -> torch.Tensor:
    """`(square + ridge x mean variance)^-1 cross`, [A, B]; the row of the appended 1 is not penalised.

    Args:
        square_AA, cross_AB: sums of products, float64.
        ridge: as a part of the mean of the diagonal.
        has_one: the last row is the appended 1.

    Raises:
        AdapterError: the sums cannot be solved: they are not finite, or no row was seen.
    """
    num = len(square_AA) - has_one
    penalty = torch.full((len(square_AA),), ridge, dtype=square_AA.dtype, device=square_AA.device)
    penalty = penalty * square_AA.diagonal()[:num].mean().clamp_min(1e-12)
    if has_one:
        # Not 0: without any row the sums would be singular.
        penalty[-1] = 1e-9 * square_AA[-1, -1].clamp_min(1e-12)
    factor, failed = torch.linalg.cholesky_ex(square_AA + torch.diag(penalty))
    if failed or not (torch.isfinite(factor).all() and torch.isfinite(cross_AB).all()):
        raise AdapterError(
            "the regressions cannot be solved: the hidden states' products are not finite or of too low a rank",
            where="closed-form fit",
            help="load the base model in a wider dtype, or raise the ridges",
        )
    return torch.cholesky_solve(cross_AB, factor)


@dataclass(frozen=True)
class Candidate:
    """A choice of the free parameters, and how well it does on held-out questions.

    Attributes:
        cross_entropy: of the asked fact, in nats: mean over prompt tokens, plus half of that over value tokens.
        top_1: share of prompt tokens whose asked fact is strictly first.
    """

    layer: int
    prompt_share: float
    ridge: float
    shrinkage: float
    key_share: float
    temperature: float = 1.0
    cross_entropy: float = math.inf
    top_1: float = 0.0

    def described(self) -> dict[str, float | None]:
        """As JSON has it, for a report; a shrinkage of None is the identity alone."""
        return {
            "top_1": round(self.top_1, 4),
            "cross_entropy": round(self.cross_entropy, 4),
            "prompt_share": self.prompt_share,
            "ridge": self.ridge,
            "shrinkage": None if math.isinf(self.shrinkage) else self.shrinkage,
            "key_share": self.key_share,
        }


@dataclass(frozen=True)
class Query:
    """The query of one layer: `u = weight [h, 1]`, scored with centred keys; temperature included.

    Attributes:
        weight_PX: [P, X+1], the last column a bias; float64.
    """

    chosen: Candidate
    weight_PX: torch.Tensor


@dataclass(frozen=True)
class HeldOutTask:
    """Held-out rows of one layer with a knowledge base to find their facts in.

    Attributes:
        keys_MP: centred keys, float64.
        hidden: by part, rows with a 1 appended, float64 [n, X+1].
        wanted: by part, the place of each row's fact, int64 [n].
        main, second: the parts that count, and that count half.
    """

    keys_MP: torch.Tensor
    hidden: Mapping[int, torch.Tensor]
    wanted: Mapping[int, torch.Tensor]
    main: int
    second: int

    def scores(self, weight_PX: torch.Tensor, part: int) -> torch.Tensor:
        return (self.hidden[part] @ weight_PX.T) @ self.keys_MP.T


def part_weights(statistics: Statistics, prompt_share: float, main: int, others: Sequence[int]) -> dict[int, float]:
    """Weights of parts per token: the main part has `prompt_share` of all, the others the rest in equal shares."""
    counts = {part: statistics.count(part) for part in (main, *others)}
    seen = [part for part in others if counts[part]]
    weights = {part: (1 - prompt_share) / len(seen) / counts[part] for part in seen}
    if counts[main]:
        weights[main] = (prompt_share if seen else 1.0) / counts[main]
    return weights


class LayerFit:
    """Fits queries of one layer for given weights of the parts."""

    def __init__(
        self, statistics: Statistics, layer: int, weights: Mapping[int, float], device: torch.device, *, has_one: bool
    ) -> None:
        self._has_one = has_one
        hidden_XX = statistics.weighted("hidden", layer, weights).to(device)
        keys_XP = statistics.weighted("keys", layer, weights).to(device)
        square_PP = statistics.weighted("key_square", None, weights).to(device)
        if not has_one:
            hidden_XX, keys_XP = hidden_XX[:-1, :-1], keys_XP[:-1]
        self._hidden_XX, self._keys_XP = hidden_XX, keys_XP
        self._square_PP = square_PP[:-1, :-1]

    def predicted(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """B^T [P, X+1] (a zero bias where there is none), and the covariance of the residuals [P, P]."""
        weight_XP = solve_ridge(self._hidden_XX, self._keys_XP, ridge, has_one=self._has_one)
        cross_PP = weight_XP.T @ self._keys_XP
        residual_PP = self._square_PP - cross_PP - cross_PP.T + weight_XP.T @ self._hidden_XX @ weight_XP
        if not self._has_one:
            weight_XP = torch.cat([weight_XP, weight_XP.new_zeros(1, weight_XP.shape[1])])
        return weight_XP.T, (residual_PP + residual_PP.T) / 2


def metric(
    residual_PP: torch.Tensor, key_covariance_PP: torch.Tensor, shrinkage: float, key_share: float
) -> torch.Tensor:
    """The inverse of the shrunk residual covariance [P, P], scaled to the mean eigenvalue 1.

    Args:
        shrinkage: the multiple of the identity, as a part of the mean variance; infinite: the identity alone.
        key_share: how far the residuals' covariance is moved to that of all keys, from 0 to 1.
    """
    covariance_PP = torch.lerp(residual_PP, key_covariance_PP, key_share)
    if math.isinf(shrinkage):
        return torch.eye(len(residual_PP), dtype=residual_PP.dtype, device=residual_PP.device)
    mean = covariance_PP.diagonal().mean().clamp_min(1e-12)
    # Clamped: of fewer rows than numbers the smallest eigenvalues are rounding.
    values_P, vectors_PP = torch.linalg.eigh(covariance_PP)
    inverse_P = 1 / (values_P.clamp_min(0) + shrinkage * mean)
    return (vectors_PP * (inverse_P / inverse_P.mean())) @ vectors_PP.T


def best_query(
    statistics: Statistics,
    layer: int,
    task: HeldOutTask,
    key_covariance_PP: torch.Tensor,
    *,
    prompt_shares: Sequence[float],
    ridges: Sequence[float],
    shrinkages: Sequence[float],
    key_shares: Sequence[float],
    others: Sequence[int],
    with_bias: bool = True,
) -> Query:
    """The query of a layer that does best on held-out questions.

    Each choice in turn takes the value with the least cross-entropy, the others fixed: the ridge first, from the middle
    of all; the weight of the prompt token last. The plain inner product is always tried.

    Args:
        key_covariance_PP: of all keys.
        others: the parts besides the main one.
        with_bias: False: the query has none, as kind "paper" wants it.
    """
    fits: dict[float, LayerFit] = {}
    known: dict[tuple, Query] = {}
    predicted: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def made(share: float, ridge: float, shrinkage: float, key_share: float) -> Query:
        key = (share, ridge, shrinkage, key_share)
        if key not in known:
            if share not in fits:
                weights = part_weights(statistics, share, task.main, others)
                fits[share] = LayerFit(statistics, layer, weights, task.keys_MP.device, has_one=with_bias)
            if (share, ridge) not in predicted:
                predicted[share, ridge] = fits[share].predicted(ridge)
            predicted_PX, residual_PP = predicted[share, ridge]
            weight_PX = metric(residual_PP, key_covariance_PP, shrinkage, key_share) @ predicted_PX
            known[key] = judged(Query(Candidate(layer, *key), weight_PX), task)
        return known[key]

    def better(queries: Sequence[Query]) -> Query:
        return min(queries, key=lambda query: query.chosen.cross_entropy)

    share, shrinkage = _middle(prompt_shares), _middle(shrinkages)
    key_share = key_shares[0]
    best = better([made(share, ridge, shrinkage, key_share) for ridge in ridges])
    ridge = best.chosen.ridge
    best = better([made(share, ridge, value, key_share) for value in (*shrinkages, math.inf)])
    shrinkage = best.chosen.shrinkage
    if not math.isinf(shrinkage):
        best = better([made(share, ridge, shrinkage, value) for value in key_shares])
    return better([best, *(made(value, ridge, shrinkage, best.chosen.key_share) for value in prompt_shares)])


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def judged(query: Query, task: HeldOutTask) -> Query:
    """The query at its best temperature, with its figures on held-out questions."""
    scores = {part: task.scores(query.weight_PX, part) for part in (task.main, task.second) if len(task.hidden[part])}
    spread = torch.cat([one.flatten() for one in scores.values()]).std().clamp_min(1e-12)
    losses = []
    for temperature in TEMPERATURES:
        loss = 0.0
        for part, scores_nM in scores.items():
            logits_nM = scores_nM * (temperature / spread)
            weight = 1.0 if part == task.main else 0.5
            loss += weight * torch.nn.functional.cross_entropy(logits_nM, task.wanted[part]).item()
        losses.append(loss)
    at = min(range(len(losses)), key=losses.__getitem__)
    factor = (TEMPERATURES[at] / spread).item()
    main = task.main if task.main in scores else task.second
    top_1 = top_1_share(scores[main], task.wanted[main])
    chosen = replace(query.chosen, temperature=factor, cross_entropy=losses[at], top_1=top_1)
    return Query(chosen, query.weight_PX * factor)


def top_1_share(scores_nM: torch.Tensor, wanted_n: torch.Tensor) -> float:
    """The share of rows whose wanted fact is strictly first."""
    wanted_n1 = scores_nM.gather(1, wanted_n[:, None])
    return (scores_nM >= wanted_n1).sum(1).eq(1).double().mean().item()
