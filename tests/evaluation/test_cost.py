"""What is measured is one answer after the other, in turns, with the memory that each takes."""

from __future__ import annotations

import pytest
import torch
from evaluation_samples import ENCODER, synthetic, tiny_model
from model_samples import llama_tokenizer, tiny_adapter, tiny_llama

from kblam_ray.encoders import load_encoder
from kblam_ray.errors import EncoderMismatchError, InputError
from kblam_ray.evaluation import cost
from kblam_ray.evaluation.baselines.prompts import reading_messages
from kblam_ray.evaluation.cost import measure_cost
from kblam_ray.evaluation.questions import Asked, drawn_rows
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import QuestionMaker
from kblam_ray.model import KnowledgeModel
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.table.embedded import EmbeddedFacts

FACTS = synthetic(40)
POINT = [
    "way", "selection", "num_facts", "fits", "prompt_tokens", "first_token_s", "per_token_s", "first_token_ratio",
    "per_token_ratio", "knowledge_bytes", "cache_bytes", "load_s",
]  # fmt: skip
FIGURES = ("first_token_s", "per_token_s", "first_token_ratio", "per_token_ratio")


def roomy_model(max_positions: int = 1_024) -> KnowledgeModel:
    base = tiny_llama(0, max_position_embeddings=max_positions)
    adapter = tiny_adapter(base, "shared", question_prior=20.0)
    return KnowledgeModel(base, adapter, llama_tokenizer(), ENCODER)


@pytest.fixture(scope="module")
def model():
    return roomy_model()


@pytest.fixture(scope="module")
def found(model):
    return measure_cost(model, FACTS, [0, 8, 40], selections=["all", "similar:3"], new_tokens=3, rounds=2)


def test_a_point_for_each_size_and_way(found):
    assert {name: found[name] for name in ("new_tokens", "rounds", "device", "limit_tokens")} == {
        "new_tokens": 3, "rounds": 2, "device": "cpu", "limit_tokens": 1_024,
    }  # fmt: skip
    assert found["threads"] == torch.get_num_threads()
    ways = [
        ("zero_shot", None),
        ("attention", "all"),
        ("attention", "similar:3"),
        ("in_context", None),
        ("dense", None),
    ]
    points = found["points"]
    assert [(point["num_facts"], point["way"], point["selection"]) for point in points] == [
        (size, *way) for size in (0, 8, 40) for way in ways
    ]
    for point in points:
        assert list(point) == POINT
        assert point["fits"] is not (point["way"] == "in_context" and point["num_facts"] == 40)
        for name in FIGURES:
            figure = point[name]
            if not point["fits"]:
                assert figure == {"value": None, "low": None, "high": None, "count": 0}
                continue
            assert 0 < figure["low"] <= figure["value"] <= figure["high"]
            assert figure["count"] == 2
            if point["way"] == "zero_shot" and name.endswith("ratio"):
                assert figure["low"] == figure["high"] == 1


def test_memory_is_what_is_held(model, found):
    layers = model.base_model.config.num_hidden_layers
    questions = asked(2)
    for point in found["points"]:
        size, way = point["num_facts"], point["way"]
        facts = FACTS.take(drawn_rows(FACTS, size, 0, lambda entity: True))
        # Keys and values of two heads of 8 float32 numbers.
        assert point["cache_bytes"] == point["prompt_tokens"] * 2 * layers * 2 * 8 * 4
        read = {"zero_shot": [()], "attention": [()], "in_context": [facts.facts], "dense": []}[way]
        for texts in read:
            lengths = [len(model.chat.render(reading_messages(question, texts))) for question in questions]
            assert point["prompt_tokens"] == (max(lengths[1:]) if point["fits"] else max(lengths))
        assert (point["load_s"] is not None) is (way == "attention")
        if way in ("zero_shot", "in_context"):
            assert point["knowledge_bytes"] == 0
        elif way == "attention" and size:
            # At least the embeddings of keys and values; what was derived comes on top.
            plain = memory_of(model.adapter, facts).nbytes
            assert plain <= point["knowledge_bytes"] < 3 * plain
            assert plain > 2 * facts.keys_MP.nbytes
        elif way == "dense":
            texts = "".join(fact.entity + fact.property + fact.value for fact in facts.facts)
            assert point["knowledge_bytes"] == facts.keys_MP.nbytes + len(texts.encode())


def asked(rounds: int) -> list[Asked]:
    maker = QuestionMaker(FACTS.facts, 0)
    return [Asked.of(maker.make("simple", number)) for number in range(rounds + 1)]


class Clock:
    """Every call takes one second of this clock; the clock runs slower from round to round."""

    now = 1.0

    def __init__(self, device: str) -> None:
        pass

    def seconds(self, call):
        return Clock.now, call()


