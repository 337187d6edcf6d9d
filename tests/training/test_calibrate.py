"""Calibration: the prior that finds facts, the refusal decision, and the adapter left as it was."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from closed_form_samples import base, chat, facts
from model_samples import ENCODER, tiny_adapter

from kblam_ray.attention.trace import retrieval_scores
from kblam_ray.errors import AdapterError, EncoderMismatchError, InputError
from kblam_ray.facts.questions import QuestionMaker
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.refusal import statistic
from kblam_ray.training.closed_form import calibrate as calibrate_module
from kblam_ray.training.closed_form.calibrate import calibrate, calibration
from kblam_ray.training.closed_form.logistic import (
    best_threshold,
    f1_of_refusing,
    fit_refusal,
    logistic_regression,
    probability,
)
from kblam_ray.training.closed_form.prior_search import PriorScores, PriorSearch
from kblam_ray.training.closed_form.prompt_logits import prompt_logits
from kblam_ray.training.closed_form.settings import CalibrationSettings

SMALL = CalibrationSettings(
    kb_sizes=(30, 100), num_questions=10, num_unanswerable=8, betas=(0.0, 10.0, 40.0), gammas=(0.0, 3.0)
)


@functools.cache
def model(kind: str) -> KnowledgeModel:
    adapter = tiny_adapter(base(), kind, kb_scale=None)
    return KnowledgeModel(base(), adapter, chat().tokenizer, ENCODER)


@pytest.mark.parametrize("kind", ["shared", "paper"])
def test_logits_of_a_batch_give_the_retrieval_scores_of_each_prompt(kind):
    knowing = model(kind)
    memory = memory_of(knowing.adapter, facts().take(range(40)))
    maker = QuestionMaker(facts().facts[:40], 2)
    prompts = [chat().render(maker.make("simple", number).messages) for number in range(3)]
    found = prompt_logits(knowing.attachment, prompts, memory, 0)
    for row, prompt in enumerate(prompts):
        for layer in knowing.adapter.config.layers:
            wanted_M = retrieval_scores(knowing.attachment, torch.tensor([prompt]), memory, layers=[layer])
            scores_M = torch.softmax(found[layer][row], -1).mean(0)
            torch.testing.assert_close(scores_M, wanted_M, rtol=1e-4, atol=1e-6)


def test_calibration_takes_the_prior_where_attention_finds_nothing():
    knowing = model("shared")
    before = knowing.adapter.config
    found = calibration(knowing, facts(), SMALL)
    assert knowing.adapter.config == before
    settings = found.settings
    assert settings["question_prior"] > 0
    assert settings["prior_context"] in ("last", "last_two")
    assert set(settings["retrieval_layers"]) <= set(before.layers)
    for size in (30, 100):
        alone, helped = found.report["attention_alone"][size], found.report["with_prior"][size]
        assert helped["top_1"] > alone["top_1"] + 0.3
        assert helped["cross_entropy"] < alone["cross_entropy"]
    # They are settings of an adapter, and its refusal statistic can be had with them.
    changed = before.changed(**settings)
    assert 0 <= statistic(changed, dict.fromkeys(settings["refusal_weights"], 0.0)) <= 1
    assert found.report["refusal_f1"].keys() == {30, 100}


def test_a_prior_that_unsettles_the_layers_above_it_gives_way_to_a_weaker_one(monkeypatch):
    knowing = model("shared")
    asked = []

    def num_found(table, model, layers):
        config = model.adapter.config
        asked.append(strength := config.question_prior + config.prior_lexical)
        return len(table.answerable) if strength <= bearable else -1

    monkeypatch.setattr(calibrate_module._Table, "num_found", num_found)
    for bearable in (100, 20, 5, 0):
        asked.clear()
        found = calibrate(knowing, facts(), SMALL.model_copy(update={"use_refusal": False}))
        assert found["question_prior"] + found["prior_lexical"] <= bearable
        assert asked[0] == 43 or bearable < 100
        assert sorted(asked, reverse=True) == asked
    assert (found["question_prior"], found["prior_lexical"]) == (0, 0)


def test_questions_are_asked_again_with_the_prior_in_every_layer():
    knowing = model("shared")
    table = next(calibrate_module._tables(knowing, facts(), 30, SMALL))
    layers = knowing.adapter.config.layers
    with calibrate_module._configured(knowing, question_prior=40.0):
        one_by_one = 0
        for question in table.answerable:
            request = knowing.prepare(table.memory, question.messages)
            prompt = torch.tensor([knowing.chat.render(question.messages)])
            scores_M = retrieval_scores(knowing.attachment, prompt, request, layers=layers).numpy()
            least = min(scores_M[list(question.facts)])
            one_by_one += int((scores_M >= least).sum() <= len(question.facts))
        assert table.num_found(knowing, layers) == one_by_one > 0
    assert table.num_found(knowing, layers) < one_by_one


def test_without_a_prior_no_encoder_is_needed():
    knowing = KnowledgeModel(base(), tiny_adapter(base(), "paper"), chat().tokenizer, "no-such-encoder")
    settings = calibrate(
        knowing, facts(), SMALL.model_copy(update={"use_prior": False, "use_refusal": False, "kb_sizes": (30,)})
    )
    assert settings.keys() == {"retrieval_layers"}


def test_facts_of_another_encoder_and_too_few_are_named():
    from kblam_ray.encoders.load import load_encoder
    from kblam_ray.table.embedded import EmbeddedFacts

    others = EmbeddedFacts.embed(facts().facts[:4], load_encoder("hashing:32"))
    with pytest.raises(EncoderMismatchError):
        calibrate(model("shared"), others, SMALL)
    with pytest.raises(InputError, match="two held-out facts"):
        calibrate(model("shared"), facts().take([0]), SMALL)


def test_refusing_is_learnt_among_one_and_few_facts_too():
    knowing = model("shared")
    few = SMALL.model_copy(update={"kb_sizes": (1, 5, 30), "use_prior": False})
    said = []
    found = calibration(knowing, facts(), few, progress=said.append)
    # Among one fact it is always found, which says nothing about layers.
    assert found.report["attention_alone"].keys() == {30}
    assert found.report["refusal_f1"].keys() == {1, 5, 30}
    # Several knowledge bases of few facts share the questions of one.
    assert said[-1] == "54 questions looked at, 24 of them without an answer"
    assert CalibrationSettings().kb_sizes[0] == 1


def test_a_table_of_few_facts_is_calibrated_on_what_there_is():
    found = calibration(model("shared"), facts().take(range(3)), SMALL)
    assert found.report["refusal_f1"].keys() == found.report["attention_alone"].keys() == {3}
    assert set(found.settings) >= {"question_prior", "retrieval_layers", "refusal_weights"}


def test_scores_that_are_not_finite_are_no_success():
    broken = base()
    broken.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    knowing = KnowledgeModel(broken, tiny_adapter(base(), "shared", kb_scale=None), chat().tokenizer, ENCODER)
    settings = SMALL.model_copy(update={"use_refusal": False, "use_prior": False, "kb_sizes": (30,)})
    with pytest.raises(AdapterError, match="not finite"):
        calibrate(knowing, facts(), settings)


def search_of(logits: dict[int, list[list[float]]], cosines: list[float], wanted: list[int]) -> PriorSearch:
    search = PriorSearch.over(SMALL, list(logits))
    scores = torch.tensor(cosines)
    prior = PriorScores({"last": scores, "last_two": -scores}, {"last": scores * 0, "last_two": scores * 0})
    search.add(4, {layer: torch.tensor(rows) for layer, rows in logits.items()}, wanted, prior)
    return search


def test_the_search_keeps_attention_where_it_finds_the_fact_and_the_prior_does_not():
    search = search_of({2: [[9.0, 0.0, 0.0, 0.0]], 5: [[0.0, 3.0, 0.0, 0.0]]}, [-0.5, 1.0, 0.0, 0.0], [0])
    assert search.best_layers() == (2,)
    beta, _, context = search.best_prior((2,))
    assert beta == 0 or context == "last_two"


def test_the_search_takes_beta_where_the_cosine_finds_the_fact():
    search = search_of({2: [[0.0, 0.1, 0.0, 0.0]]}, [1.0, 0.2, 0.0, 0.0], [0])
    beta, _, context = search.best_prior((2,))
    assert (beta, context) == (40.0, "last")
    assert search.figures((2,), (0.0, 0.0, "last"))[4][0] == 0.0
    # Ties are misses, and two wanted facts must be the first two.
    assert search_of({2: [[1.0, 1.0, 0.0, 0.0]]}, [0.0] * 4, [0]).figures((2,), (0.0, 0.0, "last"))[4][0] == 0.0
    assert search_of({2: [[1.0, 0.9, 0.0, 0.0]]}, [0.0] * 4, [1, 0]).figures((2,), (0.0, 0.0, "last"))[4][0] == 1.0


def test_logistic_regression_finds_what_made_the_data():
    random = np.random.default_rng(0)
    features_nF = random.normal(size=(4_000, 2))
    truth_n = random.random(4_000) < probability(features_nF, np.array([2.0, -1.0, 0.5]))
    assert np.abs(logistic_regression(features_nF, truth_n) - [2.0, -1.0, 0.5]).max() < 0.25
    # What can be told apart wholly has finite weights all the same.
    weight_F = logistic_regression(np.array([[-1.0], [1.0]] * 10), np.array([False, True] * 10))
    assert np.isfinite(weight_F).all()
    assert weight_F[0] > 1


def test_the_refusal_decision_in_the_features_own_units():
    random = np.random.default_rng(1)
    has_answer = random.random(300) < 0.6
    examples = [
        {"score": 100 + 10 * answer + random.normal(), "share": 0.5, "noise": random.normal()} for answer in has_answer
    ]
    fit = fit_refusal(examples, list(has_answer), [10] * 150 + [20] * 150)
    assert fit.weights["share"] == 0.0
    assert abs(fit.weights["score"]) > 5 * abs(fit.weights["noise"])
    assert all(f1 > 0.95 for f1 in fit.f1.values())
    refused = [
        1 / (1 + np.exp(-fit.weights["bias"] - sum(fit.weights[name] * example[name] for name in example)))
        < fit.threshold
        for example in examples
    ]
    assert np.mean(np.array(refused) == ~has_answer) > 0.97


def test_the_threshold_has_the_best_f1():
    statistic_n = np.array([0.1, 0.2, 0.6, 0.7, 0.9])
    answer_n = np.array([False, False, False, True, True])
    threshold, f1 = best_threshold(statistic_n, answer_n, np.array([1, 1, 1, 1, 1]))
    assert 0.6 < threshold < 0.7
    assert f1 == {1: 1.0}
    assert f1_of_refusing(np.array([True, True]), np.array([True, False])) == pytest.approx(2 / 3)
    assert f1_of_refusing(np.array([False]), np.array([True])) == 0.0


@pytest.mark.parametrize(
    ("examples", "has_answer"),
    [
        ([{"a": 1.0}, {"b": 1.0}], [True, False]),
        ([{"a": 1.0}, {"a": float("nan")}], [True, False]),
        ([{"a": 1.0}, {"a": 2.0}], [True, True]),
        ([], []),
    ],
)
def test_what_no_decision_can_be_fitted_to(examples, has_answer):
    with pytest.raises(InputError):
        fit_refusal(examples, has_answer, [1] * len(examples))
