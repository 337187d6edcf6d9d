"""Synthetic facts: the same everywhere, never twice, in shards or whole, and with the variety that training needs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import MAX_NAME_CHARS, Fact
from kblam_ray.facts.synthetic import KINDS, PROPERTY_TYPES, SyntheticFacts, lexicon
from kblam_ray.facts.synthetic.draws import Draws, permute
from kblam_ray.facts.synthetic.names import DECORATIONS, STYLES


def test_the_facts_of_a_seed_are_frozen() -> None:
    facts = list(SyntheticFacts(7).facts(0, 6))
    assert facts[0] == Fact("ヘテホ川", "depth", "8 m")
    assert facts[4] == Fact("Faint Ash Galaxy", "launch date", "2007-07-26")
    assert facts[5].entity == "Dabreha, or the Art of public health"


def test_another_process_with_another_hash_seed_makes_the_same_facts() -> None:
    program = (
        "from kblam_ray.facts.synthetic import SyntheticFacts\n"
        "for fact in SyntheticFacts(3).facts(1000, 1064): print(ascii(fact))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {"".join(f"{fact!a}\n" for fact in SyntheticFacts(3).facts(1000, 1064)).encode()}


def test_facts_one_by_one_in_shards_and_in_one_run_are_equal() -> None:
    maker = SyntheticFacts(11)
    whole = list(maker.facts(0, 200))
    assert [maker.fact(i) for i in range(200)] == whole
    assert [fact for start in range(0, 200, 7) for fact in maker.facts(start, min(start + 7, 200))] == whole
    assert list(maker.facts(5, 5)) == []


def test_no_identity_and_no_entity_name_comes_twice() -> None:
    maker = SyntheticFacts(5)
    facts = list(maker.facts(0, 40_000)) + list(maker.facts(10**9, 10**9 + 40_000))
    assert len({(fact.entity, fact.property) for fact in facts}) == len(facts)
    entities = {maker.entity_of(i) for start in (0, 10**9) for i in range(start, start + 40_000)}
    assert len({fact.entity.casefold() for fact in facts}) == len(entities)


def test_names_stay_one_to_one_because_roots_and_decorations_cannot_be_confused() -> None:
    decorations = {word.casefold() for words in DECORATIONS.values() for phrase in words for word in phrase.split()}
    patterns = " ".join(pattern for kind in KINDS.values() for pattern in kind.patterns)
    decorations |= {word.casefold() for word in re.sub(r"\{[^}]*\}", " ", patterns).split()}
    words = set(lexicon.NOUNS) | set(lexicon.ADJECTIVES)
    assert not {w for w in lexicon.NOUNS if w in decorations}
    assert not {noun for noun in words if noun + "s" in words}
    onset = "(?:[bdfghjklmnprstvwz]|br|dr|gr|kr|tr|st|th|sh|ch|pl|fl|gl|kl)"
    root = re.compile(f"(?:{onset}[aeiou][nlrm]?)+{onset}[aouy]")
    assert not {word for word in decorations if root.fullmatch(word)}
    for name, style in STYLES.items():
        for length in range(2, 4):
            assert len({style.spell(n, length, 9) for n in range(60)}) == 60, name


def test_every_pattern_has_one_root_and_every_property_fits_somewhere() -> None:
    for kind in KINDS.values():
        assert len(set(kind.properties)) == len(kind.properties) >= 8, kind.name
        for pattern in kind.patterns:
            tokens = re.findall(r"\{(\w+)(?::\w+)?\}", pattern)
            assert sum(token in STYLES for token in tokens) == 1, pattern
            assert all(token in STYLES or token in DECORATIONS for token in tokens), pattern
    used = {name for kind in KINDS.values() for name in kind.properties}
    assert used == {name for name, each in PROPERTY_TYPES.items() if each.value is not None}
    assert len(used) >= 60


def test_paraphrases_do_not_give_the_property_away() -> None:
    for each in PROPERTY_TYPES.values():
        assert len(each.synonyms) >= 2
        assert len(each.asks) >= 2
        for phrase in (*each.synonyms, *each.asks):
            assert each.name.casefold() not in phrase.casefold(), (each.name, phrase)
        assert all(ask.count("{e}") == 1 for ask in each.asks)


def test_values_and_names_vary_in_kind_length_and_script() -> None:
    facts = list(SyntheticFacts(0).facts(0, 5_000))
    texts = [fact.value for fact in facts]
    for shape in (
        r"\d+",
        r"\d{4}-\d\d-\d\d",
        r"[\d,]+ km²",
        r"[A-Z]{3}-\d{4}",
        r"[^,]+, [^,]+ and [^,]+",
        r".*@.*\.example",
    ):
        assert any(re.fullmatch(shape, text) for text in texts), shape
    assert min(map(len, texts)) <= 2
    assert max(map(len, texts)) >= 90
    entities = {fact.entity for fact in facts}
    for script in (
        "[A-Z][a-z]+",
        "[A-Z]+",
        "[a-z]+",
        ".*\\d.*",
        ".*-.*",
        ".*['’].*",
        "[一-龥]+",
        "[ァ-ヺ]+.*",
        "[가-힣]+",
        "[А-я]+",
    ):
        assert any(re.fullmatch(script, name) for name in entities), script
    assert len({fact.property for fact in facts}) >= 60
    assert all(fact.entity == fact.entity.strip() and 0 < len(fact.entity) < MAX_NAME_CHARS for fact in facts)
    assert all(fact.value == fact.value.strip() and fact.value for fact in facts)


def test_near_duplicates_share_all_but_a_mark_and_their_side_of_the_split() -> None:
    maker = SyntheticFacts(2)
    for entity in range(3, 400, 4):
        name, twin = maker.entity_name(entity - 1), maker.entity_name(entity)
        assert name != twin
        assert abs(len(name) - len(twin)) <= 7
        assert maker.kind(entity) == maker.kind(entity - 1)
        assert maker.is_held_out(entity) == maker.is_held_out(entity - 1)
    share = sum(maker.is_held_out(entity, 0.2) for entity in range(4_000)) / 4_000
    assert 0.15 < share < 0.25


def test_another_seed_makes_other_facts() -> None:
    one, other = (set(SyntheticFacts(seed).facts(0, 500)) for seed in (1, 2))
    assert not one & other


def test_entities_are_counted_without_making_them() -> None:
    maker = SyntheticFacts(4)
    facts = list(maker.facts(0, 1_001))
    assert maker.num_entities(1_001) == len({fact.entity for fact in facts})
    assert maker.num_entities(0) == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 1 << 40)])
def test_a_range_that_cannot_be_is_refused(start: int, stop: int) -> None:
    with pytest.raises(InputError, match="Help: give a range"):
        list(SyntheticFacts().facts(start, stop))


@pytest.mark.parametrize("size", [2, 3, 40, 97, 1_000, 4_096])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(n, size, 12) for n in range(size)) == list(range(size))


def test_draws_cover_their_range_evenly() -> None:
    draws = Draws(1, 2)
    counts = [0] * 10
    for _ in range(10_000):
        counts[draws.below(10)] += 1
    assert 850 < min(counts) <= max(counts) < 1_150
