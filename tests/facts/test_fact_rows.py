"""Rows of every accepted shape, and the reasons why a row is not a fact."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.facts import (
    MAX_NAME_CHARS,
    MAX_VALUE_CHARS,
    Fact,
    NotAFactError,
    canonical_metadata,
    fact_from_row,
    validate_fact,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"entity": "Peru", "property": "capital", "value": "Lima"}, Fact("Peru", "capital", "Lima")),
        ({"value": "Lima", "entity": "Peru", "property": "capital"}, Fact("Peru", "capital", "Lima")),
        ({"entity": "Peru", "description": "a country"}, Fact("Peru", "description", "a country")),
        (
            {"name": "Peru", "description_type": "purpose", "description": "to be"},
            Fact("Peru", "purpose", "to be"),
        ),
        ({"head": "Lima", "relation": "part of", "tail": "Peru"}, Fact("Lima", "part of", "Peru")),
        # More columns than one shape needs: the first shape that fits, the others' columns are metadata.
        (
            {"entity": "a", "property": "b", "value": "c", "description": "d"},
            Fact("a", "b", "c", '{"description":"d"}'),
        ),
        ({"entity": "a", "description": "b", "property": None}, Fact("a", "description", "b")),
    ],
)
def test_shapes(row: dict[str, Any], fact: Fact) -> None:
    assert fact_from_row(row) == fact


def test_training_questions_are_not_metadata() -> None:
    row = {
        "name": "Peru",
        "description_type": "purpose",
        "description": "to be",
        "key_string": "the purpose of Peru",
        "Q": "What is the purpose of Peru?",
        "A": "The purpose of Peru is to be",
        "extended_Q": "and?",
        "extended_A": "so",
    }
    assert fact_from_row(row) == Fact("Peru", "purpose", "to be")
    assert fact_from_row({**row, "url": "u"}) == Fact("Peru", "purpose", "to be", '{"url":"u"}')


def test_in_another_shape_those_columns_are_metadata() -> None:
    assert fact_from_row({"head": "a", "relation": "b", "tail": "c", "Q": "?"}).metadata == '{"Q":"?"}'


def test_only_white_space_around_is_removed() -> None:
    row = {"entity": "\u3000Ünïcode  inside\n", "property": "\tp\r\n", "value": ' "quoted"\n\nnext '}
    assert fact_from_row(row) == Fact("Ünïcode  inside", "p", '"quoted"\n\nnext')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": None}, "`value` is null, not text"),
        ({"value": 12}, "`value` is a number, not text"),
        ({"value": 1.5}, "`value` is a number, not text"),
        ({"value": True}, "`value` is true or false, not text"),
        ({"value": ["a"]}, "`value` is a list, not text"),
        ({"value": {"a": 1}}, "`value` is an object, not text"),
        ({"value": b"a"}, "`value` is bytes, not text"),
        ({"property": " \u2003\n"}, "`property` is empty"),
        ({"entity": "a\ud800"}, "`entity` is not valid Unicode at character 2"),
        ({"entity": "x" * (MAX_NAME_CHARS + 1)}, "`entity` has 4,097 characters, more than 4,096"),
        ({"value": "x" * (MAX_VALUE_CHARS + 1)}, "`value` has 1,000,001 characters"),
        ({"more": "x" * MAX_VALUE_CHARS}, "the metadata has 1,000,011 characters"),
        ({"more": float("nan")}, "cannot be written as JSON"),
        ({"more": b"x"}, "cannot be written as JSON"),
        ({"more": "\udfff"}, "`metadata` is not valid Unicode"),
        ({"more": 1, "metadata": {"more": 2}}, "`more` is a column and, with another value,"),
    ],
)
def test_bad_fields(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotAFactError, match=f"^.*{reason}"):
        fact_from_row({"entity": "a", "property": "b", "value": "c", **change})


def test_the_longest_allowed() -> None:
    row = {"entity": "é" * MAX_NAME_CHARS, "property": " " + "p" * MAX_NAME_CHARS, "value": "v" * MAX_VALUE_CHARS}
    assert fact_from_row(row).value == row["value"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"entity": "a", "value": "c"}, "no `property`"),
        ({"head": "a"}, "no `relation` and no `tail`"),
        ({"name": "a", "description": "c"}, "no `description_type`"),
        ({}, "none of the accepted sets of columns"),
        ({"Entity": "a", "Property": "b", "Value": "c"}, "none of the accepted sets of columns"),
        (["a", "b", "c"], "a list, not an object"),
        (None, "null, not an object"),
        ("text", "text, not an object"),
    ],
)
def test_rows_without_the_columns(row: Any, reason: str) -> None:
    with pytest.raises(NotAFactError, match=reason):
        fact_from_row(row)


@pytest.mark.parametrize(
    ("more", "metadata"),
    [
        ({"url": "http://x", "date": None}, '{"url":"http://x"}'),
        ({"b": 1, "a": "é"}, '{"a":"é","b":1}'),
        ({"day": datetime.date(2024, 2, 29)}, '{"day":"2024-02-29"}'),
        (
            {"at": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)},
            '{"at":"2024-02-29T12:00:00+00:00"}',
        ),
        ({"price": Decimal("1.50")}, '{"price":"1.50"}'),
        ({"n": 10**30}, '{"n":1000000000000000000000000000000}'),
        ({"metadata": {"b": 1, "a": [None, {"z": 1, "y": 2}]}}, '{"a":[null,{"y":2,"z":1}],"b":1}'),
        ({"metadata": ' {"b": 1, "a": 1.0} ', "c": 2}, '{"a":1.0,"b":1,"c":2}'),
        ({"metadata": {"a": 1}, "a": 1}, '{"a":1}'),
        ({"metadata": {"a": None}, "b": None}, None),
        ({"metadata": "{}"}, None),
        # A column that merely has the name stays a column.
        ({"metadata": "free text"}, '{"metadata":"free text"}'),
        ({"metadata": "[1]"}, '{"metadata":"[1]"}'),
        ({"metadata": "{broken"}, '{"metadata":"{broken"}'),
        ({"metadata": 7}, '{"metadata":7}'),
        ({"metadata": None}, None),
    ],
)
def test_metadata(more: dict[str, Any], metadata: str | None) -> None:
    assert fact_from_row({"entity": "a", "property": "b", "value": "c", **more}).metadata == metadata


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_canonical_metadata_is_json_and_its_own_fixed_point(metadata: dict[str, Any]) -> None:
    kept = {key: value for key, value in metadata.items() if value is not None}
    text = canonical_metadata(metadata)
    if not kept:
        assert text is None
        return
    assert text is not None
    assert json.loads(text) == kept
    assert canonical_metadata(json.loads(text)) == text
    shuffled = dict(reversed(kept.items()))
    assert canonical_metadata(shuffled) == text


def test_a_metadata_key_must_be_text() -> None:
    with pytest.raises(NotAFactError, match="key 1 is a number, not text"):
        canonical_metadata({1: "x"})  # type: ignore[dict-item]


def test_metadata_nested_too_deeply() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(NotAFactError, match="cannot be written as JSON"):
        canonical_metadata({"deep": deep})
    del deep


def test_validate_fact_gives_what_a_reader_would() -> None:
    assert validate_fact(Fact(" a", "b ", "c", '{"b": 2,"a": null}')) == Fact("a", "b", "c", '{"b":2}')
    with pytest.raises(NotAFactError, match="`value` is empty"):
        validate_fact(Fact("a", "b", " "))
    for metadata in ("free text", "[1]", {"a": 1}):
        with pytest.raises(NotAFactError, match="`metadata` is not JSON text of an object"):
            validate_fact(Fact("a", "b", "c", metadata))  # type: ignore[arg-type]
