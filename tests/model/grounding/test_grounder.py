"""Grounding: what a model writes is held to the facts, whatever it writes and however it comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kblam_ray.facts.questions import REFUSAL
from kblam_ray.model.grounding import Grounder, ground
from kblam_ray.model.grounding.selection import ReadFact, Reading

FACTS = {
    "fr": ("France", "capital", "Paris"),
    "pe": ("Peru", "capital", "Lima"),
    "pp": ("Peru", "population", "34 million"),
    "ai": ("AI", "description", "人工智能是模拟人类智能的技术"),
    "wi": ("Widget", "maker", "Acme Inc. of St. Ives"),
    "lu": ("Luxembourg", "capital", "Luxembourg"),
    "ad": ("Ada", "child", "Byron"),
    "an": ("Ada", "child", "Anne"),
    "la": ("Läsö", "area", "1,204 km²"),
    "po": ("Poem", "text", "roses\nare red"),
}


def read(names: str, asked: str, allowed: str | None = None) -> Reading:
    """Facts by name; certain unless other facts may have been meant, too."""
    names_ = names.split()
    facts = tuple(ReadFact(place, *FACTS[name], None, 1 / (1 + place)) for place, name in enumerate(names_))
    places = [names_.index(name) for name in asked.split()]
    meant = places if allowed is None else [names_.index(name) for name in allowed.split()]
    return Reading(facts, tuple(places), frozenset(meant), allowed is None)


FRANCE = "What is the capital of France?"
BOTH = "What is the capital of France and of Peru?"

CASES = [
    # What is right stays as it was written.
    ("fr pe", "fr", FRANCE, "The capital of France is Paris.", "The capital of France is Paris."),
    ("fr pe", "fr", FRANCE, "Paris is the capital of France.", "Paris is the capital of France."),
    ("fr", "fr", FRANCE, "Paris", "Paris"),
    ("pp", "pp", "How many live in Peru?", "It has 34 million.", "It has 34 million."),
    ("wi", "wi", "Who makes Widget?", "It is Acme Inc. of St. Ives.", "It is Acme Inc. of St. Ives."),
    # Case, letters, blanks, signs and digits of values are the fact's.
    ("fr", "fr", FRANCE, "The capital of France is Pariss.", "The capital of France is Paris."),
    ("fr", "fr", FRANCE, "paris", "The capital of France is Paris."),
    ("fr", "fr", FRANCE, "Ｐａｒｉｓ", "The capital of France is Paris."),
    ("pp", "pp", "population of Peru", "It is 34  million.", "The population of Peru is 34 million."),
    ("pp", "pp", "population of Peru", "134 million", "The population of Peru is 34 million."),
    ("pp", "pp", "population of Peru", "It is -34 million.", "The population of Peru is 34 million."),
    ("pp", "pp", "population of Peru", "It is 34 million%.", "The population of Peru is 34 million."),
    ("la", "la", "area of Läsö", "1.204 km²", "The area of Läsö is 1,204 km²."),
    ("wi", "wi", "Who makes Widget?", "Acme Inc. of St Ives", "The maker of Widget is Acme Inc. of St. Ives."),
    ("po", "po", "text of Poem", "The text of Poem is roses are red.", "The text of Poem is roses\nare red."),
    # What no fact says is not said.
    ("fr pe", "fr", FRANCE, "Paris, near Lyon, founded in 250.", "The capital of France is Paris."),
    ("fr pe", "fr", FRANCE, "It is not Paris.", "The capital of France is Paris."),
    ("fr pe", "fr", FRANCE, "Paris. It lies in 北京.", "Paris."),
    ("fr pe", "fr", FRANCE, "Lima", "The capital of France is Paris."),
    (
        "fr pe",
        "fr",
        "Is the capital of France Lyon?",
        "The capital of France is Lyon.",
        "The capital of France is Paris.",
    ),
    ("fr", "fr", FRANCE, "", "The capital of France is Paris."),
    ("fr", "fr", FRANCE, "\ufffd\ufffd 7", "The capital of France is Paris."),
    # Values stand beside their own entity and property.
    ("fr pe", "fr pe", BOTH, "Lima is the capital of France and Paris of Peru.", None),
    ("fr pe", "fr pe", BOTH, "The capital of France is Paris. The capital of Peru is Lmia.", None),
    ("fr pe", "fr pe", BOTH, "Paris.", "Paris. The capital of Peru is Lima."),
    ("fr pe", "fr pe", BOTH, "Paris and Lima.", "Paris and Lima."),
    (
        "pe pp",
        "pe pp",
        "capital and population of Peru",
        "The capital of Peru is 34 million and the population Lima.",
        "The capital of Peru is Lima. The population of Peru is 34 million.",
    ),
    ("lu fr", "lu fr", "?", "The capital of Luxembourg is Paris", None),
    # Many values of one property are stated together.
    ("ad an", "ad an", "child of Ada?", "The child of Ada is Byorn.", "The child of Ada is Byron and Anne."),
    # Chinese, Japanese and Korean descriptions are said as they stand.
    ("ai", "ai", "AI是什么?", "人工智能是模拟人类智能的技术", FACTS["ai"][2]),
    ("ai", "ai", "AI是什么?", "The description of AI is 人工智能是模拟人类智能的技术.", FACTS["ai"][2]),
    ("ai", "ai", "AI是什么?", "AI是一种技术", FACTS["ai"][2]),
    ("ai", "ai", "AI是什么?", "asdf 12", FACTS["ai"][2]),
]


@pytest.mark.parametrize(("facts", "asked", "question", "text", "expected"), CASES)
def test_an_answer_is_held_to_the_facts(facts, asked, question, text, expected):
    grounded = ground(text, read(facts, asked), question, REFUSAL)
    if expected is None:
        first, second = (FACTS[name] for name in asked.split())
        expected = " ".join(f"The {prop} of {entity} is {value}." for entity, prop, value in (first, second))
        assert sorted(grounded.text.split(". ")) == sorted(expected.split(". ")) or grounded.text == expected
    else:
        assert grounded.text == expected
    assert not grounded.refused
    names = facts.split()
    assert {names[place] for place in grounded.stated} == set(asked.split())


def test_a_refusal_is_believed_unless_the_question_names_what_a_fact_tells():
    certain = ground(REFUSAL, read("fr pe", "fr"), FRANCE, REFUSAL)
    assert (certain.text, certain.refused) == ("The capital of France is Paris.", False)
    for text in (REFUSAL, REFUSAL.upper() + "  ", REFUSAL + " The capital of France is Paris."):
        unsure = ground(text, read("fr pe", "fr", "fr pe"), "Where does France sit?", REFUSAL)
        assert (unsure.text, unsure.stated, unsure.refused) == ("", (), True)


def test_where_words_do_not_decide_the_model_chooses_among_what_may_be_meant():
    unsure = read("fr pe pp", "fr", "fr pe")
    for text in ("The capital of Peru is Lima.", "The capital of Peru is Lma.", "Lima"):
        grounded = ground(text, unsure, "Which city rules there?", REFUSAL)
        assert grounded.stated == (1,)
        assert "Lima" in grounded.text
    # A fact that cannot be meant is not stated, and what nobody can tell is the best fact.
    for text in ("34 million", "Cusco"):
        assert ground(text, unsure, "Which city rules there?", REFUSAL).text == "The capital of France is Paris."


def test_values_are_given_when_they_are_due():
    grounder = Grounder(read("fr", "fr"), FRANCE, REFUSAL)
    assert [grounder.feed(piece) for piece in ("The capital ", "of France", " is", " ")] == [
        "",
        "",
        "",
        "The capital of France is Paris.",
    ]
    assert grounder.feed("Pari5. And Lyon.") == grounder.finish() == ""
    grounder = Grounder(read("fr pe", "fr pe"), BOTH, REFUSAL)
    assert grounder.feed("Paris is the capital of France. L") == "Paris is the capital of France."
    assert grounder.finish() == " The capital of Peru is Lima."


PIECES = st.sampled_from(
    (
        *("The capital of France is ", "The capital of Peru is ", "Paris", "Lima", "Acme Inc", ". of St", ". Ives"),
        *("34 million", "The population of Peru", " is ", ". ", " ", "\n", "!", "。", "Lyon", REFUSAL),
        *("人工智能", "是模拟人类智能的技术"),
    )
)


@settings(max_examples=150)
@given(
    st.lists(PIECES, max_size=9), st.sampled_from(["fr", "fr pe", "pp wi", "ai", "wi fr ai"]), st.booleans(), st.data()
)
def test_however_it_is_cut_the_text_is_the_same_and_states_values_only(pieces, asked, is_certain, data):
    text = "".join(pieces)
    reading = read("fr pe pp ai wi", asked, None if is_certain else f"{asked} fr pe".replace("fr fr", "fr"))
    whole = ground(text, reading, "What?", REFUSAL)
    grounder, said, at = Grounder(reading, "What?", REFUSAL), "", 0
    while at < len(text):
        step = data.draw(st.integers(1, 12))
        said += grounder.feed(text[at : at + step])
        at += step
    said += grounder.finish()
    assert (said, tuple(grounder.stated), grounder.refused) == (whole.text, whole.stated, whole.refused)
    assert "Lyon" not in said
    assert whole.refused or all(reading.facts[place].value in said for place in whole.stated)
    assert whole.refused or whole.stated
    if is_certain:
        assert set(whole.stated) == set(reading.asked)
