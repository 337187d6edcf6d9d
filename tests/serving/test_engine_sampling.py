"""Tokens are samples of their distribution, and nothing but seed, choice and position decides which."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.continuous_batching.requests import RequestState

from kblam_ray.serving.engine.sampling import Sampler, TokenChoice

LOGITS_V = torch.tensor([1.0, 0.0, 2.0, -1.0, -30.0])
ROWS = 6_000


def state(name: str, num_said: int = 0, num_prompt: int = 3) -> RequestState:
    return RequestState(name, [5] * num_prompt, generated_tokens=[6] * num_said)


def drawn(num_rows: int = ROWS, **settings) -> torch.Tensor:
    """Tokens chosen for as many choices of one request."""
    sampler = Sampler()
    requests = []
    for row in range(num_rows):
        sampler.add(str(row), TokenChoice(3, seed=1, choice=row, **settings))
        requests.append(state(str(row)))
    return sampler(LOGITS_V.repeat(num_rows, 1), requests).argmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_have_the_probabilities_of_the_distribution(temperature: float):
    shares_V = torch.bincount(drawn(temperature=temperature), minlength=5) / ROWS
    expected_V = torch.softmax(LOGITS_V / temperature, -1)
    # Five standard deviations, for a seed that is fixed.
    assert ((shares_V - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / ROWS).sqrt() + 1e-4).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, {2}), (0.5, {2}), (0.8, {0, 2}), (0.95, {0, 1, 2}), (1.0, None)])
def test_top_p_keeps_the_likeliest_tokens_that_reach_it(top_p: float, kept: set[int] | None):
    tokens_R = drawn(2_000, temperature=1.0, top_p=top_p)
    assert set(tokens_R.tolist()) == (kept or {0, 1, 2, 3})
    if kept:
        expected_V = torch.softmax(LOGITS_V[sorted(kept)], -1)
        shares_V = torch.bincount(tokens_R, minlength=5)[sorted(kept)] / 2_000
        assert (shares_V - expected_V).abs().max() < 0.05


def test_a_temperature_next_to_nothing_takes_the_likeliest():
    assert set(drawn(50, temperature=1e-40).tolist()) == {2}
    assert set(drawn(50, temperature=1e-40, top_p=0.0).tolist()) == {2}


def noise(sampler: Sampler, request: RequestState, rows: int, at: int) -> torch.Tensor:
    others = [state(f"other {row}") for row in range(rows)]
    others[at] = request
    return sampler(LOGITS_V.repeat(rows, 1), others)[at]


def test_noise_depends_on_seed_choice_and_position_alone():
    sampler = Sampler()
    for name, seed, choice in (("a", 7, 0), ("b", 7, 0), ("c", 7, 1), ("d", 8, 0)):
        sampler.add(name, TokenChoice(3, temperature=1.0, seed=seed, choice=choice))
    first = noise(sampler, state("a"), 1, 0)
    assert torch.equal(first, noise(sampler, state("b"), 5, 3))
    assert not torch.equal(first, noise(sampler, state("c"), 1, 0))
    assert not torch.equal(first, noise(sampler, state("d"), 1, 0))
    later = noise(sampler, state("a", num_said=2), 1, 0)
    assert not torch.equal(first, later)
    # The engine, short of room, puts what was said behind the prompt.
    assert torch.equal(later, noise(sampler, state("a", num_prompt=5), 1, 0))


def test_rows_of_others_and_greedy_rows_are_left_alone():
    sampler = Sampler()
    logits_RV = LOGITS_V.repeat(3, 1)
    sampler.add("plain", TokenChoice(3))
    assert sampler(logits_RV, [state("plain")]) is logits_RV
    sampler.add("sampled", TokenChoice(3, temperature=1.0))
    out_RV = sampler(logits_RV, [state("plain"), state("sampled")])
    assert torch.equal(out_RV[[0, 2]], LOGITS_V.repeat(2, 1))
    assert not torch.equal(out_RV[1], LOGITS_V)
    sampler.remove("sampled")
    assert sampler(logits_RV, [state("sampled")]) is logits_RV


def test_log_probabilities_are_the_models_own():
    sampler = Sampler()
    choices = {
        "greedy": TokenChoice(3, num_logprobs=2),
        "sampled": TokenChoice(3, temperature=2.0, top_p=0.5, num_logprobs=0),
        "many": TokenChoice(3, num_logprobs=20),
    }
    for name, choice in choices.items():
        sampler.add(name, choice)
    tokens_R = sampler(LOGITS_V.repeat(3, 1), [state(name) for name in choices]).argmax(-1)
    logprobs_V = torch.log_softmax(LOGITS_V, -1)
    for (name, choice), token in zip(choices.items(), tokens_R.tolist(), strict=True):
        (chosen,) = choice.chosen
        assert chosen.logprob == pytest.approx(float(logprobs_V[token])), name
    assert [token for token, _ in choices["greedy"].chosen[0].top] == [2, 0]
    assert choices["sampled"].chosen[0].top == ()
    assert dict(choices["many"].chosen[0].top) == pytest.approx(dict(enumerate(logprobs_V.tolist())))
