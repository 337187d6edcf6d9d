"""BM25 against its formula written out, and what counts as a word in every script."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from evaluation_samples import ENCODER, synthetic

from kblam_ray.evaluation.baselines.bm25 import K1, B, WordSearch, tokens
from kblam_ray.evaluation.baselines.cosine import nearest
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.questions import Asked
from kblam_ray.facts.fact import Fact, key_text
from kblam_ray.facts.questions import QuestionMaker
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.model.prior import QuestionPrior


def asked(*turns: str) -> Asked:
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    return Asked("own", tuple(messages), None)


def formula(question: str, facts) -> np.ndarray:
    """BM25 as Lucene has it: sum over the question's words of idf * tf / (tf + k1 (1 - b + b * length / mean))."""
    documents = [tokens(key_text(fact.entity, fact.property)) for fact in facts]
    mean = sum(map(len, documents)) / len(documents)
    holding = Counter(word for words in documents for word in set(words))
    scores = []
    for words in documents:
        score = 0.0
        for word in tokens(question):
            idf = math.log(1 + (len(documents) - holding[word] + 0.5) / (holding[word] + 0.5))
            times = words.count(word)
            score += idf * times / (times + K1 * (1 - B + B * len(words) / mean))
        scores.append(score)
    return np.array(scores)


def assert_as_the_formula(facts, questions) -> None:
    found = WordSearch(facts).scores(questions)
    bags = [tuple(sorted(tokens(key_text(fact.entity, fact.property)))) for fact in facts]
    first = [bags.index(bag) for bag in bags]
    for question, scores in zip(questions, found, strict=True):
        expected = formula(question.text, facts)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
        # The same words, the same score, to the last bit: ties are ties.
        assert np.array_equal(scores, scores[first])
        best = nearest(scores, 5)
        np.testing.assert_allclose(expected[best], np.sort(expected)[::-1][:5], rtol=1e-5)


def test_scores_are_those_of_the_formula():
    facts = synthetic(90, seed=7).facts
    maker = QuestionMaker(facts, 1)
    kinds = ("simple", "paraphrase", "misspelt", "two_entity", "unanswerable")
    questions = [Asked.of(maker.make(kind, number)) for kind in kinds for number in range(4)]
    assert_as_the_formula(facts, questions)
    # Words of a question that stand twice in it, or in no key, and a question without any known word.
    assert_as_the_formula(facts, [asked(f"{facts[3].entity} {facts[3].entity} zzz"), asked("zzz?"), asked("...")])


def test_a_hand_computed_score():
    facts = [Fact("Peru", "capital", "Lima"), Fact("Peru", "head of state", "x"), Fact("France", "capital", "Paris")]
    # "the capital of peru", "the head of state of peru", "the capital of france": 4, 6 and 4 words, 14 / 3 on average.
    (scores,) = WordSearch(facts).scores([asked("Peru")])
    idf = math.log(1 + 1.5 / 2.5)
    assert scores == pytest.approx(
        [idf / (1 + 1.5 * (0.25 + 0.75 * 4 / (14 / 3))), idf / (1 + 1.5 * (0.25 + 0.75 * 6 / (14 / 3))), 0]
    )


def test_equal_keys_tie_and_a_tie_is_a_miss():
    facts = [Fact("Ur", "founder", value) for value in ("A", "B")] + [Fact("Uruk", "founder", "C")]
    (scores,) = WordSearch(facts).scores([asked("Who is the founder of Ur?")])
    assert scores[0] == scores[1] > scores[2]
    assert retrieval_ranks(scores, [0]) == [2]


def test_values_are_not_looked_at():
    facts = [Fact("Ur", "founder", "Lima Lima Lima"), Fact("Lima", "age", "old")]
    (scores,) = WordSearch(facts).scores([asked("Lima")])
    assert scores[0] == 0 < scores[1]


def test_the_question_is_what_the_prior_reads():
    facts = synthetic(30).facts
    turns = asked("Peru?", "Lima.", f"And the {facts[0].property}?", "Hm.", facts[1].entity)
    for num_turns, context in ((1, "last"), (2, "last_two")):
        text = QuestionPrior(ENCODER, context=context).question(turns.messages)
        (scores,) = WordSearch(facts, num_turns).scores([turns])
        np.testing.assert_allclose(scores, formula(text, facts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What's the CAPITAL of Peru?", ["what", "s", "the", "capital", "of", "peru"]),
        ("Größe von Straße", ["grösse", "von", "strasse"]),
        ("Ｐｅｒｕ２", ["peru2"]),
        ("北京的首都", ["北", "北京", "京", "京的", "的", "的首", "首", "首都", "都"]),
        ("水 of 北京", ["水", "of", "北", "北京", "京"]),
        ("北 京", ["北", "京"]),
        ("프랑스의 수도", ["프", "랑", "스", "의", "프랑", "랑스", "스의", "수", "도", "수도"]),
        ("столица Перу", ["столица", "перу"]),
        ("عاصمة بيرو", ["عاصمة", "بيرو"]),
        ("", []),
    ],
)
def test_words_in_every_script(text, found):
    assert tokens(text) == found


@pytest.mark.parametrize(
    ("entity", "question"),
    [("日本", "日本の首都は?"), ("프랑스", "프랑스의 수도는 어디인가요?"), ("ประเทศไทย", "เมืองหลวงของประเทศไทยคืออะไร")],
)
def test_names_are_found_in_scripts_that_write_on_after_them(entity, question):
    facts = [Fact(name, "capital", "x") for name in ("Peru", "中国", "한국", "ลาว", entity)]
    (scores,) = WordSearch(facts).scores([asked(question)])
    assert nearest(scores, 1) == [4]
    assert scores[4] > sorted(scores)[-2]


@pytest.mark.slow
def test_a_hundred_thousand_facts():
    facts = list(SyntheticFacts(11).facts(0, 100_000))
    maker = QuestionMaker(facts, 2)
    questions = [Asked.of(maker.make("simple", number)) for number in range(20)]
    search = WordSearch(facts)
    documents = [Counter(tokens(key_text(fact.entity, fact.property))) for fact in facts]
    lengths = np.array([words.total() for words in documents])
    for question in questions:
        expected = np.zeros(len(facts))
        for word in tokens(question.text):
            times = np.array([words[word] for words in documents])
            holding = np.count_nonzero(times)
            idf = math.log(1 + (len(facts) - holding + 0.5) / (holding + 0.5))
            expected += idf * times / (times + K1 * (1 - B + B * lengths / lengths.mean()))
        (scores,) = search.scores([question])
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
        assert question.wanted[0] in nearest(scores, 5)
