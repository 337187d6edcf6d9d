"""The regressions on made-up hidden states, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kblam_ray.errors import AdapterError, InputError
from kblam_ray.training.closed_form.discriminant import (
    HeldOutTask,
    LayerFit,
    best_query,
    metric,
    part_weights,
    solve_ridge,
    top_1_share,
)
from kblam_ray.training.closed_form.gates import fit_gate, search
from kblam_ray.training.closed_form.positions import COPY, OTHER, PROMPT, VALUE
from kblam_ray.training.closed_form.statistics import Statistics, mean_and_covariance, with_one

HIDDEN, DIM, LAYER = 24, 8, 3
CHOICES = {
    "prompt_shares": (0.3, 0.6),
    "ridges": (1e-6, 1e-2),
    "shrinkages": (0.01, 0.3),
    "key_shares": (0.0, 0.5),
    "others": (COPY, VALUE),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_keys(num: int, dim: int = DIM) -> torch.Tensor:
    """Of length 1, as sentence encoders give them."""
    return torch.nn.functional.normalize(draw(num, dim), dim=1)


def covariance(keys_MP: torch.Tensor) -> torch.Tensor:
    return keys_MP.T @ keys_MP / len(keys_MP)


def add_rows(statistics: Statistics, part: int, hidden_nX: torch.Tensor, keys_nP: torch.Tensor | None, lse_nN=None):
    ones_nX = with_one(hidden_nX)
    statistics.sums.add_product(("hidden", LAYER, part), ones_nX, ones_nX)
    if keys_nP is not None:
        ones_nP = with_one(keys_nP)
        statistics.sums.add_product(("keys", LAYER, part), ones_nX, keys_nP)
        statistics.sums.add_product(("key_square", part), ones_nP, ones_nP)
    if lse_nN is not None:
        statistics.sums.add_product(("log_sum_exp", LAYER, part), ones_nX, lse_nN)
    statistics.num_questions += len(hidden_nX)


def test_mean_and_covariance_are_those_of_all_rows_at_once(monkeypatch):
    monkeypatch.setattr("kblam_ray.training.closed_form.statistics.ROWS_PER_STEP", 7)
    rows_MP = draw(40, 5).numpy().astype(np.float16)
    mean_P, covariance_PP = mean_and_covariance(rows_MP)
    exact_MP = rows_MP.astype(np.float64)
    np.testing.assert_allclose(mean_P, exact_MP.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance_PP, np.cov(exact_MP.T, bias=True), rtol=1e-10)


@pytest.mark.parametrize("place", ["square", "cross"])
def test_sums_that_are_not_finite_are_not_solved(place):
    sums = {"square": torch.eye(3, dtype=torch.float64), "cross": torch.ones(3, 2, dtype=torch.float64)}
    sums[place][1, 1] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        solve_ridge(sums["square"], sums["cross"], 0.1)


def task_of(keys_MP: torch.Tensor, hidden_nX: torch.Tensor, wanted_n: torch.Tensor) -> HeldOutTask:
    hidden = {PROMPT: with_one(hidden_nX), VALUE: with_one(hidden_nX)}
    return HeldOutTask(keys_MP, hidden, {PROMPT: wanted_n, VALUE: wanted_n}, PROMPT, VALUE)


def test_hidden_states_that_are_a_linear_image_of_the_keys_find_every_fact():
    keys_MP, map_PX = unit_keys(200), draw(DIM, HIDDEN, seed=1)
    statistics = Statistics()
    for part in (PROMPT, COPY, VALUE):
        add_rows(statistics, part, keys_MP[:100] @ map_PX + 1.0, keys_MP[:100])
    task = task_of(keys_MP, keys_MP[100:] @ map_PX + 1.0, torch.arange(100, 200))
    query = best_query(statistics, LAYER, task, covariance(keys_MP), **CHOICES)
    assert query.chosen.top_1 == 1.0
    assert query.chosen.cross_entropy < 0.1


def test_without_a_bias_the_query_has_none():
    keys_MP, map_PX = unit_keys(200), draw(DIM, HIDDEN, seed=1)
    statistics = Statistics()
    add_rows(statistics, PROMPT, keys_MP[:100] @ map_PX, keys_MP[:100])
    task = task_of(keys_MP, keys_MP[100:] @ map_PX, torch.arange(100, 200))
    query = best_query(statistics, LAYER, task, covariance(keys_MP), with_bias=False, **CHOICES)
    assert (query.weight_PX[:, -1] == 0).all()
    assert query.chosen.top_1 == 1.0


def test_the_residual_covariance_finds_what_the_plain_inner_product_misses():
    """Half of the key's numbers cannot be told from the hidden state, and are large."""
    keys_MP = draw(400, DIM) * torch.tensor([1.0] * 4 + [4.0] * 4, dtype=torch.float64)
    map_PX = draw(DIM, HIDDEN, seed=1)
    noise_MP = draw(400, DIM, seed=2) * torch.tensor([0.05] * 4 + [8.0] * 4, dtype=torch.float64)
    hidden_MX = (keys_MP + noise_MP) @ map_PX
    statistics = Statistics()
    add_rows(statistics, PROMPT, hidden_MX[:300], keys_MP[:300])
    fit = LayerFit(statistics, LAYER, {PROMPT: 1 / 300}, torch.device("cpu"), has_one=True)
    predicted_PX, residual_PP = fit.predicted(1e-6)
    wanted_n, rows_nX = torch.arange(300, 400), with_one(hidden_MX[300:])
    plain = top_1_share(rows_nX @ predicted_PX.T @ keys_MP.T, wanted_n)
    told = top_1_share(rows_nX @ (metric(residual_PP, residual_PP, 0.001, 0.0) @ predicted_PX).T @ keys_MP.T, wanted_n)
    assert told > plain + 0.1
    chosen = best_query(
        statistics, LAYER, task_of(keys_MP, hidden_MX[300:], wanted_n), covariance(keys_MP), **CHOICES
    ).chosen
    assert chosen.shrinkage < 1


