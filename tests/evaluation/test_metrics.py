"""Retrieval, exact match, token F1 and refusal against cases computed by hand."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from kblam_ray.evaluation.metrics import (
    area_under_curve,
    exact_match,
    refusal_report,
    retrieval_ranks,
    retrieved_at,
    token_f1,
)
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.statements import ValueIndex, words
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import QuestionMaker
from kblam_ray.facts.synthetic.generator import SyntheticFacts

PERU = {"given": "What is the capital of Peru?", "names": ["Peru", "capital"], "others": ["Lima", "Paris", "Lima Sur"]}


def test_a_fact_that_another_one_equals_is_not_before_it():
    scores = np.array([0.1, 0.4, 0.2, 0.2, 0.1])
    assert retrieval_ranks(scores, [1]) == [1]
    assert retrieval_ranks(scores, [2, 0]) == [3, 5]
    assert retrieved_at([1], 1)
    assert not retrieved_at([2], 1)
    assert retrieved_at([5], 5)
    assert not retrieved_at([6], 5)


def test_a_score_that_is_no_number_is_no_hit():
    assert retrieval_ranks(np.array([np.nan, np.nan, 0.1]), [0, 2]) == [3, 3]
    assert retrieval_ranks(np.full(4, np.nan), [1]) == [4]


def test_all_wanted_facts_must_be_among_the_first():
    assert retrieved_at([2, 1], 1)  # two are wanted, and two are first
    assert not retrieved_at([1, 3], 1)
    assert retrieved_at([1, 5], 5)
    assert not retrieved_at([1, 6], 5)
    assert retrieved_at([2, 2], 1)  # the two equal each other and nothing else
    assert not retrieved_at([], 5)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of Peru is Lima.",
        "Lima",
        "It is Lima, the capital.",
        "Sure! The capital of Peru is  Lima\n",
        'Peru: "Lima".',
        "Lima is the capital of Peru.",
    ],
)
def test_an_exact_answer_in_any_wording(text):
    assert exact_match(text, ["Lima"], **PERU)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The capital of Peru is Paris.",
        "The capital of Peru is lima.",  # another letter
        "The capital of Peru is Limas.",
        "The capital of Peru is Lima Sur.",  # another value
        "The capital of Peru is Lima umber.",  # it goes on
        "The capital of Peru is old Lima.",
        "The capital of Peru is Lima-Callao.",
        "The capital of Peru is Lima. Its population is 34 million.",
        "The capital of Peru is Lima, not far from Callao.",
        "The capital of Peru is Lima and Paris.",
        "The capital of Peru is Lima%.",
    ],
)
def test_an_answer_that_is_not_exact(text):
    assert not exact_match(text, ["Lima"], **PERU)


def test_values_stand_in_the_order_asked_for():
    given = "What is the capital of Peru and of France?"
    assert exact_match("The capital of Peru is Lima. The capital of France is Paris.", ["Lima", "Paris"], given=given)
    assert not exact_match("The capital of Peru is Paris and of France Lima.", ["Lima", "Paris"], given=given)
    assert not exact_match("The capital of Peru is Lima.", ["Lima", "Paris"], given=given)
    assert not exact_match("Lima Paris", ["Lima", "Paris"])


def test_several_values_of_one_fact_stand_in_any_order():
    given = {"given": "What are the languages of Canada, and of Peru?"}
    values = ["English", "French", "Spanish"]
    asked = given | {"num_values": (2, 1)}
    assert exact_match("English and French; Spanish.", values, **asked)
    assert exact_match("French and English; Spanish.", values, **asked)
    assert not exact_match("Spanish; English and French.", values, **asked)
    assert not exact_match("French; Spanish.", values, **asked)
    assert not exact_match("French and English; Spanish.", values, **given)
    # One of them stands within the other.
    assert exact_match("Old English, English", ["English", "Old English"], **given, num_values=(2,))
    assert not exact_match("Old English", ["English", "Old English"], **given, num_values=(2,))


def test_questions_about_many_valued_facts_say_whose_the_values_are():
    facts = [Fact("Canada", "language", name) for name in ("English", "French")]
    facts += [Fact("Peru", "language", name) for name in ("Quechua", "Spanish")] + [Fact("Peru", "capital", "Lima")]
    maker = QuestionMaker(facts, 0)
    questions = [Asked.of(maker.make("two_entity", number)) for number in range(20)]
    assert {one.num_values for one in questions} == {(2, 2), (2, 1), (1, 2)}
    for one in questions:
        first = one.num_values[0]
        text = " and ".join([*one.values[:first][::-1], *one.values[first:][::-1]])
        assert exact_match(text, one.values, given=one.given, names=one.names, num_values=one.num_values)
    assert Asked.of(maker.make("unanswerable", 0)).num_values == ()


def test_a_value_in_the_name_asked_for_is_not_stated():
    asked = {"given": "What is the colour of Blue House?", "names": ["Blue House", "colour"]}
    assert exact_match("The colour of Blue House is Blue.", ["Blue"], **asked)
    assert not exact_match("The colour of Blue House is red.", ["Blue"], **asked)
    # A name may be a part of the value, too.
    asked = {"given": "Trevano: full name?", "names": ["Trevano", "full name"]}
    assert exact_match("The full name of Trevano is Trevano Ltd.", ["Trevano Ltd."], **asked)


def test_another_facts_value_is_more_than_was_asked_for():
    given = "What is the colour of the house?"
    assert not exact_match("The colour of the house is blue, or green.", ["blue"], given=given, others=["green"])
    # What the question says itself is no statement; nor is a value that frames every sentence.
    assert exact_match("The colour of the house is blue.", ["blue"], given=given, others=["house", "the", "blue"])


@pytest.mark.parametrize(
    ("value", "text", "is_exact"),
    [
        ("34 million", "The population is 34 million.", True),
        ("34", "The population is 34 million.", False),
        ("34", "It is 34,000.", False),
        ("34", "It is -34.", False),
        ("34", "It is $34.", False),
        ("34%", "It is 34%.", True),
        (".pe", "The internet domain is .pe.", True),
        ("Washington, D.C.", "It is Washington, D.C.", True),
        ("line one\nline two", "It is line one line two.", True),
    ],
)
def test_numbers_marks_and_line_breaks(value, text, is_exact):
    assert exact_match(text, [value], given="What is the population or the internet domain?") is is_exact


@pytest.mark.parametrize(
    ("given", "value", "text", "is_exact"),
    [
        ("AI是什么?", "人工智能是模拟人类智能的技术", "人工智能是模拟人类智能的技术", True),
        ("AI是什么?", "人工智能是模拟人类智能的技术", "AI是人工智能是模拟人类智能的技术。", True),
        ("AI是什么?", "人工智能是模拟人类智能的技术", "人工智能是模拟人类智能的技术员", False),
        ("AI是什么?", "人工智能是模拟人类智能的技术", "人工智能是模拟人类智能的", False),
        ("秘鲁的首都是什么?", "利马", "秘鲁的首都是利马。", True),
        ("한국의 수도는 무엇인가요?", "서울", "한국의 수도는 서울입니다.", True),
        ("한국의 수도는 무엇인가요?", "서울", "한국의 수도는 서울역입니다.", False),
        ("भारत की राजधानी क्या है?", "दिल्ली", "भारत की राजधानी दिल्ली है।", True),
        ("भारत की राजधानी क्या है?", "दिल्", "भारत की राजधानी दिल्ली है।", False),
        ("ما عاصمة مصر؟", "القاهرة", "عاصمة مصر هي القاهرة.", True),
        ("ما عاصمة مصر؟", "القاهرة", "عاصمة مصر هي القاهرة الجديدة.", False),
        ("Какая столица России?", "Москва", "Столица России — это Москва.", True),
        ("מהי בירת ישראל?", "ירושלים", "בירת ישראל היא ירושלים.", True),
    ],
)
def test_other_scripts(given, value, text, is_exact):
    assert exact_match(text, [value], given=given) is is_exact


@pytest.mark.parametrize(
    ("given", "value", "text"),
    [
        ("Maldives: capital?", "Malé", "The capital of Maldives is Malé."),
        ("¿Cuál es la capital de Perú?", "Lima", "La capital de Perú es Lima."),
        ("한국의 수도는?", "서울", "서울입니다."),
        ("भारत का ज़िला?", "पेड़ा", "पेड़ा है।"),
    ],
)
def test_a_letter_is_the_same_however_unicode_has_it(given, value, text):
    for made in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            there, wanted = unicodedata.normalize(made, text), unicodedata.normalize(other, value)
            assert exact_match(there, [wanted], given=given)
            assert token_f1(wanted, unicodedata.normalize(made, value)) == (1.0, 1.0, 1.0)


def test_other_values_are_found_by_their_words():
    index = ValueIndex(["Lima", "lima", "Lima Sur", "New  York", "부산", "서울 강남", "the", ".pe", "東京"])
    found = {
        "It is Lima Sur.": {"Lima", "lima", "Lima Sur"},
        "new york": {"New York"},
        "부산입니다": {"부산"},
        "서울 강남과 부산": {"서울 강남", "부산"},
        "서울": set(),
        "x.pe": {".pe"},
        "首都は東京です": {"東京"},
        "": set(),
    }
    assert {text: index.possible_in(words(text)) for text in found} == found
    asked = {"given": "한국의 수도는?", "others": ["부산", "서울"]}
    assert exact_match("서울입니다", ["서울"], **asked)
    assert not exact_match("서울과 부산입니다", ["서울"], **asked)


def test_what_a_question_maker_answers_is_exact():
    facts = list(SyntheticFacts(7).facts(0, 960))
    facts += [Fact("Guinea-Bissau", "capital", "Bissau"), Fact("Conakry", "country", "Guinea")]
    values = ValueIndex(fact.value for fact in facts)
    maker = QuestionMaker(facts, 1)
    kinds = ("simple", "paraphrase", "misspelt", "two_entity", "follow_up")
    questions = [maker.make(kind, number) for kind in kinds for number in range(40)]
    for question, other in pairwise(questions):
        asked = Asked.of(question)
        given = {"given": asked.given, "names": asked.names}
        assert exact_match(question.answer, question.values, **given, others=values), question
        assert token_f1(question.answer, " ".join(question.values), **given)[2] > 0.9
        if other.values != question.values:
            assert not exact_match(other.answer, question.values, **given, others=values), (question, other)
    given = {"given": "Gunea-Bissau: capital?", "names": ["Guinea-Bissau", "capital"], "others": values}
    assert exact_match("The capital of Guinea-Bissau is Bissau.", ["Bissau"], **given)


def test_nothing_is_exact_where_nothing_is_wanted():
    assert not exact_match("anything", [])


def test_token_f1_leaves_the_question_out():
    asked = {"given": "What is the motto of Peru?"}
    assert token_f1("The motto of Peru is firm and happy.", "firm and happy", **asked) == (1.0, 1.0, 1.0)
    precision, recall, f1 = token_f1("The motto of Peru is firm, sad, old.", "firm and happy", **asked)
    # Stated are firm, sad and old; wanted are firm and happy.
    assert (precision, recall, f1) == (pytest.approx(1 / 3), 0.5, pytest.approx(0.4))
    precision, recall, f1 = token_f1("firm", "firm and happy", **asked)
    assert (precision, recall, f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert token_f1("I do not know.", "firm", **asked) == (0.0, 0.0, 0.0)
    assert token_f1("", "firm", **asked) == (0.0, 0.0, 0.0)
    # A value of the question's own words, and one that the question has a part of.
    asked = {"given": "What is the capital of Singapore?", "names": ["Singapore", "capital"]}
    assert token_f1("The capital of Singapore is Singapore.", "Singapore", **asked) == (1.0, 1.0, 1.0)
    assert token_f1("The capital of Singapore is Kuala Lumpur.", "Singapore", **asked)[0] == pytest.approx(1 / 3)
    asked = {"given": "Singapore: formal name?"}
    formal = "The formal name of Singapore is the Republic of Singapore."
    assert token_f1(formal, "Republic of Singapore", **asked) == (1.0, 1.0, 1.0)
    # A multiset: a word said twice is right once.
    assert token_f1("ho ho", "ho")[0] == 0.5
    assert token_f1("技术", "技巧")[2] == 0.5


def test_refusals():
    refused = [True, True, True, False, False, False]
    should = [True, True, False, True, False, False]
    report = refusal_report(refused, should)
    assert report.precision.value == pytest.approx(2 / 3)
    assert report.recall.value == pytest.approx(2 / 3)
    assert report.f1.value == pytest.approx(2 / 3)
    assert report.f1.low < 2 / 3 < report.f1.high
    assert (report.precision.count, report.recall.count, report.f1.count) == (3, 3, 6)


def test_refusals_that_never_came():
    report = refusal_report([False, False], [True, False])
    assert report.precision.value is None
    assert report.recall.value == 0
    assert report.f1.value == 0
    assert refusal_report([False], [False]).f1.value is None


def test_area_under_the_curve():
    assert area_under_curve([0.9, 0.8, 0.1, 0.2], [True, True, False, False]).value == 1
    assert area_under_curve([0.1, 0.2, 0.9, 0.8], [True, True, False, False]).value == 0
    assert area_under_curve([0.5, 0.5, 0.5], [True, False, False]).value == 0.5
    # Three pairs: won, tied, lost.
    assert area_under_curve([0.3, 0.1, 0.3, 0.4], [True, False, False, False]).value == 0.5
    assert area_under_curve([0.5, 0.4], [True, True]).value is None
