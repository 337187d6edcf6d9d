"""Questions: what they ask can be found, what they cannot answer is truly not there, and any table will do."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from kblam_ray.errors import InputError
from kblam_ray.facts import Fact
from kblam_ray.facts.questions import DEFAULT_MIX, QUESTION_KINDS, REFUSAL, Question, QuestionMaker, forms
from kblam_ray.facts.questions.misspelling import misspell
from kblam_ray.facts.synthetic import PROPERTY_TYPES, SyntheticFacts
from kblam_ray.facts.synthetic.draws import Draws

FACTS = list(SyntheticFacts(3).facts(0, 640))
PAIRS = {(fact.entity, fact.property) for fact in FACTS}
NUMBERS = range(300)


def ask(kind: str, facts: list[Fact] = FACTS, seed: int = 1) -> list[Question]:
    maker = QuestionMaker(facts, seed)
    return [maker.make(kind, number) for number in NUMBERS]  # type: ignore[arg-type]


def test_there_are_paraphrases_enough_and_each_names_what_it_asks() -> None:
    assert len(set(forms.SIMPLE_FORMS)) >= 16
    assert all("{e}" in form and "{p}" in form for form in forms.SIMPLE_FORMS)
    assert sum("{p} of {e}" not in form for form in forms.SIMPLE_FORMS) >= 8
    used = {form for question in ask("simple") for form in forms.SIMPLE_FORMS if _fits(form, question)}
    assert used == set(forms.SIMPLE_FORMS)


def _fits(form: str, question: Question) -> bool:
    ((entity, property),) = question.asked
    return question.text == form.format(e=entity, p=property)


@pytest.mark.parametrize("kind", [kind for kind in QUESTION_KINDS if kind != "unanswerable"])
def test_every_answer_states_the_values_of_the_facts_it_names(kind: str) -> None:
    for question in ask(kind):
        assert question.kind == kind
        assert question.facts
        assert {(FACTS[n].entity, FACTS[n].property) for n in question.facts} == set(question.asked)
        assert tuple(FACTS[n].value for n in question.facts) == question.values
        assert all(value in question.answer for value in question.values)
        assert question.reason is None


def test_a_paraphrase_names_the_entity_and_not_the_property() -> None:
    for question in ask("paraphrase"):
        ((entity, property),) = question.asked
        assert entity in question.text
        assert property.casefold() not in question.text.replace(entity, "").casefold()


def test_a_misspelt_entity_is_nearly_right_and_nobody_elses_name() -> None:
    names = {fact.entity for fact in FACTS}
    for question in ask("misspelt"):
        ((entity, property),) = question.asked
        assert entity not in question.text.split() or " " in entity
        wrong = next(
            question.text[len(head) : -len(tail) or None]
            for head, tail in (form.format(p=property, e="\0").split("\0") for form in forms.SIMPLE_FORMS)
            if question.text.startswith(head) and question.text.endswith(tail)
        )
        assert wrong != entity
        assert wrong not in names
        assert abs(len(wrong) - len(entity)) <= 1


def test_misspelling_leaves_short_names_alone() -> None:
    assert misspell("Ur", Draws(1)) is None
    assert misspell("12-34", Draws(1)) is None
    assert {misspell("Lyon", Draws(n)) for n in range(100)} >= {"Loyn", "Lyyon", "Lon", "Lyo"}


def test_two_entity_questions_ask_about_two() -> None:
    questions = ask("two_entity")
    for question in questions:
        (first, _), (second, _) = question.asked
        assert first != second
        assert first in question.text
        assert second in question.text
    assert len({len({pair[1] for pair in question.asked}) for question in questions}) == 2


def test_a_follow_up_names_nothing_and_its_context_does() -> None:
    for question in ask("follow_up"):
        ((entity, property),) = question.asked
        assert entity not in question.text
        assert property in question.text
        asked_before, answered = question.context
        assert entity in asked_before
        assert entity in answered


def test_an_open_ended_answer_tells_all_there_is() -> None:
    for question in ask("open_ended"):
        entity = question.asked[0][0]
        expected = [n for n, fact in enumerate(FACTS) if fact.entity == entity]
        assert list(question.facts) == expected[:6]


def test_unanswerable_questions_have_no_fact_and_come_for_every_reason() -> None:
    entities, properties = {fact.entity for fact in FACTS}, {fact.property for fact in FACTS}
    questions = ask("unanswerable")
    for question in questions:
        assert question.asked[0] not in PAIRS
        assert (question.answer, question.facts, question.values) == (REFUSAL, (), ())
        ((entity, property),) = question.asked
        assert entity in question.text
        if question.reason == "same_entity":
            assert entity in entities
        elif question.reason == "same_property":
            assert property in properties
        else:
            assert entity not in entities
    reasons = Counter(question.reason for question in questions)
    assert min(reasons[r] for r in ("same_entity", "same_property", "unknown_entity")) > 60
    near = [q for q in questions if q.reason == "same_property" and q.asked[0][0] not in entities]
    assert near, "near-duplicates of entities in the table must be asked about too"


def test_the_same_seed_asks_the_same_and_another_something_else() -> None:
    maker = QuestionMaker(FACTS, 5)
    whole = list(maker.questions(0, 200))
    assert list(QuestionMaker(FACTS, 5).questions(50, 120)) == whole[50:120]
    assert list(QuestionMaker(FACTS, 6).questions(0, 200)) != whole


def test_the_mixture_has_its_shares() -> None:
    counts = Counter(question.kind for question in QuestionMaker(FACTS, 2).questions(0, 4_000))
    for kind, share in DEFAULT_MIX.items():
        assert abs(counts[kind] / 4_000 - share) < 0.03, kind
    only = list(QuestionMaker(FACTS).questions(0, 50, {"unanswerable": 0, "simple": 3}))
    assert {question.kind for question in only} == {"simple"}


def test_any_table_will_do() -> None:
    countries = [Fact("Chad", "capital", "N'Djamena"), Fact("Chad", "xyz code", "TD"), Fact("Peru", "capital", "Lima")]
    maker = QuestionMaker(countries)
    assert set(maker.possible_kinds()) == set(QUESTION_KINDS)
    nouns = QuestionMaker([Fact("cat", "gloss", "an animal")])
    assert nouns.possible_kinds() == ("simple", "open_ended", "unanswerable")
    for kind in nouns.possible_kinds():
        for number in range(30):
            assert nouns.make(kind, number).text
    with pytest.raises(InputError, match="allows no 'follow_up'"):
        nouns.make("follow_up", 0)
    with pytest.raises(InputError, match=r"'two_entity' questions.*this table allows simple"):
        list(nouns.questions(0, 1, {"two_entity": 1}))
    with pytest.raises(InputError, match="no kind of question"):
        nouns.make("riddle", 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no facts to ask about"):
        QuestionMaker([])


def test_many_values_of_one_property_are_one_question() -> None:
    facts = [Fact("Ada", "child", "Byron"), Fact("Ada", "child", "Anne"), Fact("Ada", "child", "Ralph")]
    question = QuestionMaker(facts).make("simple", 0)
    assert question.facts == (0, 1, 2)
    assert question.answer == "The child of Ada is Byron, Anne and Ralph."


def test_chinese_japanese_and_korean_facts_are_asked_in_their_language() -> None:
    facts = [
        Fact("AI", "description", "人工智能是模拟人类智能的技术"),
        Fact("김치", "설명", "한국의 전통 음식"),
        Fact("富士山", "標高", "3776メートル"),
    ]
    texts = {question.text for question in ask("simple", facts)}
    assert {"AI是什么?", "김치의 설명은(는) 무엇인가요?", "富士山の標高は何ですか?"} <= texts
    assert not any("description" in text for text in texts)
    answers = {question.answer for question in ask("simple", facts)}
    assert answers == {"人工智能是模拟人类智能的技术", "한국의 전통 음식", "The 標高 of 富士山 is 3776メートル."}


def test_only_descriptions_in_those_scripts_are_stated_without_a_frame() -> None:
    assert forms.answer_sentence("AI", "Description", ["人工智能"]) == "人工智能"
    assert forms.answer_sentence("AI", "definition", ["人工智能", "人工知能とは技術"]) == "人工智能 人工知能とは技術"
    assert forms.answer_sentence("AI", "description", ["a field"]) == "The description of AI is a field."
    assert forms.answer_sentence("AI", "definition", ["人工智能", "a field"]).startswith("The definition of AI is ")
    assert forms.answer_sentence("AI", "description", ["人工智能(artificial intelligence)是技术"]).startswith(
        "人工智能("
    )
    assert forms.answer_sentence("Ur", "description", ["was closed by マムニリ"]).startswith(
        "The description of Ur is "
    )
    assert forms.answer_sentence("北京", "country", ["中国"]) == "The country of 北京 is 中国."


def test_known_properties_of_real_tables_can_be_paraphrased() -> None:
    assert {"capital", "currency", "population", "continent"} <= set(PROPERTY_TYPES)
    json.dumps([question.text for question in ask("paraphrase", [Fact("Chad", "capital", "N'Djamena")])])


def test_the_conversation_that_asks_a_question():
    alone = Question("simple", "q", "a", (0,), ("v",), (("e", "p"),))
    assert alone.messages == [{"role": "user", "content": "q"}]
    followed = Question("follow_up", "and?", "a", (0,), ("v",), (("e", "p"),), ("first?", "answer"))
    assert [(turn["role"], turn["content"]) for turn in followed.messages] == [
        ("user", "first?"),
        ("assistant", "answer"),
        ("user", "and?"),
    ]


@pytest.mark.parametrize(
    ("question", "entity", "is_one"),
    [
        ("AI是什么?", "AI", True),
        ("什么是AI？", "AI", True),
        ("what is  AI", "AI", True),
        ("Tell me about AI.", "AI", True),
        ("KBLaM은 무엇인가요?", "KBLaM", True),
        ("AIとは何ですか?", "AI", True),
        ("What is the price of AI?", "AI", False),
        ("What is AI II?", "AI", False),
        ("AI的价格是什么?", "AI", False),
    ],
)
def test_what_an_entity_is_and_what_it_has_are_told_apart(question, entity, is_one):
    start = question.index(entity)
    assert forms.asks_what_it_is(question, start, start + len(entity)) == is_one
