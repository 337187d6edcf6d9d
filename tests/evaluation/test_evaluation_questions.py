"""Facts drawn and questions made: whole entities, held-out ones only, every kind and reason, none twice."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from evaluation_samples import ENCODER, synthetic

from kblam_ray.errors import InputError
from kblam_ray.evaluation.own_questions import own_set, read_questions
from kblam_ray.evaluation.questions import EvaluationSet
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.split import is_held_out
from kblam_ray.table.embedded import EmbeddedFacts

POOL = synthetic(320)


def draw(num_facts=None, pool=POOL, **settings) -> EvaluationSet:
    given = EvaluationSettings(**{"num_questions": 20, **settings})
    return EvaluationSet.draw(pool, num_facts, given, refusal="I do not know.")


def entities(facts: EmbeddedFacts) -> Counter:
    return Counter(fact.entity for fact in facts.facts)


@pytest.mark.parametrize("num_facts", [1, 10, 101, 320])
def test_whole_entities_are_drawn_as_far_as_the_number_allows(num_facts):
    drawn = draw(num_facts, kinds=["simple"], seed=3)
    assert len(drawn.facts) == num_facts
    whole = entities(POOL)
    broken = [entity for entity, count in entities(drawn.facts).items() if count < whole[entity]]
    assert len(broken) <= 1
    assert set(drawn.facts.facts) <= set(POOL.facts)


def test_the_seed_chooses_facts_and_questions():
    first, again = draw(50), draw(50)
    assert (first.facts.facts, first.questions) == (again.facts.facts, again.questions)
    assert draw(50, seed=1).facts.facts != draw(50).facts.facts
    assert {question.text for question in draw(50, seed=1).questions} != {
        question.text for question in draw().questions
    }


def test_questions_of_every_kind_once_each():
    drawn = draw(num_questions=30, unanswerable=0.5)
    counts = Counter(question.kind for question in drawn.questions)
    kinds = ("simple", "paraphrase", "misspelt", "two_entity", "follow_up")
    assert {kind: counts[kind] for kind in kinds} == dict.fromkeys(kinds, 30)
    reasons = Counter(question.reason for question in drawn.questions if question.reason)
    assert reasons == {"same_entity": 25, "same_property": 25, "unknown_entity": 25}
    assert drawn.left_out == {}
    said = [question.given for question in drawn.questions]
    assert len(set(said)) == len(said)
    for question in drawn.questions:
        assert question.should_answer is (question.kind != "unanswerable")
        assert [drawn.facts.facts[row].value for row in question.wanted] == list(question.values)
        assert len(question.messages) == (3 if question.kind == "follow_up" else 1)
        assert [message["role"] for message in question.messages][-1] == "user"


def test_the_first_unanswerable_questions_have_all_reasons():
    drawn = draw(kinds=["simple", "unanswerable"], num_questions=24)
    reasons = [question.reason for question in drawn.questions if question.reason]
    assert len(reasons) == 6
    assert set(reasons[:3]) == {"same_entity", "same_property", "unknown_entity"}


@pytest.mark.parametrize(("wanted", "held_out"), [("held_out", 0.3), ("trained", 0.7)])
def test_only_held_out_entities_are_asked_about_or_only_the_others(wanted, held_out):
    drawn = draw(200, held_out=held_out, held_out_seed=7, entities=wanted)
    asked = {entity for entity in entities(POOL) if is_held_out(entity, held_out, 7) is (wanted == "held_out")}
    # All facts of theirs are in the knowledge base, others fill it up.
    assert asked <= set(entities(drawn.facts))
    assert set(entities(drawn.facts)) - asked
    pairs = {(fact.entity, fact.property) for fact in drawn.facts.facts}
    for question in drawn.questions:
        for row in question.wanted:
            assert drawn.facts.facts[row].entity in asked
            assert question.values[question.wanted.index(row)] == drawn.facts.facts[row].value
        if question.should_answer is False:
            assert question.names[:2] not in pairs
            assert question.names[0] in asked or question.names[0] not in entities(drawn.facts)
    assert Counter(question.kind for question in drawn.questions)["two_entity"] == 20


def test_what_the_facts_do_not_allow_is_left_out_and_said():
    facts = EmbeddedFacts.embed([Fact("Ur", "zzz", "one"), Fact("Uk", "zzz", "two")], ENCODER)
    drawn = draw(pool=facts, num_questions=100)
    assert {"paraphrase", "misspelt", "follow_up"} <= set(drawn.left_out)
    assert drawn.left_out["simple"].startswith("48 of 100")  # two facts, 24 wordings
    assert Counter(question.kind for question in drawn.questions)["simple"] == 48


@pytest.mark.parametrize(
    ("num_facts", "settings", "error"),
    [
        (321, {}, "321 facts of 320"),
        (None, {"held_out": 1e-9}, "none of the entities is held out.*larger"),
        (None, {"held_out": 1.0, "entities": "trained"}, "all of the entities are held out.*smaller"),
        (None, {"entities": "trained"}, "no share that was held out"),
    ],
)
def test_what_cannot_be_drawn_is_refused(num_facts, settings, error):
    with pytest.raises(InputError, match=error):
        draw(num_facts, **settings)


def test_nothing_to_ask():
    with pytest.raises(InputError, match="no facts"):
        draw(pool=POOL.take([]))
    facts = EmbeddedFacts.embed([Fact("Ur", "zzz", "one")], ENCODER)
    with pytest.raises(InputError, match="two_entity"):
        draw(pool=facts, kinds=["two_entity"])


FACTS = EmbeddedFacts.embed(
    [Fact("AI", "description", "人工智能是模拟人类智能的技术"), Fact("Peru", "capital", "Lima")], ENCODER
)


def write(path, *lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_own_questions(tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        {"question": "AI是什么?", "entity": "ai", "property": "Description"},
        "",
        {"question": "And?", "context": ["Peru?", "It has a capital."], "value": "Lima"},
        {"question": "Who is Zorro?", "value": None},
        {"question": "The capital of Mars?", "entity": "Mars", "property": "capital"},
        {"question": "Anything?"},
    )
    asked = own_set(FACTS, read_questions(path)).questions
    assert [question.should_answer for question in asked] == [True, True, False, False, None]
    assert asked[0].wanted == (0,)
    assert asked[0].values == ("人工智能是模拟人类智能的技术",)
    assert asked[1].values == ("Lima",)
    assert [message["role"] for message in asked[1].messages] == ["user", "assistant", "user"]
    assert asked[4].values == ()


def test_lines_end_at_line_breaks_only(tmp_path):
    texts = ["one\u2028two", "three\x85four"]
    lines = "".join(json.dumps({"question": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [question.question for question in read_questions(tmp_path / "own.jsonl")] == texts


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 2: not a question|not a question"),
        ({"value": "x"}, "Field required"),
        ({"question": "x", "entity": "Peru"}, "entity and property"),
        ({"question": "x", "context": ["one"]}, "even number"),
        ({"question": "x", "answer": "y"}, "Extra inputs"),
        ({"question": " "}, "not blank"),
        ({"question": "x", "value": ["Lima", ""]}, "not blank"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, error):
    with pytest.raises(InputError, match=error) as refused:
        read_questions(write(tmp_path / "own.jsonl", {"question": "fine"}, line))
    assert "line 2" in str(refused.value)


def test_expectations_that_contradict_the_facts(tmp_path):
    for line in (
        {"question": "x", "entity": "Mars", "property": "capital", "value": "Olympus"},
        {"question": "x", "entity": "Peru", "property": "capital", "value": None},
    ):
        with pytest.raises(InputError, match="question 1"):
            own_set(FACTS, read_questions(write(tmp_path / "own.jsonl", line)))
    with pytest.raises(InputError, match="no question"):
        read_questions(write(tmp_path / "own.jsonl", ""))
    with pytest.raises(InputError, match="cannot read"):
        read_questions(tmp_path / "missing.jsonl")
