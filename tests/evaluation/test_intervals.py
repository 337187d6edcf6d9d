"""Confidence intervals against published and simulated figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kblam_ray.evaluation.intervals import Estimate, bootstrap, mean, wilson


def test_wilson_against_published_figures():
    # R. G. Newcombe, Stat. Med. 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson(successes, count)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert (found.value, found.count) == (successes / count, count)
    assert wilson(20, 20).high == 1
    assert wilson(0, 0).value is None


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    found = mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found == mean(values)


def test_resamples_with_nothing_to_measure_are_left_out():
    is_counted = np.array([True, False, False, False])

    def share(samples):
        counted = is_counted[samples]
        return np.where(counted.any(1), 1.0, np.nan)

    found = bootstrap(share, 4)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert bootstrap(lambda samples: np.full(len(samples), np.nan), 4).value is None
    assert bootstrap(share, 0).count == 0


def test_numbers_come_as_json():
    assert wilson(1, 3).to_json() == {"value": 0.3333, "low": 0.0615, "high": 0.7923, "count": 3}


def test_what_is_infinite_has_no_word_in_json():
    found = Estimate(math.inf, math.nan, math.inf, 3).to_json()
    assert found == {"value": None, "low": None, "high": None, "count": 3}
    assert Estimate(-1e-6, 0.0, 12345.678, 3).to_json() == {"value": -1e-6, "low": 0.0, "high": 12345.678, "count": 3}
