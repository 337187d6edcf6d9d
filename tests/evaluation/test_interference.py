"""What attached facts do to other text, against a plain computation with the model's logits and its trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluation_samples import ENCODER, synthetic, tiny_model

from kblam_ray.attention.trace import trace
from kblam_ray.errors import EncoderMismatchError, InputError
from kblam_ray.evaluation import interference
from kblam_ray.evaluation.interference import measure_interference, unrelated_texts
from kblam_ray.evaluation.questions import drawn_rows
from kblam_ray.evaluation.run import prior_set
from kblam_ray.model.embedded_memory import memory_of

FACTS = synthetic(64)
TEXTS = ["Good morning! Did you sleep well?", "Chop the onions, then warm some oil.", "早上好", "Yes"]
FIGURES = ("perplexity", "perplexity_ratio", "divergence", "agreement", "kb_mass")
ANSWER_FIGURES = ("answer_divergence", "answer_agreement", "answer_kb_mass")


@pytest.fixture(scope="module")
def model():
    model = tiny_model(question_prior=20.0, prior_lexical=0.5)
    model.base_model.double()
    model.adapter.double()
    return model


@pytest.fixture(scope="module")
def measured(model):
    return measure_interference(model, FACTS, [0, 8, 64], texts=TEXTS)


def plain(model, text: str, num_facts: int, has_prior: bool, selection: str = "all") -> dict[str, list]:
    """What is measured of one text, token by token, from whole outputs of the model."""
    messages = [{"role": "user", "content": text}]
    ids = model.chat.render(messages)
    # The prompt is a header, the text and a footer: letters alone tell where the text begins and ends.
    head = model.chat.render([{"role": "user", "content": "#"}]).index(model.tokenizer.encode("#")[0])
    footer = len(model.chat.render([{"role": "user", "content": "#"}])) - head - 1
    memory = memory_of(model.adapter, FACTS, drawn_rows(FACTS, num_facts, 0, lambda name: True))
    with torch.no_grad(), prior_set(model.adapter, has_prior):
        request = model.prepare(memory, messages, selection)
        row = torch.tensor([ids])
        base, found = (model(row, knowledge=given).logits[0].log_softmax(1) for given in (None, request))
        layers = model.adapter.config.layers
        shares = trace(model.attachment, torch.tensor([[*ids, 0]]), request, 1, 1, layers=layers).kb_shares[0].mean(0)
    before = range(head - 1, len(ids) - footer - 1)
    return {
        "base_loss": [-float(base[at, ids[at + 1]]) for at in before],
        "loss": [-float(found[at, ids[at + 1]]) for at in before],
        "divergence": [float((base[at].exp() * (base[at] - found[at])).sum()) for at in [*before, len(ids) - 1]],
        "agreement": [bool(base[at].argmax() == found[at].argmax()) for at in [*before, len(ids) - 1]],
        "kb_mass": [float(shares[at]) for at in [*before, len(ids) - 1]],
    }


def values(point) -> dict[str, float]:
    return {name: point[name]["value"] for name in (*FIGURES, *ANSWER_FIGURES)}


@pytest.mark.parametrize("place", range(2, 6))
def test_every_figure_is_the_plain_computation_s(model, measured, place):
    point = measured["points"][place]
    found = [plain(model, text, point["num_facts"], point["prior"]) for text in TEXTS]

    def mean(name: str, *, answers: bool = False) -> float:
        return float(np.mean([one for text in found for one in (text[name][-1:] if answers else text[name][:-1])]))

    losses = {name: np.mean([one for text in found for one in text[name]]) for name in ("loss", "base_loss")}
    expected = {
        "perplexity": math.exp(losses["loss"]),
        "perplexity_ratio": math.exp(losses["loss"] - losses["base_loss"]),
        **{name: mean(name) for name in ("divergence", "agreement", "kb_mass")},
        **{f"answer_{name}": mean(name, answers=True) for name in ("divergence", "agreement", "kb_mass")},
    }
    assert values(point) == {name: pytest.approx(value, rel=2e-3, abs=1e-4) for name, value in expected.items()}
    # A random adapter is noticed: these figures could not be those of another size.
    assert point["divergence"]["value"] > 1e-3
    assert 0 < point["kb_mass"]["value"] < 1
    assert measured["num_tokens"] == sum(len(text["loss"]) for text in found)


def test_the_points_and_their_counts(measured):
    assert [(point["num_facts"], point["prior"]) for point in measured["points"]] == [
        (0, False), (0, True), (8, False), (8, True), (64, False), (64, True),
    ]  # fmt: skip
    assert (measured["num_texts"], measured["seed"]) == (4, 0)
    for point in measured["points"]:
        assert point["selection"] == "all"
        for name in (*FIGURES, *ANSWER_FIGURES):
            assert point[name]["count"] == 4
            assert point[name]["low"] <= point[name]["value"] <= point[name]["high"]
    small, large = measured["points"][2], measured["points"][4]
    assert values(small) != values(large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_facts_it_is_exactly_the_base_model(dtype):
    model = tiny_model("paper")
    model.base_model.to(dtype)
    found = measure_interference(model, FACTS, [0], texts=TEXTS)
    (point,) = found["points"]
    assert point["prior"] is False
    for name, value in {
        "perplexity_ratio": 1.0, "divergence": 0.0, "agreement": 1.0, "kb_mass": 0.0,
        "answer_divergence": 0.0, "answer_agreement": 1.0, "answer_kb_mass": 0.0,
    }.items():  # fmt: skip
        assert (point[name]["value"], point[name]["low"], point[name]["high"]) == (value, value, value)
    assert point["perplexity"]["value"] > 1


def test_the_intervals_are_of_texts_drawn_again_in_pairs(model, measured):
    # Of one text there is nothing to draw; of texts alike neither, though perplexity itself is far from 1.
    for texts in (TEXTS[:1], TEXTS[:1] * 3):
        (_, point) = measure_interference(model, FACTS, [8], texts=texts)["points"]
        for name in FIGURES:
            assert point[name]["low"] == pytest.approx(point[name]["high"], abs=1e-3)
    found = [plain(model, text, 64, True) for text in TEXTS]
    samples = np.random.default_rng(0).integers(len(TEXTS), size=(1000, len(TEXTS)))
    more = np.array([sum(text["loss"]) - sum(text["base_loss"]) for text in found])
    tokens = np.array([len(text["loss"]) for text in found])
    low, high = np.quantile(np.exp(more[samples].sum(1) / tokens[samples].sum(1)), (0.025, 0.975))
    ratio = measured["points"][5]["perplexity_ratio"]
    assert (ratio["low"], ratio["high"]) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert high - low > 0.01


def test_it_makes_no_difference_whether_the_base_model_s_logits_are_kept(model, measured, monkeypatch):
    # Room for the first of the texts.
    monkeypatch.setattr(interference, "_NUMBERS_KEPT", 40 * model.base_model.config.vocab_size)
    assert measure_interference(model, FACTS, [0, 8, 64], texts=TEXTS) == measured


def test_a_selection_is_the_one_of_a_request(model):
    found = measure_interference(model, FACTS, [64], texts=TEXTS[:2], selection="similar:2")
    for point in found["points"]:
        assert point["selection"] == "similar:2"
        one_by_one = [plain(model, text, 64, point["prior"], "similar:2") for text in TEXTS[:2]]
        expected = np.mean([one for text in one_by_one for one in text["kb_mass"][:-1]])
        assert point["kb_mass"]["value"] == pytest.approx(expected, rel=2e-3)


def test_the_model_is_left_as_it_was(model):
    layers = model.base_model.model.layers
    model.base_model.train()
    layers[0].eval()
    told = []
    try:
        measure_interference(model, FACTS, [0, 8], texts=TEXTS[:1], progress=told.append)
        assert [layer.training for layer in layers[:2]] == [False, True]
    finally:
        model.base_model.eval()
    assert (model.adapter.config.question_prior, model.adapter.config.prior_lexical) == (20.0, 0.5)
    assert told == [
        "0 facts: reading 1 texts that need none",
        "0 facts with the question prior: reading 1 texts that need none",
        "8 facts: reading 1 texts that need none",
        "8 facts with the question prior: reading 1 texts that need none",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": [0, 65]}, "65 facts of 64"),
        ({"sizes": []}, "0 or more"),
        ({"sizes": [-1]}, "0 or more"),
        ({"sizes": [8], "texts": []}, "no texts"),
        ({"sizes": [8], "texts": ["Good morning!", "  "]}, "without a token"),
        ({"sizes": [8], "selection": "near"}, "selection"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(model, given, message):
    told = []
    with pytest.raises(InputError, match=message):
        measure_interference(model, FACTS, **{"texts": TEXTS, "progress": told.append, **given})
    assert not told


def test_facts_of_another_encoder_are_refused(model):
    from kblam_ray.encoders import load_encoder
    from kblam_ray.facts.fact import Fact
    from kblam_ray.table.embedded import EmbeddedFacts

    assert ENCODER.spec.dim != 32
    other = EmbeddedFacts.embed([Fact("Ur", "age", "old")], load_encoder("hashing:32"))
    with pytest.raises(EncoderMismatchError):
        measure_interference(model, other, [0, 1], texts=TEXTS)


def test_no_encoder_is_loaded_where_none_is_needed():
    model = tiny_model()
    model._encoder = "no-such-encoder"
    found = measure_interference(model, FACTS, [8], texts=TEXTS[:1])
    assert [point["prior"] for point in found["points"]] == [False]


def test_the_texts_of_the_package():
    texts = unrelated_texts()
    assert len(texts) == len(set(texts)) >= 40
    assert all(text == text.strip() and "\n" not in text for text in texts)
    # No names or numbers that a knowledge base could know.
    assert not any(letter.isdigit() for text in texts for letter in text)
    assert any(not text.isascii() for text in texts)
