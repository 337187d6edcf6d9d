"""A small logistic regression, and the threshold on its probability with the best F1.

Shape legend: n examples, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kblam_ray.errors import InputError

BIAS = "bias"
PENALTY = 1e-3
"""Of squared weights of standardised features, per example."""


@dataclass(frozen=True)
class RefusalFit:
    """Weights by feature, `bias` among them, of the probability that there is an answer, and when to refuse.

    Attributes:
        weights: of the features as they are.
        threshold: below it: refuse.
        f1: of refusing, by group, at the threshold, each example judged by weights fitted without it.
    """

    weights: dict[str, float]
    threshold: float
    f1: dict[int, float]


def fit_refusal(
    examples: Sequence[Mapping[str, float]], has_answer: Sequence[bool], groups: Sequence[int], *, seed: int = 0
) -> RefusalFit:
    """Fit the decision to examples with and without an answer.

    Args:
        examples: features by name, the same names in each.
        groups: of each example, for example the size of its knowledge base: F1 is averaged over groups.

    Raises:
        InputError: different names, numbers that are not finite, or examples of one kind only.
    """
    names = sorted(examples[0]) if examples else []
    for example in examples:
        if sorted(example) != names or not np.isfinite(list(example.values())).all():
            raise InputError(
                f"features {sorted(example)} beside {names}, or not finite",
                where="refusal decision",
                help="give examples of one model with the same settings",
            )
    answer_n, group_n = np.asarray(has_answer, bool), np.asarray(groups)
    if answer_n.all() or not answer_n.any():
        raise InputError(
            "only questions with or only such without an answer",
            where="refusal decision",
            help="give some of both",
        )
    features_nF = np.array([[example[name] for name in names] for example in examples], np.float64)
    mean_F, spread_F = features_nF.mean(0), features_nF.std(0)
    # What never differs tells nothing.
    spread_F = np.where(spread_F > 1e-9, spread_F, np.inf)
    scaled_nF = (features_nF - mean_F) / spread_F
    fold_n = np.random.default_rng(seed).permutation(len(answer_n)) % 5
    judged_n = np.empty(len(answer_n))
    for fold in range(5):
        weight_F = logistic_regression(scaled_nF[fold_n != fold], answer_n[fold_n != fold])
        judged_n[fold_n == fold] = probability(scaled_nF[fold_n == fold], weight_F)
    threshold, f1 = best_threshold(judged_n, answer_n, group_n)
    weight_F = logistic_regression(scaled_nF, answer_n)
    weights = dict(zip(names, (weight_F[:-1] / spread_F).tolist(), strict=True))
    bias = float(weight_F[-1] - (weight_F[:-1] * mean_F / spread_F).sum())
    return RefusalFit({**weights, BIAS: bias}, threshold, f1)


def logistic_regression(features_nF: np.ndarray, is_true_n: np.ndarray) -> np.ndarray:
    """Weights [F+1], the bias last, of the penalised maximum likelihood, by Newton's method with halved steps."""
    rows_nF = np.concatenate([features_nF, np.ones((len(features_nF), 1))], 1)
    penalty_F = np.full(rows_nF.shape[1], PENALTY * len(rows_nF))
    penalty_F[-1] = 1e-6 * len(rows_nF)

    def loss(weight_F: np.ndarray) -> float:
        logit_n = rows_nF @ weight_F
        return float(np.logaddexp(0, np.where(is_true_n, -logit_n, logit_n)).sum() + penalty_F @ weight_F**2 / 2)

    weight_F = np.zeros(rows_nF.shape[1])
    known = loss(weight_F)
    for _ in range(100):
        probability_n = probability(features_nF, weight_F)
        gradient_F = rows_nF.T @ (probability_n - is_true_n) + penalty_F * weight_F
        curvature_FF = (rows_nF * (probability_n * (1 - probability_n))[:, None]).T @ rows_nF + np.diag(penalty_F)
        step_F = np.linalg.solve(curvature_FF, gradient_F)
        while (new := loss(weight_F - step_F)) > known and np.abs(step_F).max() > 1e-12:
            step_F /= 2
        weight_F = weight_F - step_F
        if known - new < 1e-10 * max(1.0, known):
            break
        known = new
    return weight_F


def probability(features_nF: np.ndarray, weight_F: np.ndarray) -> np.ndarray:
    """Of each example, [n]."""
    logit_n = np.clip(features_nF @ weight_F[:-1] + weight_F[-1], -500, 500)
    return 1 / (1 + np.exp(-logit_n))


def best_threshold(
    statistic_n: np.ndarray, has_answer_n: np.ndarray, group_n: np.ndarray
) -> tuple[float, dict[int, float]]:
    """The threshold with the best F1 of refusing below it, mean over the groups, and F1 by group.

    It lies in the middle between two neighbouring values of the statistic.
    """
    values = np.unique(statistic_n)
    cuts = [values[0] / 2, *((values[:-1] + values[1:]) / 2), (values[-1] + 1) / 2]
    best: tuple[float, float, dict[int, float]] | None = None
    for cut in cuts:
        by_group = {
            int(group): f1_of_refusing(statistic_n[group_n == group] < cut, ~has_answer_n[group_n == group])
            for group in np.unique(group_n)
        }
        mean = float(np.mean(list(by_group.values())))
        if best is None or mean > best[0]:
            best = mean, float(cut), by_group
    assert best is not None
    return best[1], best[2]


def f1_of_refusing(refused_n: np.ndarray, should_n: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN); 0 where nothing is refused rightly."""
    right = int((refused_n & should_n).sum())
    wrong = int((refused_n != should_n).sum())
    return 2 * right / (2 * right + wrong) if right else 0.0
