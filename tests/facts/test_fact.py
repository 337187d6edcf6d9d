"""Identity, id and content hash: computed again here from the published rule, with hashlib alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.facts import Fact, content_hash, fact_id, identity_fields, key_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
FACTS = st.builds(Fact, TEXTS, TEXTS, TEXTS, st.none() | TEXTS)


def test_key_text_is_the_papers() -> None:
    assert key_text("Peru", "capital") == "the capital of Peru"


def test_fact_ids_never_change() -> None:
    # Tables in the field hold these numbers: a change here is a change of format.
    assert fact_id(Fact("Peru", "capital", "Lima")) == -684227769670385585
    assert fact_id(Fact("Peru", "capital", "Lima"), "entity,property,value") == -3647779768019523741
    assert fact_id(Fact("ปารีส", "人口 👨‍👩‍👧", "x")) == -2745373307655644234


@given(FACTS)
def test_fact_id_is_blake2b_of_the_joined_identity(fact: Fact) -> None:
    for identity, joined in (
        ("entity,property", f"{fact.entity}\x1f{fact.property}"),
        ("entity,property,value", f"{fact.entity}\x1f{fact.property}\x1f{fact.value}"),
    ):
        first = hashlib.blake2b(joined.encode()).digest()[:8]
        expected = sum(byte << (8 * place) for place, byte in enumerate(first))
        expected -= (1 << 64) * (expected >> 63)
        assert fact_id(fact, identity) == expected  # type: ignore[arg-type]
        assert -(1 << 63) <= expected < 1 << 63


@given(FACTS, st.text(" \t\r\n\u3000\x1f"), st.text(" \t\r\n\u3000\x1f"))
def test_fact_id_does_not_see_white_space_around(fact: Fact, before: str, after: str) -> None:
    padded = replace(fact, entity=before + fact.entity + after, property=after + fact.property + before)
    assert fact_id(padded) == fact_id(fact)


@given(FACTS, TEXTS)
def test_default_identity_is_entity_and_property(fact: Fact, value: str) -> None:
    other = replace(fact, value=value, metadata=None)
    assert fact_id(other) == fact_id(fact)
    assert identity_fields(fact) == (fact.entity, fact.property)
    three = "entity,property,value"
    assert (fact_id(other, three) == fact_id(fact, three)) == (value == fact.value)


@given(FACTS, FACTS)
def test_content_hash_tells_facts_apart(fact: Fact, other: Fact) -> None:
    assert (content_hash(fact) == content_hash(other)) == (fact == other)


@given(FACTS, st.integers(min_value=0))
def test_content_hash_sees_where_one_field_ends(fact: Fact, cut: int) -> None:
    # The same characters in the same order, cut into fields elsewhere.
    joined = fact.entity + fact.property + fact.value
    cut = 1 + cut % (len(joined) - 1)
    moved = Fact(joined[:cut], joined[cut:], fact.value, fact.metadata)
    assert (content_hash(moved) == content_hash(fact)) == (moved == fact)


def test_content_hash_never_changes() -> None:
    assert content_hash(Fact("Peru", "capital", "Lima")) == "3a58264ac3416aa5660ca412528e919f"
    assert content_hash(Fact("Peru", "capital", "Lima", '{"a":1}')) == "e3c56f2b2d43cecd110dcdb58987b8c4"
