"""Calibration of the refusal statistic: bins, curves and errors against hand-computed cases and plain loops."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kblam_ray.evaluation.calibration import MOST_POINTS, calibration, calibration_error
from kblam_ray.evaluation.metrics import area_under_curve, refusal_report
from kblam_ray.evaluation.outcomes import Outcome, System
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.summary import result

STATISTICS = [0.05, 0.15, 0.15, 0.62, 0.68, 0.95, 1.0]
ANSWERABLE = [False, False, True, False, True, True, True]


def test_bins_by_hand():
    found = calibration(STATISTICS, ANSWERABLE, threshold=0.5, is_probability=True)
    assert (found["threshold"], found["is_probability"]) == (0.5, True)
    bins = [
        (
            one["low"],
            one["high"],
            one["mean_statistic"],
            one["share_answerable"]["value"],
            one["share_answerable"]["count"],
        )
        for one in found["bins"]
    ]
    assert bins == [
        (0.0, 0.1, pytest.approx(0.05), 0.0, 1),
        (0.1, 0.2, pytest.approx(0.15), 0.5, 2),
        (0.6, 0.7, pytest.approx(0.65), 0.5, 2),
        (0.9, 1.0, pytest.approx(0.975), 1.0, 2),
    ]
    # 1 of 0.05, 2 of 0.35, 2 of 0.15, 2 of 0.025, over 7.
    assert found["error"]["value"] == pytest.approx((0.05 + 0.7 + 0.3 + 0.05) / 7, abs=1e-4)
    squares = [0.05**2, 0.15**2, 0.85**2, 0.62**2, 0.32**2, 0.05**2, 0]
    assert found["brier"]["value"] == pytest.approx(sum(squares) / 7, abs=1e-4)
    assert found["error"]["count"] == found["brier"]["count"] == 7
    for name in ("error", "brier"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_thresholds_by_hand():
    found = calibration(STATISTICS, ANSWERABLE)
    assert "bins" not in found
    assert "error" not in found
    assert found["thresholds"][0] == {"threshold": 0.05, "precision": None, "recall": 0.0, "f1": 0.0}
    assert found["thresholds"][1] == {
        "threshold": pytest.approx(0.1), "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.5)
    }  # fmt: skip
    # Below the half of 0.62 and 0.68 all three are refused, and one too many.
    assert found["best"] == {"threshold": pytest.approx(0.65), "f1": pytest.approx(6 / 7)}
    last = found["thresholds"][-1]
    assert last["threshold"] > 1.0
    assert (last["precision"], last["recall"]) == (pytest.approx(3 / 7), 1.0)
    assert [one["threshold"] for one in found["thresholds"]] == sorted(one["threshold"] for one in found["thresholds"])
    assert found["receiver"] == [
        {"false_positive": pytest.approx(right), "true_positive": pytest.approx(up)}
        for right, up in [(0, 0), (0, 1 / 3), (1 / 4, 2 / 3), (1 / 4, 1), (2 / 4, 1), (3 / 4, 1), (1, 1)]
    ]


def _drawn(count: int, decimals: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(count)
    statistics = random.random(count).round(decimals)
    return statistics, random.random(count) < statistics**2


@pytest.mark.parametrize("decimals", [1, 3])
def test_each_threshold_is_what_refusing_below_it_gives(decimals):
    statistics, answerable = _drawn(60, decimals)
    found = calibration(statistics, answerable)
    for one in found["thresholds"]:
        report = refusal_report(statistics < one["threshold"], ~answerable)
        assert one["precision"] == (None if report.precision.value is None else pytest.approx(report.precision.value))
        assert one["recall"] == pytest.approx(report.recall.value)
        assert one["f1"] == pytest.approx(report.f1.value)
    every = [refusal_report(statistics < cut, ~answerable).f1.value for cut in [*np.unique(statistics), 2.0]]
    assert found["best"]["f1"] == pytest.approx(max(every))
    best = refusal_report(statistics < found["best"]["threshold"], ~answerable)
    assert best.f1.value == pytest.approx(max(every))


def test_the_area_under_the_receiver_s_curve_is_the_area():
    statistics, answerable = _drawn(80)
    points = calibration(statistics, answerable)["receiver"]
    assert len(points) < MOST_POINTS
    area = np.trapezoid([one["true_positive"] for one in points], [one["false_positive"] for one in points])
    assert area == pytest.approx(area_under_curve(statistics, answerable).value)


def test_of_many_questions_some_points_are_kept():
    statistics, answerable = _drawn(5000, 9)
    found = calibration(statistics, answerable, is_probability=True)
    for name in ("thresholds", "receiver"):
        assert 90 < len(found[name]) <= MOST_POINTS
    assert found["best"]["threshold"] in [one["threshold"] for one in found["thresholds"]]
    assert found["thresholds"][0]["recall"] == 0
    assert found["thresholds"][-1]["recall"] == 1
    assert found["receiver"][0] == {"false_positive": 0.0, "true_positive": 0.0}
    assert found["receiver"][-1] == {"false_positive": 1.0, "true_positive": 1.0}
    # It says x where x^2 is true: the mean of x - x^2 is 1/6.
    assert found["error"]["value"] == pytest.approx(1 / 6, abs=0.02)
    assert found["error"]["low"] < 1 / 6 < found["error"]["high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_neighbouring_floats_are_told_apart():
    low = 0.1
    high = float(np.nextafter(low, 1))
    found = calibration([low, high], [False, True])
    assert found["best"]["f1"] == 1
    assert low < found["best"]["threshold"] <= high


def test_resampling_never_leaves_the_error_outside_its_interval():
    # Calibrated to the digit: every sample drawn from it is less so.
    statistics = np.repeat([0.25, 0.75], 40)
    answerable = np.concatenate([np.arange(40) < 10, np.arange(40) < 30])
    found = calibration_error(statistics, answerable)
    assert found.value == found.low == 0
    assert found.high > 0


def asked(answer: bool) -> Asked:
    return Asked("simple" if answer else "unanswerable", ({"role": "user", "content": "Who?"},), answer)


def test_a_result_has_it_where_there_is_a_statistic():
    questions = [asked(answer) for answer in ANSWERABLE]
    outcomes = [Outcome(statistic=statistic, refused=statistic < 0.5) for statistic in STATISTICS]
    given = {"threshold": 0.5, "is_probability": True}
    found = result(System("attention", True), questions, outcomes, **given)["calibration"]
    assert found == calibration(STATISTICS, ANSWERABLE, **given)
    # The answers under a grounding have the same statistic.
    assert "calibration" not in result(System("attention", True, "off"), questions, outcomes, **given)
    assert "calibration" not in result(System("bm25"), questions, [Outcome(refused=False)] * 7)
    assert "calibration" not in result(System("cosine"), questions[4:], outcomes[4:])
    broken = [*outcomes[:-1], Outcome(statistic=float("nan"))]
    assert "calibration" not in result(System("attention", True), questions, broken, **given)
    unknown = [*questions, Asked("own", ({"role": "user", "content": "Hm?"},), None)]
    with_unknown = result(System("attention", True), unknown, [*outcomes, Outcome(statistic=0.3)], **given)
    assert with_unknown["calibration"] == found