def test_the_metric_between_residuals_keys_and_the_identity():
    residual_PP, keys_PP = torch.diag(torch.tensor([1.0, 3.0]).double()), torch.diag(torch.tensor([5.0, 1.0]).double())
    for wanted_P, choice in (([1.5, 0.5], (0.0, 0.0)), ([1 / 3, 5 / 3], (0.0, 1.0)), ([1.25, 0.75], (1.0, 0.0))):
        found_PP = metric(residual_PP, keys_PP, *choice)
        torch.testing.assert_close(found_PP, torch.diag(torch.tensor(wanted_P).double()))
    assert torch.equal(metric(residual_PP, keys_PP, math.inf, 0.5), torch.eye(2).double())


def test_statistics_add_up_to_those_of_one_pass():
    hidden_nX, keys_nP = draw(50, HIDDEN), draw(50, DIM, seed=1)
    whole, first, second = Statistics(), Statistics(), Statistics()
    add_rows(whole, PROMPT, hidden_nX, keys_nP)
    add_rows(first, PROMPT, hidden_nX[:20], keys_nP[:20])
    add_rows(second, PROMPT, hidden_nX[20:], keys_nP[20:])
    add_rows(second, VALUE, hidden_nX[:5], keys_nP[:5])
    both = first + second
    for name, tensor in whole.sums.tensors.items():
        torch.testing.assert_close(both.sums.tensors[name], tensor, rtol=1e-13, atol=1e-13)
    assert (both.count(PROMPT), both.count(VALUE), both.count(COPY)) == (50, 5, 0)
    assert first.count(PROMPT) == 20
    other = Statistics()
    add_rows(other, PROMPT, hidden_nX[:, :4], keys_nP)
    with pytest.raises(InputError, match="statistics"):
        _ = first + other


def test_part_weights_share_out_what_is_there():
    statistics = Statistics()
    add_rows(statistics, PROMPT, draw(10, HIDDEN), draw(10, DIM))
    add_rows(statistics, VALUE, draw(40, HIDDEN), draw(40, DIM))
    assert part_weights(statistics, 0.6, PROMPT, (COPY, VALUE)) == {PROMPT: 0.06, VALUE: 0.01}
    with pytest.raises(InputError, match="no token that wants a fact"):
        Statistics().weighted("hidden", LAYER, {PROMPT: 1.0})


def test_ridge_is_least_squares_when_it_is_small_and_leaves_the_bias_alone():
    rows_nX = with_one(draw(60, 5))
    weight_X2 = draw(6, 2, seed=4)
    solved = solve_ridge(rows_nX.T @ rows_nX, rows_nX.T @ (rows_nX @ weight_X2), 1e-12)
    torch.testing.assert_close(solved, weight_X2, rtol=1e-6, atol=1e-6)
    constant_n2 = torch.full((60, 2), 7.0, dtype=torch.float64)
    solved = solve_ridge(rows_nX.T @ rows_nX, rows_nX.T @ constant_n2, 100.0)
    torch.testing.assert_close(rows_nX @ solved, constant_n2, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="cannot be solved"):
        solve_ridge(torch.full((3, 3), torch.nan, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64), 0.1)


def test_gates_balance_text_and_facts_and_open_before_values():
    statistics = Statistics()
    text = {}
    for seed, part in enumerate((OTHER, PROMPT, COPY, VALUE)):
        hidden_nX = draw(80, HIDDEN, seed=seed)
        hidden_nX[:, 0] = part == VALUE
        lse_nN = 50 + hidden_nX[:, 1:3] * 5
        text[part] = with_one(hidden_nX), lse_nN
        add_rows(statistics, part, hidden_nX, None, lse_nN)
    expected = {OTHER: 2.0, PROMPT: 2.0, COPY: 2.0, VALUE: 2.0}
    fit = fit_gate(statistics, LAYER, expected, torch.device("cpu"), has_one=True)
    gate_NX = fit.gate(margin=6.0, shift=1.0)
    for part, (rows_nX, lse_nN) in text.items():
        wanted = 7.0 if part == VALUE else -5.0
        assert (rows_nX @ gate_NX.T + 2.0 - lse_nN - wanted).abs().mean() < 1.0
    # Without a bias the constant part is lost unless the hidden states have one.
    assert (fit_gate(statistics, LAYER, expected, torch.device("cpu"), has_one=False).gate(6.0, 1.0)[:, -1] == 0).all()


def test_the_search_takes_the_least_of_each_setting():
    calls = []

    def loss(settings):
        calls.append(settings)
        return (settings["a"] - 2) ** 2 + (settings["b"] + 1) ** 2

    best, least = search(loss, {"a": (0.0, 2.0, 4.0), "b": (-1.0, 1.0)}, {"a": 4.0, "b": 1.0})
    assert (best, least) == ({"a": 2.0, "b": -1.0}, 0.0)
    assert len(calls) == len({tuple(one.items()) for one in calls})
