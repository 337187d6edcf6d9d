"""Whether a statistic means what it says, and which threshold on it refuses best: bins, curves, errors.

The statistic says how surely the knowledge base answers a question; one below the threshold is refused. Where it is a
probability (the adapter has `refusal_weights`) it can be held to the share of questions that are answerable. A right
refusal is a positive, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kblam_ray.evaluation.intervals import Estimate, bootstrap, mean, wilson

NUM_BINS = 10

MOST_POINTS = 101
"""Points of a curve; of more distinct statistics some are left out, evenly."""


def calibration(
    statistics: Sequence[float],
    should_answer: Sequence[bool],
    *,
    threshold: float | None = None,
    is_probability: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """How a statistic tells answerable questions from others, as plain lists and numbers for JSON.

    `error` is the expected calibration error (M. P. Naeini et al., AAAI 2015; C. Guo et al., arXiv 1706.04599): the
    mean over questions of |mean statistic - share answerable| of the question's bin, in ten bins of equal width.
    Resampling adds to it, so its interval is widened to its value where that lies outside. `brier` is the mean of
    (statistic - answerable)^2 (G. W. Brier, Monthly Weather Review 78, 1950).

    Args:
        statistics: per question, finite.
        should_answer: per question, whether the facts answer it; both sorts occur.
        threshold: the one that is used.
        is_probability: the statistic is one of 0 to 1.
        seed: of the bootstrap.

    Returns:
        `threshold, is_probability`; with a probability `error, brier` as figures and `bins`, those that have questions:
        `low, high` (the upper end belongs to the last bin only), `mean_statistic`, `share_answerable` a figure;
        `thresholds`: `threshold, precision, recall, f1` of refusing below it, precision None where nothing is refused;
        `best`: the `threshold` with the largest `f1`, of equal ones the lowest; `receiver`: `false_positive,
        true_positive`, the shares of answerable and of other questions refused, from (0, 0) to (1, 1).
    """
    values, answerable = np.asarray(statistics, np.float64), np.asarray(should_answer, bool)
    found: dict[str, Any] = {"threshold": threshold, "is_probability": is_probability}
    if is_probability:
        found["error"] = calibration_error(values, answerable, seed=seed).to_json()
        found["brier"] = mean((values - answerable) ** 2, seed=seed).to_json()
        found["bins"] = _bins(values, answerable)
    cuts, refused, rightly = _cuts(values, answerable)
    num_wrong = int((~answerable).sum())
    f1 = 2 * rightly / (refused + num_wrong)
    best = int(f1.argmax())
    found["thresholds"] = [
        {
            "threshold": float(cuts[at]),
            "precision": float(rightly[at] / refused[at]) if refused[at] else None,
            "recall": float(rightly[at] / num_wrong),
            "f1": float(f1[at]),
        }
        for at in _thinned(len(cuts), best)
    ]
    found["best"] = {"threshold": float(cuts[best]), "f1": float(f1[best])}
    found["receiver"] = [
        {
            "false_positive": float((refused[at] - rightly[at]) / (len(values) - num_wrong)),
            "true_positive": float(rightly[at] / num_wrong),
        }
        for at in _thinned(len(cuts), best)
    ]
    return found


def calibration_error(statistics: np.ndarray, should_answer: np.ndarray, *, seed: int = 0) -> Estimate:
    """The expected calibration error of probabilities, see `calibration`.

    Args:
        statistics: float [questions], 0 to 1.
        should_answer: bool [questions].
    """
    places, gaps = _places(statistics), np.asarray(statistics - should_answer, np.float64)

    def error(samples: np.ndarray) -> np.ndarray:
        at = places[samples] + NUM_BINS * np.arange(len(samples))[:, None]
        sums = np.bincount(at.ravel(), gaps[samples].ravel(), minlength=len(samples) * NUM_BINS)
        return np.abs(sums.reshape(-1, NUM_BINS)).sum(1) / samples.shape[1]

    found = bootstrap(error, len(gaps), seed=seed)
    if found.value is None or found.low is None or found.high is None:
        return found
    return Estimate(found.value, min(found.low, found.value), max(found.high, found.value), found.count)


def _places(statistics: np.ndarray) -> np.ndarray:
    return np.clip((statistics * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)


def _bins(statistics: np.ndarray, answerable: np.ndarray) -> list[dict[str, Any]]:
    places = _places(statistics)
    return [
        {
            "low": place / NUM_BINS,
            "high": (place + 1) / NUM_BINS,
            "mean_statistic": float(statistics[places == place].mean()),
            "share_answerable": wilson(int(answerable[places == place].sum()), int((places == place).sum())).to_json(),
        }
        for place in np.unique(places).tolist()
    ]


def _cuts(statistics: np.ndarray, answerable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every threshold that tells questions apart, ascending, and how many are refused below it, and rightly so.

    The first refuses nothing, the last everything, the others lie halfway between two statistics.
    """
    distinct, places, counts = np.unique(statistics, return_inverse=True, return_counts=True)
    wrong_counts = np.bincount(places[~answerable], minlength=len(distinct))
    between = distinct[:-1] / 2 + distinct[1:] / 2
    # Of neighbouring floats the half may be the lower one, which would not be refused below it.
    between = np.where(between > distinct[:-1], between, distinct[1:])
    cuts = np.concatenate([distinct[:1], between, [np.nextafter(distinct[-1], np.inf)]])
    return cuts, np.concatenate([[0], counts.cumsum()]), np.concatenate([[0], wrong_counts.cumsum()])


def _thinned(count: int, kept: int) -> list[int]:
    """At most `MOST_POINTS` places of `count`, the first, the last and `kept` among them."""
    if count <= MOST_POINTS:
        return list(range(count))
    even = np.linspace(0, count - 1, MOST_POINTS - 1).round().astype(int)
    return sorted({*even.tolist(), kept})
