"""Figures of hand-made outcomes, and their tables."""

from __future__ import annotations

import pytest

from kblam_ray.evaluation.outcomes import Outcome, System, judged
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.report import markdown
from kblam_ray.evaluation.statements import ValueIndex
from kblam_ray.evaluation.summary import result


def asked(kind: str, *, answer: bool = True) -> Asked:
    message = {"role": "user", "content": "What is the capital of Peru?"}
    return Asked(kind, (message,), answer, (0,) if answer else (), ("Lima",) if answer else (), ("Peru", "capital"))


QUESTIONS = [
    asked("simple"), asked("simple"), asked("simple"), asked("simple"),
    asked("misspelt"), asked("misspelt"), asked("misspelt"), asked("misspelt"),
    asked("unanswerable", answer=False), asked("unanswerable", answer=False),
]  # fmt: skip


def values(figures) -> dict:
    return {name: figure["value"] for name, figure in figures.items()}


def test_retrieval_by_kind():
    outcomes = [Outcome(ranks=(rank,)) for rank in (1, 1, 1, 6, 2, 1, 5, 9)] + [Outcome(), Outcome()]
    found = result(System("attention", False), QUESTIONS, outcomes)
    assert values(found["retrieval"]["simple"]) == {"@1": 0.75, "@5": 0.75}
    assert values(found["retrieval"]["misspelt"]) == {"@1": 0.25, "@5": 0.75}
    assert values(found["retrieval"]["all"]) == {"@1": 0.5, "@5": 0.75}
    assert "answers" not in found
    assert "refusal" not in found


def test_answers_and_refusals():
    texts = ["The capital of Peru is Lima."] * 3 + ["The capital of Peru is Paris."] + ["Lima"] * 4 + ["No idea."] * 2
    refused = [False, False, False, True, False, False, False, False, True, False]
    sure = [0.9, 0.8, 0.7, 0.2, 0.9, 0.9, 0.9, 0.9, 0.1, 0.3]
    outcomes = [
        judged(question, ValueIndex(["Lima", "Paris"]), text, refused=no, statistic=statistic)
        for question, text, no, statistic in zip(QUESTIONS, texts, refused, sure, strict=True)
    ]
    found = result(System("attention", True, "off"), QUESTIONS, outcomes)
    assert (found["system"], found["prior"], found["grounding"]) == ("attention", True, "off")
    assert found["answers"]["all"]["exact_match"]["value"] == 0.875
    assert found["answers"]["simple"]["exact_match"]["value"] == 0.75
    assert found["answers"]["simple"]["f1"]["value"] == 0.75
    refusal = values(found["refusal"]["all"])
    # Nine of ten were refused or answered rightly; of 16 pairs one has the wrong order.
    assert refusal == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "area_under_curve": pytest.approx(15 / 16, abs=1e-4)}
    # Each kind with its share of the questions that have no answer: one of the two, the first.
    assert values(found["refusal"]["misspelt"]) == {"precision": 1, "recall": 1, "f1": 1, "area_under_curve": 1}
    assert found["refusal"]["simple"]["precision"]["value"] == 0.5


def test_refusals_where_no_question_has_an_answer():
    """And none where all have one: nothing there should be refused."""
    none, some = QUESTIONS[8:], QUESTIONS[:8]
    refused = [Outcome(refused=True, statistic=0.1), Outcome(refused=False, statistic=0.2)]
    found = result(System("attention", False), none, refused)
    assert values(found["refusal"]["all"]) == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3, abs=1e-4)}
    assert "calibration" not in found
    assert "refusal" not in result(System("attention", False), some, refused * 4)


def test_citations():
    outcomes = [
        judged(question, ValueIndex([]), "", refused=None, cited=cited)
        for question, cited in zip(QUESTIONS, [[0], [1, 0], [1], [], [0], [0], [0], [0], [1], []], strict=True)
    ]
    found = result(System("attention", False, "cite"), QUESTIONS, outcomes)
    assert found["citations"]["simple"]["recall"]["value"] == 0.5
    assert found["citations"]["all"]["recall"]["count"] == 8


def test_tables():
    outcomes = [Outcome(ranks=(1,), statistic=0.9, refused=False)] * 8 + [Outcome(statistic=0.1, refused=True)] * 2
    summary = {
        "notes": ["the model is random"],
        "sizes": [
            {
                "num_facts": 1000,
                "num_entities": 250,
                "num_questions": {"simple": 4, "misspelt": 4, "unanswerable": 2},
                "num_facts_asked": 8,
                "left_out": {"follow_up": "the facts do not allow it"},
                "results": [result(System("attention", True), QUESTIONS, outcomes)],
            }
        ],
    }
    text = markdown(summary)
    assert "| 1,000 | 250 | 8 | 4 | 4 | 2 |" in text
    assert "| facts |  | all | simple | misspelt |" in text
    assert (
        "| 1,000 | attention with prior | 100.0 (67.6 to 100.0) | 100.0 (51.0 to 100.0) | 100.0 (51.0 to 100.0) |"
        in text
    )
    assert "- the model is random\n- at 1,000 facts, follow_up: the facts do not allow it\n" in text
    assert "Exact match" not in text
    only = markdown(summary, kinds=["simple"])
    assert "| facts |  | simple |" in only
