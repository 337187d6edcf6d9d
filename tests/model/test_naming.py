"""Mentions of names in questions: whole, misspelt, and names that are nobody's."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kblam_ray.model.mentions import EntityIndex
from kblam_ray.model.naming import NEAR, Wording


def best_by_trying(text: str, phrase: str) -> int:
    """The least edit distance, swaps counted once, of any run of whole words of plain ASCII text."""
    words = text.split(" ")
    runs = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i, len(words) + 1)]
    return min(distance(run, phrase) for run in runs)


def distance(a: str, b: str) -> int:
    table = [[i + j if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            ways = [table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1])]
            if i > 1 and j > 1 and (a[i - 1], a[i - 2]) == (b[j - 2], b[j - 1]):
                ways.append(table[i - 2][j - 2] + 1)
            table[i][j] = min(ways)
    return table[-1][-1]


@example("baab", "aabc")
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=5).map(" ".join),
    st.text("abc", min_size=4, max_size=7),
)
def test_similarity_is_the_edit_distance_to_the_nearest_run_of_words(text, phrase):
    similarity, (start, end) = Wording(text).similarity(phrase)
    least = min(best_by_trying(text, phrase), len(phrase))
    assert similarity == pytest.approx(1 - least / len(phrase))
    if similarity >= NEAR:
        assert distance(text[start:end], phrase) == least


@pytest.mark.parametrize(
    ("question", "phrase", "found"),
    [
        ("What is the mass of Fobberg?", "Fooberg", "Fobberg"),
        ("What is the mass of Foobreg?", "Fooberg", "Foobreg"),
        ("tell me Zorbo Mattt's mass", "Zorbo Matt", "Zorbo Mattt"),
        ("STRASSE  5, please", "Straße 5", "STRASSE 5"),
        ("北京的人口", "北京", "北京"),
        ("capital of Perugia?", "Peru", None),
        ("is it us?", "uk", None),
        ("", "Peru", None),
    ],
)
def test_misspelt_names_are_found_and_others_are_not(question, phrase, found):
    wording = Wording(question)
    similarity, span = wording.similarity(phrase)
    assert (similarity >= NEAR) is (found is not None)
    if found is not None:
        assert wording.text[slice(*span)] == found


@pytest.mark.parametrize(
    ("question", "entity", "strange", "touching"),
    [
        ("What is the mass of Foo?", "Foo", [], 0),
        ("Foo: mass?", "Foo", [], 0),
        ("As for Foo, I am looking for the mass.", "Foo", [], 0),
        ("What is the mass of New Foo?", "Foo", ["New"], 1),
        ("What is the mass of Foo II?", "Foo", ["II"], 1),
        ("what is the mass of foo 3?", "Foo", ["3"], 1),
        ("What is the mass of Foo-B?", "Foo", ["B"], 1),
        ("Какая масса у Новый Фуу?", "фуу", ["Новый"], 1),
        ("What is the mass of Foo, and where is Bar?", "Foo", ["Bar"], 0),
    ],
)
def test_words_like_parts_of_names(question, entity, strange, touching):
    wording = Wording(question)
    (span,) = wording.mentions(entity)
    found = wording.strange_words([span])
    assert [wording.text[slice(*word)] for word in found] == strange
    assert wording.touches(span, found) == touching


@pytest.mark.parametrize(
    ("question", "phrase", "found"),
    [
        ("AI는 무엇인가요?", "AI", True),
        ("AI은(는) 무엇인가요?", "AI", True),
        ("서울의 인구는 얼마인가요?", "서울", True),
        ("서울의 인구는 얼마인가요?", "인구", True),
        ("한국은행의 설립 연도는?", "한국", False),
        ("한국은행의 설립 연도는?", "한국은행", True),
        ("사과는 무엇인가요?", "사", False),
        ("AI팀은 어디에 있나요?", "AI", False),
    ],
)
def test_korean_writes_its_particles_onto_names(question, phrase, found):
    assert Wording(question).names(phrase) is found
    assert list(EntityIndex(pa.table({"entity": [phrase]})).named_in(question)) == [0] * found
