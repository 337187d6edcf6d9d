"""Only the answer and the token that ends it carry loss, in every supported template; and each token knows its fact."""

from __future__ import annotations

import functools

import pytest
from model_samples import llama_tokenizer, phi_tokenizer, qwen_tokenizer
from training.mix_samples import embedded
from transformers import AutoTokenizer

from kblam_ray.demo.shipped import BASE_MODEL
from kblam_ray.facts.questions import REFUSAL, Question
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.model.chat_templates import BUILT_IN
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.mix import MixSettings
from kblam_ray.training.mix.batches import TrainingBatch
from kblam_ray.training.mix.examples import TEXT, ExampleMaker
from kblam_ray.training.mix.labels import fact_of_token, value_ends

OWN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CASES = {
    "llama-3": (llama_tokenizer, None),
    "phi-3": (phi_tokenizer, None),
    "qwen": (qwen_tokenizer, None),
    "one of its own": (llama_tokenizer, OWN),
    **{
        f"built-in {name}": ({"chatml": qwen_tokenizer, "kblam-phi-3": phi_tokenizer}.get(name, llama_tokenizer), name)
        for name in BUILT_IN
    },
}


@functools.cache
def facts() -> EmbeddedFacts:
    return embedded(
        ("Peru", "capital", "Lima"),
        ("Peru", "population", "34 million"),
        ("Peru", "motto", "is, and was."),
        ("Is and", "capital", "a"),
        ("Is and", "code", "B7-x/ 9"),
        ("北京", "国家", "中国 — 亚洲"),
        ("北京", "描述", "中国的首都。"),
        ("Ελλάδα", "πρωτεύουσα", "Αθήνα 🏛"),
        ("<|eot_id|>", "markup", "<|end|><|im_end|></s>"),
        ("Peru and Is", "slogan", "The capital of Peru is Lima."),
    )


def maker_for(case: str) -> ExampleMaker:
    tokenizer, template = CASES[case]
    settings = MixSettings(
        batch_size=10, held_out=0, kb_size=(6, 9), max_tokens=800, question_mix={
            "simple": 1, "two_entity": 1, "open_ended": 1, "follow_up": 1, "unanswerable": 1
        },
    )  # fmt: skip
    return ExampleMaker(facts(), ChatTemplate(tokenizer(), template), settings)


@pytest.mark.parametrize("case", CASES)
def test_the_unmasked_labels_are_the_answer_and_the_end_of_its_turn(case):
    maker = maker_for(case)
    tokenizer, end = maker.chat.tokenizer, maker.chat.end_of_turn_id
    seen = set()
    for step in range(4):
        examples = [maker.example(10 * step + place) for place in range(10)]
        batch = TrainingBatch.collate(examples, maker)
        for row, example in enumerate(examples):
            labels = batch.labels_BT[row]
            kept = (labels != -100).nonzero().flatten()
            if example.kind == TEXT:
                assert not len(kept)
                continue
            seen.add(example.kind)
            question = next(maker._questions.attempts(example.kind, example.number)).question
            # One run of positions, to the end of the row, and each is the token that stands there.
            assert kept.tolist() == list(range(example.answer_start, len(example.input_ids)))
            assert (labels[kept] == batch.input_ids_BT[row, kept]).all()
            assert labels[kept[-1]] == end
            assert tokenizer.decode(labels[kept[:-1]]).strip() == question.answer
            prompt = tokenizer.decode(batch.input_ids_BT[row, : kept[0]])
            assert question.text.replace(" ", "") in prompt.replace(" ", "")
    assert seen >= {"simple", "two_entity", "open_ended", "follow_up", "unanswerable"}


@pytest.mark.parametrize("case", CASES)
def test_each_token_of_a_value_goes_to_its_fact(case):
    maker = maker_for(case)
    tokenizer = maker.chat.tokenizer
    checked = 0
    for number in range(40):
        example = maker.example(number)
        if example.kind in (TEXT, "unanswerable"):
            continue
        question = next(maker._questions.attempts(example.kind, example.number)).question
        ids, rows = example.input_ids[example.answer_start :].tolist(), example.kb_rows.tolist()
        place_of = {row: rows.index(row) for row in question.facts}
        first = list(place_of.values()) if example.kind == "open_ended" else [place_of[question.facts[0]]]
        assert list(example.wanted[0]) == first
        assert example.wanted_at.min() == example.answer_start - 1
        ends = value_ends(question, maker.facts.facts)
        start = 0
        for row, end in zip(question.facts, ends, strict=True):
            tokens = [
                j for j, places in enumerate(example.wanted) if places == (place_of[row],) or (not j and not start)
            ]
            text = tokenizer.decode([ids[j] for j in tokens])
            # The sentence up to the value, the value whole, and at most what shares a token with its last letter.
            assert "".join(text.split()).startswith("".join(question.answer[start:end].split()))
            assert len(text.strip()) <= len(question.answer[start:end].strip()) + 3
            start = end
            checked += 1
        assert example.wanted[-1] == ()
    assert checked > 30


def test_where_values_end():
    table = facts().facts
    answer = "The capital of Is and is a. The code of Is and is B7-x/ 9."
    question = Question(
        "open_ended", "?", answer, (3, 4), ("a", "B7-x/ 9"), (("Is and", "capital"), ("Is and", "code"))
    )
    ends = value_ends(question, table)
    assert [answer[:end] for end in ends] == ["The capital of Is and is a", answer[:-1]]
    many = embedded(("E", "p", "a"), ("E", "p", "and"), ("E", "p", "a and b")).facts
    answer = "The p of E is a, and and a and b."
    question = Question("simple", "?", answer, (0, 1, 2), ("a", "and", "a and b"), (("E", "p"),))
    assert value_ends(question, many) == [len("The p of E is a"), len("The p of E is a, and"), len(answer) - 1]
    wrong = Question("simple", "?", "It is a.", (0,), ("a",), (("E", "p"),))
    with pytest.raises(AssertionError, match="does not go on with"):
        value_ends(wrong, many)


def test_a_thought_before_the_answer_belongs_to_the_first_fact():
    """Templates may put something between the prompt and the answer."""
    tokenizer = qwen_tokenizer()
    answer = "The p of E is abc. The q of E is xyz."
    ids = tokenizer.encode("<think></think>" + answer, add_special_tokens=False)
    found = fact_of_token(tokenizer, ids, answer, [len("The p of E is abc"), len(answer) - 1])
    assert tokenizer.decode([token for token, fact in zip(ids, found, strict=True) if fact == 0]).endswith("abc")
    assert tokenizer.decode([token for token, fact in zip(ids, found, strict=True) if fact == 1]).endswith("xyz")


def test_the_refusal_is_the_one_given():
    tokenizer = llama_tokenizer()
    maker = ExampleMaker(
        facts(),
        ChatTemplate(tokenizer),
        MixSettings(held_out=0, kb_size=(4, 5), question_mix={"unanswerable": 1}, text_share=0, max_tokens=600),
        refusal="No such thing.",
    )
    example = maker.example(0)
    assert tokenizer.decode(example.input_ids[example.answer_start : -1]) == "No such thing."
    assert REFUSAL not in tokenizer.decode(example.input_ids)


@pytest.mark.skipif(not BASE_MODEL.is_dir(), reason="the demo's base model is not in this copy of the package")
def test_the_demo_models_own_template():
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    CASES["demo"] = (lambda: tokenizer, None)
    test_the_unmasked_labels_are_the_answer_and_the_end_of_its_turn("demo")
    test_each_token_of_a_value_goes_to_its_fact("demo")