def test_ratios_are_of_the_same_round(model, monkeypatch):
    monkeypatch.setattr(cost, "Machine", Clock)

    def next_round(line: str) -> None:
        Clock.now *= 10

    Clock.now = 1.0
    found = measure_cost(model, FACTS, [8], new_tokens=5, rounds=3, progress=next_round)
    by_way = {point["way"]: point for point in found["points"]}
    # Attending and searching come before the prompt is read, and count.
    for way, seconds in (("zero_shot", 1), ("attention", 2), ("in_context", 1), ("dense", 2)):
        point = by_way[way]
        assert point["first_token_ratio"] == {"value": seconds, "low": seconds, "high": seconds, "count": 3}
        assert point["per_token_ratio"] == {"value": 1, "low": 1, "high": 1, "count": 3}
        assert point["first_token_s"] == {"value": 10 * seconds, "low": seconds, "high": 100 * seconds, "count": 3}
        assert point["per_token_s"]["value"] == 10 / 4


def test_ways_take_turns_and_nobody_is_always_first(model, monkeypatch):
    taken: list[tuple[int, bool]] = []
    plain_answer = cost._Size._answer

    def answer(self, prompt, memory, before_s=0.0):
        taken.append((len(prompt), memory is not None))
        return plain_answer(self, prompt, memory, before_s)

    monkeypatch.setattr(cost._Size, "_answer", answer)
    measure_cost(model, FACTS, [8], new_tokens=2, rounds=3)
    turns = [taken[start : start + 4] for start in range(0, len(taken), 4)]
    assert len(turns) == 4
    firsts = set()
    for turn in turns:
        # No facts and attention read the same prompt, the other two longer ones.
        (bare,) = [place for place, (length, attends) in enumerate(turn) if attends]
        assert sorted(length for length, _ in turn)[:2] == [turn[bare][0]] * 2
        assert len({length for length, _ in turn}) == 3
        firsts.add(bare)
    assert len(firsts) > 1


@pytest.mark.parametrize("selection", ["all", "similar:2"])
def test_the_tokens_are_those_of_generate(model, monkeypatch, selection):
    steps: dict[int, list[int]] = {}
    plain_step = cost._Size._step
    plain_answer = cost._Size._answer
    answers: list[bool] = []

    def answer(self, prompt, memory, before_s=0.0):
        answers.append(memory is not None)
        return plain_answer(self, prompt, memory, before_s)

    def step(self, ids_BT, cache):
        cache, token = plain_step(self, ids_BT, cache)
        steps.setdefault(len(answers), []).append(int(token))
        return cache, token

    monkeypatch.setattr(cost._Size, "_answer", answer)
    monkeypatch.setattr(cost._Size, "_step", step)
    measure_cost(model, FACTS, [40], selections=[selection], new_tokens=6, rounds=1)
    memory = memory_of(model.adapter, FACTS)
    # Of each round the turns of attention and of no facts; the order moves on by one.
    ways = ["zero_shot", "attention", "dense"]
    for number, question in enumerate(asked(1)):
        messages = list(question.messages)
        prompt = torch.tensor([model.chat.render(messages)])
        for way in ("zero_shot", "attention"):
            turn = 3 * number + (ways[number:] + ways[:number]).index(way)
            assert answers[turn] is (way == "attention")
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                knowledge=model.prepare(memory, messages, selection) if way == "attention" else None,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
            )
            assert steps[turn + 1] == ids[0, prompt.shape[1] :].tolist()


def test_all_facts_fit_up_to_the_last_token(monkeypatch):
    model = roomy_model()
    longest = max(len(model.chat.render(reading_messages(question, FACTS.facts))) for question in asked(1))
    for room, fits in ((longest + 2, True), (longest + 1, False)):
        monkeypatch.setattr(model.base_model.config, "max_position_embeddings", room)
        found = measure_cost(model, FACTS, [40], new_tokens=2, rounds=1)
        (point,) = [point for point in found["points"] if point["way"] == "in_context"]
        assert point["fits"] is fits
        assert found["limit_tokens"] == room


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": [8, 41]}, "41 facts of 40"),
        ({"sizes": [-1]}, "-1 facts"),
        ({"sizes": []}, "nothing to measure"),
        ({"selections": []}, "nothing to measure"),
        ({"selections": ["near:3"]}, "near:3"),
        ({"new_tokens": 1}, "1 tokens"),
        ({"rounds": 0}, "0 rounds"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(changed, message):
    model, told = tiny_model(question_prior=1.0), []
    model._encoder = "no-such-encoder"
    with pytest.raises(InputError, match=message):
        measure_cost(model, FACTS, **{"sizes": [8], "progress": told.append, **changed})
    assert not told


def test_facts_of_another_encoder_are_refused(model):
    other = EmbeddedFacts.embed([Fact("Ur", "age", "old")], load_encoder("hashing:32"))
    with pytest.raises(EncoderMismatchError):
        measure_cost(model, other, [1])


def test_a_model_in_training_goes_on_as_it_was(model):
    model.base_model.train()
    try:
        measure_cost(model, FACTS, [0], new_tokens=2, rounds=1)
        assert all(module.training for module in model.base_model.modules())
    finally:
        model.base_model.eval()
