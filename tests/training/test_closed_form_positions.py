"""Which fact is wanted at which token of a question's answer."""

from __future__ import annotations

import pytest
from model_samples import llama_tokenizer, phi_tokenizer, qwen_tokenizer

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import QuestionMaker
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.training.closed_form.positions import (
    COPY,
    NO_FACT,
    OTHER,
    PROMPT,
    VALUE,
    asked_tokens,
    require_some,
)

FACTS = [
    Fact("Peru", "capital", "Lima"),
    Fact("Peru", "population", "34 million"),
    Fact("Ur", "capital", "Ur"),
    Fact("北京", "description", "中国的首都。"),
    Fact("Kárahnjúkar", "code", "X-77/b"),
]
TOKENIZERS = {"llama": llama_tokenizer, "phi": phi_tokenizer, "qwen": qwen_tokenizer}


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("kind", ["simple", "two_entity", "follow_up"])
def test_the_tokens_of_each_value_and_what_comes_before_it_want_its_fact(family, kind):
    chat, maker = ChatTemplate(TOKENIZERS[family]()), QuestionMaker(FACTS, 3)
    for number in range(12):
        question = maker.make(kind, number)
        asked = asked_tokens(chat, question, FACTS)
        assert asked is not None
        assert asked.input_ids[: asked.answer_start] == chat.render(question.messages)
        assert [value.fact for value in asked.values] == list(question.facts)
        last = asked.answer_start - 1
        assert asked.parts[:last] == [OTHER] * last
        assert (asked.parts[last], asked.facts[last]) == (PROMPT, question.facts[0])
        before = last
        for value in asked.values:
            text = chat.tokenizer.decode(asked.input_ids[value.tokens.start : value.tokens.stop])
            assert FACTS[value.fact].value in text
            assert len(text.strip()) <= len(FACTS[value.fact].value) + 1
            # The attention at a token writes the next one. A value that is the whole answer begins at the prompt's end.
            first = max(value.tokens.start - 1, last + 1)
            writers = range(first, value.tokens.stop - 1)
            assert {asked.parts[at] for at in writers} <= {VALUE}
            frame = range(before + 1, value.tokens.start - 1)
            assert {asked.parts[at] for at in frame} <= {COPY}
            assert {asked.facts[at] for at in (*frame, *writers)} <= {value.fact}
            before = value.tokens.stop - 2
        assert asked.parts[before + 1 :] == [OTHER] * (len(asked.parts) - before - 1)


def test_a_value_that_is_also_the_entitys_name_is_found_behind_it():
    chat, maker = ChatTemplate(llama_tokenizer()), QuestionMaker([FACTS[2]], 1)
    question = maker.make("simple", 0)
    asked = asked_tokens(chat, question, [FACTS[2]])
    assert asked is not None
    start = chat.tokenizer.decode(asked.input_ids[asked.answer_start : asked.values[0].tokens.start])
    assert start.strip() == "The capital of Ur is"


def test_an_unanswerable_question_wants_no_fact():
    asked = asked_tokens(ChatTemplate(llama_tokenizer()), QuestionMaker(FACTS, 1).make("unanswerable", 0), FACTS)
    assert asked is not None
    assert set(asked.parts) == {OTHER}
    assert set(asked.facts) == {NO_FACT}


def test_of_an_open_question_only_the_values_want_a_fact():
    asked = asked_tokens(ChatTemplate(llama_tokenizer()), QuestionMaker(FACTS[:2], 1).make("open_ended", 0), FACTS)
    assert asked is not None
    assert set(asked.parts) == {OTHER, VALUE}
    assert [value.fact for value in asked.values] == [0, 1]


def test_several_values_of_one_key_are_one():
    facts = [Fact("Ur", "ruler", "Anna"), Fact("Ur", "ruler", "Bela")]
    chat = ChatTemplate(llama_tokenizer())
    asked = asked_tokens(chat, QuestionMaker(facts, 1).make("simple", 0), facts)
    assert asked is not None
    (value,) = asked.values
    assert chat.tokenizer.decode(asked.input_ids[value.tokens.start : value.tokens.stop]).strip() == "Anna and Bela"


def test_a_tokenizer_that_gives_no_answer_back_is_an_error():
    require_some(1, 2)
    with pytest.raises(InputError, match="gives none back"):
        require_some(0, 2)
