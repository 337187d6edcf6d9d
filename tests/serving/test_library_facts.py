"""Looking facts up: every page in order of ids, nothing twice, nothing missed, whatever changes in between."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from library_samples import KB, Follower, encoder, make, model, run

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.errors import InputError
from kblam_ray.facts.fact import fact_id
from kblam_ray.serving.library import finding
from kblam_ray.serving.library.finding import MAX_LIMIT, find_facts
from kblam_ray.serving.messages import FactFilter

FACTS = [
    Fact("C++", "author", "Bjarne Stroustrup"),
    Fact("C", "author", "Dennis Ritchie"),
    Fact("a.b", "pattern", "(x|y)*"),
    Fact("axb", "pattern", "100 % \\d+ [a-z]"),
    Fact("ÉCLAIR", "Zutat", "Brandteig"),
    Fact("éclair au café", "taste", "ΚΑΦΕΣ, сладкий"),
    Fact("Peru", "capital", "Lima", '{"source":"atlas"}'),
    Fact("Lima", "country", "Peru"),
    Fact("北京", "country", "中国"),
]


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Of several chunks, with rows that are hidden: 40 facts, then changes, twice."""
    kb = KnowledgeBase.create(str(tmp_path_factory.mktemp("facts") / "kb"), encoder())
    kb.upsert([*FACTS, *(Fact(f"e{number}", "p", "old") for number in range(40))])
    memory = model().load(kb)
    for revision in range(2):
        kb.upsert([Fact(f"e{number}", "p", f"new {revision}") for number in range(revision, 40, 5)])
        kb.delete([("e5", "p"), ("e20", "p")] if revision else [("e1", "p")])
        memory = model().refresh(memory, kb)
    assert len(memory.views) > 1
    return memory


def expected(memory, is_in=lambda row: True) -> list[str]:
    return [str(row["fact_id"]) for row in memory.lookup(sorted(memory.fact_ids.tolist())) if is_in(row)]


def pages(memory, **which) -> list[str]:
    found, after = [], None
    while True:
        page = find_facts(memory, FactFilter(after=after, **which))
        assert page.kb_version == memory.version
        assert len(page.data) <= which.get("limit", 100)
        found += [row["fact_id"] for row in page.data]
        if page.next is None:
            return found
        assert page.next == found[-1]
        after = page.next


@pytest.mark.parametrize("rows_per_step", [1, 3, 16_384])
@pytest.mark.parametrize("limit", [1, 7, 46, 47, 1_000])
def test_pages_together_are_all_facts_in_order(memory, limit, rows_per_step, monkeypatch):
    monkeypatch.setattr(finding, "ROWS_PER_STEP", rows_per_step)
    assert memory.num_facts == 47
    assert pages(memory, limit=limit) == expected(memory)
    assert pages(memory, limit=limit, text="NEW") == expected(memory, lambda row: "new" in row["value"])
    assert pages(memory, limit=limit, text="nowhere") == []


def test_a_fact_is_shown_whole(memory):
    page = find_facts(memory, FactFilter(entity="Peru"))
    assert page.data == (
        {
            "fact_id": str(fact_id(FACTS[6])),
            "entity": "Peru",
            "property": "capital",
            "value": "Lima",
            "metadata": '{"source":"atlas"}',
        },
    )
    assert page.next is None


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("c++", {"C++"}),
        ("A.B", {"a.b"}),
        ("(X|Y)*", {"a.b"}),
        ("\\D+ [", {"axb"}),
        ("100 %", {"axb"}),
        ("Éclair", {"ÉCLAIR", "éclair au café"}),
        ("καφες", {"éclair au café"}),
        ("СЛАДКИЙ", {"éclair au café"}),
        ("京", {"北京"}),
        ("LIMA", {"Peru", "Lima"}),
        ("author", {"C++", "C"}),
        ("atlas", set()),
        ("%", {"axb"}),
        ("_", set()),
        ("a\0b", set()),
    ],
)
def test_text_in_any_case_taken_literally(memory, text, entities):
    assert {row["entity"] for row in find_facts(memory, FactFilter(text=text)).data} == entities


def test_filters_together_and_an_empty_text(memory):
    assert pages(memory, text="") == expected(memory)
    both = find_facts(memory, FactFilter(property="author", text="RITCHIE"))
    assert [row["entity"] for row in both.data] == ["C"]
    assert find_facts(memory, FactFilter(entity="C", property="pattern")).data == ()
    assert find_facts(memory, FactFilter(entity="c")).data == ()  # equal means equal
    assert find_facts(memory, FactFilter(entity="C", property="author", text="bjarne")).data == ()


@settings(max_examples=40)
@given(text=st.text(min_size=1, max_size=5, alphabet=st.characters(min_codepoint=1, max_codepoint=0x2FF)))
def test_any_text_finds_at_least_what_holds_it(memory, text):
    found = set(pages(memory, text=text))
    assert found >= set(
        expected(memory, lambda row: any(text in row[name] for name in ("entity", "property", "value")))
    )


@pytest.mark.parametrize("limit", [0, -1, MAX_LIMIT + 1])
def test_limits_out_of_range(memory, limit):
    with pytest.raises(InputError, match="limit"):
        find_facts(memory, FactFilter(limit=limit))


@pytest.mark.parametrize("after", ["", "x", "1.0", " 1", "+1", "1e3", "٣", str(2**63), str(-(2**63) - 1), "9" * 5_000])
def test_an_after_that_is_no_fact_id(memory, after):
    with pytest.raises(InputError, match="after"):
        find_facts(memory, FactFilter(after=after))


def test_the_ends_of_all_ids(memory):
    assert find_facts(memory, FactFilter(after=str(2**63 - 1))).data == ()
    assert len(find_facts(memory, FactFilter(after=str(-(2**63)))).data) == memory.num_facts


def test_a_text_that_is_no_unicode(memory):
    with pytest.raises(InputError, match="looked for"):
        find_facts(memory, FactFilter(text="\ud800"))


def test_paging_while_the_version_changes(tmp_path):
    """Facts that are there all along come once each; every page says its version."""
    kb = make(str(tmp_path / "kb"), 60, "stays")
    staying = {str(fact_id(Fact(f"e{number}", "p", "stays"))) for number in range(60)}

    async def test():
        async with Follower() as it:
            it.follow(kb=kb.uri)
            found, versions, after = [], [], None
            for revision in range(100):
                page = await it.library.find_facts(KB, FactFilter(limit=9, after=after))
                found += [row["fact_id"] for row in page.data]
                versions.append(page.kb_version)
                after = page.next
                if after is None:
                    break
                come = [(f"comes {revision} {number}", "p", "new") for number in range(5)]
                changes = [(f"e{number}", "p", f"changed {revision}") for number in range(revision, 60, 7)]
                version = await asyncio.to_thread(kb.upsert, [*come, *changes])
                gone = [(f"comes {revision - 1} {number}", "p") for number in range(5)]
                version = await asyncio.to_thread(kb.delete, gone) if revision else version
                await it.until_version(version)
            assert after is None
            assert len(set(found)) == len(found)
            assert set(found) >= staying
            assert [int(id_) for id_ in found] == sorted(int(id_) for id_ in found)
            assert len(set(versions)) == len(versions) > 5
            old = await it.library.find_facts(KB.__class__("kb", 0), FactFilter(limit=100))
            assert ({row["fact_id"] for row in old.data}, old.kb_version) == (staying, 0)

    run(test)
