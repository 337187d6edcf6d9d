"""Confidence intervals: Wilson's for proportions, the bootstrap for every other figure.

Questions are taken as independent draws. Where a small table is asked many questions about each fact they are not, and
the intervals are too narrow: the summary says how many facts were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""The standard normal distribution has 95 % of its mass within this distance of 0."""

RESAMPLES = 1000

_BLOCK_NUMBERS = 2**22
"""Indices drawn at a time."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval.

    Attributes:
        value: None where there is nothing to measure, as the precision of a model that refused nothing.
        low, high: ends of the interval; None with `value`.
        count: questions, texts or rounds it rests on.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int

    def to_json(self) -> dict[str, float | int | None]:
        """`value, low, high, count`, to four places, or to three digits where that is more.

        What is infinite, as the perplexity of a model that is broken may be, is None: JSON has no word for it.
        """
        rounded = (_rounded(number) for number in (self.value, self.low, self.high))
        return dict(zip(("value", "low", "high"), rounded, strict=True)) | {"count": self.count}


def _rounded(number: float | None) -> float | None:
    if number is None or not math.isfinite(number):
        return None
    # Of seconds and divergences four places may be nothing but noughts.
    magnitude = math.floor(math.log10(abs(number))) if number else 0
    return round(number, max(4, 2 - magnitude))


NOTHING = Estimate(None, None, None, 0)


def wilson(successes: int, count: int) -> Estimate:
    """A proportion with Wilson's score interval, which stays within 0 and 1 (E. B. Wilson, JASA 22, 1927)."""
    if not count:
        return NOTHING
    share, z2 = successes / count, Z_95 * Z_95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # At the ends the formula is exact, its rounding is not.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == count else middle + half
    return Estimate(share, low, high, count)


def bootstrap(
    figure: Callable[[np.ndarray], np.ndarray], count: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Any figure of a sample, with the percentile interval of its resamples (B. Efron, Ann. Stat. 7, 1979).

    Args:
        figure: from int64 [R, count], R samples of question numbers, to the figure of each, float [R]; NaN where a
            sample has nothing to measure, which the interval then leaves out.
        count: questions.
        seed: of the resampling.
    """
    if not count:
        return NOTHING
    value = float(figure(np.arange(count)[None])[0])
    if math.isnan(value):
        return Estimate(None, None, None, count)
    random = np.random.default_rng(seed)
    figures = []
    for start in range(0, resamples, block := max(1, _BLOCK_NUMBERS // count)):
        figures.append(figure(random.integers(count, size=(min(block, resamples - start), count))))
    low, high = np.nanquantile(np.concatenate(figures), (0.025, 0.975))
    return Estimate(value, float(low), float(high), count)


def mean(values: np.ndarray, *, seed: int = 0) -> Estimate:
    """The mean of a number per question, with its bootstrap interval."""
    values = np.asarray(values, np.float64)
    return bootstrap(lambda samples: values[samples].mean(1), len(values), seed=seed)
