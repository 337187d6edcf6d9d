"""Which facts are read in a conversation: those of whom the last question speaks, whatever was spoken of before."""

from __future__ import annotations

import pytest
import torch
from model_samples import make_kb, tiny_adapter, tiny_llama

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.model.grounding.selection import Reading, choose

BEFORE = "What is the capital of France?"


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> KnowledgeMemory:
    found = make_kb(tmp_path_factory.mktemp("read") / "kb").snapshot()
    return KnowledgeMemory.from_embeddings(
        tiny_adapter(tiny_llama()),
        torch.tensor(found.key_embeddings_MP),
        torch.tensor(found.value_embeddings_MP),
        facts=found.facts,
    )


def read(memory: KnowledgeMemory, *questions: str, best: str = "France", others: float = 1e-5) -> Reading:
    """What is read when attention is on one entity."""
    rows = memory.lookup(memory.fact_ids)
    return choose(memory, torch.tensor([1.0 if row["entity"] == best else others for row in rows]), questions)


def asked(reading: Reading) -> list[tuple[str, str]]:
    return [reading.facts[at].pair for at in reading.asked]


@pytest.mark.parametrize("question", ["And of Peru?", "What about Peru?", "Peru?", "And Peru?", "Und von Peru?"])
def test_the_same_of_another_entity(memory, question: str):
    reading = read(memory, BEFORE, question)
    assert asked(reading) == [("Peru", "capital")]
    assert reading.allowed == set(reading.asked)
    assert reading.is_certain


def test_the_property_comes_from_the_newest_question_that_names_one(memory):
    assert asked(read(memory, "What is the population of Peru?", BEFORE, "Thanks!", "And Peru?")) == [
        ("Peru", "capital")
    ]


def test_a_question_of_its_own_takes_no_property_from_before(memory):
    reading = read(memory, BEFORE, "Who lives in Peru?")
    assert not reading.is_certain
    assert {fact.entity for fact in reading.facts} == {"Peru"}


def test_nothing_is_said_of_the_one_where_the_other_is_asked_for(memory):
    reading = read(memory, BEFORE, "And Ur?")
    assert [fact.pair for fact in reading.facts] == [("Ur", "founder")]


def test_a_follow_up_without_an_entity_is_about_the_one_before(memory):
    assert asked(read(memory, BEFORE, "And the capital?")) == [("France", "capital")]
    assert asked(read(memory, BEFORE, "And who said so?")) == [("France", "capital")]


def test_no_fact_is_read_twice(memory):
    reading = read(memory, "What of Peru?", "And who is that?", best="Peru", others=0.5)
    assert len({fact.fact_id for fact in reading.facts}) == len(reading.facts)
    assert len(set(reading.asked)) == len(reading.asked)
