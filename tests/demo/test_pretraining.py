"""Making the demo's base model: its facts, documents and tokenizer, and a training that can be gone on with."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from kblam_ray.demo.pretraining.batches import Steps
from kblam_ray.demo.pretraining.documents import MOST_FACTS, DocumentMaker
from kblam_ray.demo.pretraining.facts import pretraining_facts
from kblam_ray.demo.pretraining.prepare import prepare
from kblam_ray.demo.pretraining.settings import PretrainSettings
from kblam_ray.demo.pretraining.train import pretrain
from kblam_ray.errors import InputError, TrainingError
from kblam_ray.facts.questions import REFUSAL
from kblam_ray.facts.split import is_held_out
from kblam_ray.model.chat import ChatTemplate

TINY = {
    "num_facts": 300,
    "adapter_facts": 40,
    "vocabulary": 600,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 2,
    "wiring_questions": 200,
    "mlp_size": 48,
    "steps": 6,
    "questions_per_step": 6,
    "readings_per_step": 3,
    "repeats_per_step": 2,
    "warmup_steps": 2,
    "checkpoint_steps": 3,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo-model")
    return folder, *prepare(PretrainSettings(output=str(folder), **TINY))


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepared[3]


def test_facts_are_many_kinds_each_once_and_none_is_held_out():
    words = ["walnut", "bridge", "##ing", "水", "山", "한"]
    facts = list(pretraining_facts(words, 2_000, 3))
    assert len({(fact.entity, fact.property) for fact in facts}) == 2_000
    assert not any(is_held_out(fact.entity) for fact in facts)
    assert facts[:500] == list(pretraining_facts(words, 500, 3))
    assert any("walnut" in fact.entity for fact in facts)
    assert not any("##" in fact.entity + fact.property + fact.value for fact in facts)
    assert facts[:500] != list(pretraining_facts(words, 500, 4))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_facts_for_the_adapters_are_others(prepared):
    folder, facts, _, _ = prepared
    others = [json.loads(line) for line in (folder / "adapter_facts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(others) == 40
    assert not {(row["entity"], row["property"]) for row in others} & {(f.entity, f.property) for f in facts}


def test_digits_are_tokens_of_their_own(tokenizer):
    tokens = tokenizer.tokenize("A7-2048")
    assert [token for token in tokens if token.isdigit()] == ["7", "2", "0", "4", "8"]


def test_documents_are_what_the_chat_template_makes(prepared):
    _, facts, _, tokenizer = prepared
    chat, maker = ChatTemplate(tokenizer), DocumentMaker(facts, 0)
    for number in range(30):
        for document in (maker.question(number), maker.reading(number, 1.0), maker.repeating(number)):
            ids = tokenizer.encode(document.prompt, add_special_tokens=False)
            answer = tokenizer.encode(document.answer, add_special_tokens=False)
            turns = document.prompt.removesuffix("<|assistant|>").split("<|end|>")[:-1]
            messages = [
                {"role": role, "content": content}
                for role, content in (turn.removeprefix("<|").split("|>", 1) for turn in turns)
            ]
            assert chat.render_with_answer(messages, document.answer.removesuffix("<|end|>")) == (
                ids + answer,
                len(ids),
            )


def test_documents_of_every_kind(prepared):
    _, facts, _, _ = prepared
    maker = DocumentMaker(facts, 0)
    readings = [maker.reading(number, 1.0) for number in range(200)]
    for number in range(50):
        document = maker.repeating(number)
        assert f"Repeat: {document.answer}" in document.prompt
    read = [document for document in readings if "\n- the " in document.prompt]
    assert {document.answer == REFUSAL + "<|end|>" for document in read} == {True, False}
    assert max(document.prompt.count("\n- the ") for document in read) <= MOST_FACTS + 2
    for document in read:
        if document.answer != REFUSAL + "<|end|>":
            value = document.answer.removesuffix("<|end|>").split(" is ", 1)[-1].split(".")[0]
            assert value.split(" and ")[0].split(",")[0] in document.prompt
    questions = [maker.question(number) for number in range(100)]
    assert {document.answer == REFUSAL + "<|end|>" for document in questions} == {True, False}
    for document in questions:
        for start, end in document.values:
            assert 0 < start < end <= len(document.answer)
            assert document.answer[start:end] not in document.prompt


def test_a_step_asks_for_facts_among_its_candidates(prepared):
    _, facts, _, tokenizer = prepared
    steps = Steps(facts, tokenizer, PretrainSettings(**TINY), start=2)
    assert len(steps) == 4
    step = steps[1]
    candidates = step.candidates_C.tolist()
    assert len(set(candidates)) == len(candidates)
    for batch in step.micro_batches:
        assert set(batch.asked_Q.tolist()) <= set(candidates)
        assert len(batch.targets_A) == len(batch.answer_rows_A) == len(batch.weights_A)
        # The token after an answer's place is its target, wherever that is read at all.
        flat = batch.input_ids_BT.flatten()
        inside = (batch.answer_rows_A + 1) % batch.input_ids_BT.shape[1] != 0
        following = flat[batch.answer_rows_A[inside] + 1]
        read = batch.mask_BT.flatten()[batch.answer_rows_A[inside] + 1] == 1
        assert torch.equal(following[read], batch.targets_A[inside][read])
    again = Steps(facts, tokenizer, PretrainSettings(**TINY), start=3)[0]
    assert torch.equal(again.candidates_C, step.candidates_C)


def test_a_training_gone_on_with_is_the_same_training(prepared, tmp_path):
    folder = prepared[0]
    whole = pretrain(PretrainSettings(output=str(folder), **TINY))
    parameters = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for name in ("tokenizer", next(folder.glob("keys-*")).name):
        (tmp_path / name).symlink_to(folder / name)
    # The rate of learning depends on how many steps there are: the first part stops, as a killed one would, in between.
    settings_ = PretrainSettings(output=str(tmp_path), **TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "__len__", lambda self: max(0, 3 - self._start))
        pretrain(settings_)
    summary = pretrain(settings_.model_copy(update={"resume": True}))
    assert summary["steps"] == whole["steps"] == 6
    assert summary["tokens"] == whole["tokens"]
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in parameters.items():
        assert torch.equal(weight, resumed[name]), name
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="no vocabulary"):
        prepare(PretrainSettings(output=str(tmp_path), **{**TINY}, encoder="hashing"))
    with pytest.raises(ValueError, match="as many key/value heads"):
        PretrainSettings(num_heads=4, num_kv_heads=2)
    with pytest.raises(TrainingError, match="no checkpoint"):
        pretrain(PretrainSettings(output=str(tmp_path), **TINY, resume=True))
