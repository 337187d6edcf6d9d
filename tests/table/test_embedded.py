"""Facts and their embeddings in memory: one row per fact in every part, whatever they came from."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from table.fake_encoder import FakeEncoder, embedding

from kblam_ray.encoders.base import EncodedBatch
from kblam_ray.errors import EmbeddingError, EncoderMismatchError, InputError
from kblam_ray.facts.fact import Fact, fact_id, key_text
from kblam_ray.facts.split import is_held_out
from kblam_ray.facts.synthetic import SyntheticFacts
from kblam_ray.table import KnowledgeBase
from kblam_ray.table.embedded import EmbeddedFacts

FACTS = [
    Fact("Peru", "capital", "Lima", '{"source":"atlas"}'),
    Fact("Peru", "population", "34 million"),
    Fact("北京", "country", "China"),
]


def check_rows(facts: EmbeddedFacts) -> None:
    for row, fact in enumerate(facts.facts):
        assert np.array_equal(facts.keys_MP[row], embedding(key_text(fact.entity, fact.property)))
        assert np.array_equal(facts.values_MP[row], embedding(fact.value))


def test_embedded_here_and_read_from_a_table_are_the_same_facts(tmp_path):
    here = EmbeddedFacts.embed(FACTS, FakeEncoder())
    kb = KnowledgeBase.create(str(tmp_path / "kb"), FakeEncoder())
    kb.upsert(FACTS)
    read = EmbeddedFacts.of(kb)
    check_rows(here)
    check_rows(read)
    assert here.facts == tuple(FACTS)
    assert set(read.facts) == set(FACTS)
    assert dict(zip(read.fact_ids_M.tolist(), read.facts, strict=True)) == {fact_id(fact): fact for fact in FACTS}
    assert read.encoder == here.encoder
    first_version = kb.version
    kb.delete([("Peru", "capital")])
    assert len(EmbeddedFacts.of(kb)) == 2
    assert len(EmbeddedFacts.of(kb, first_version)) == 3


def test_each_text_is_embedded_once():
    encoder = FakeEncoder()
    EmbeddedFacts.embed([Fact("a", "b", "same"), Fact("c", "d", "same")], encoder)
    assert sorted(encoder.texts) == ["same", "the b of a", "the d of c"]


def test_several_values_of_one_property():
    many = [Fact("Peru", "language", "Spanish"), Fact("Peru", "language", "Quechua")]
    facts = EmbeddedFacts.embed(many, FakeEncoder())
    assert facts.fact_ids_M.tolist() == [fact_id(fact, "entity,property,value") for fact in many]
    with pytest.raises(InputError, match="the language of Peru"):
        EmbeddedFacts.embed([*many, many[0]], FakeEncoder())
    with pytest.raises(InputError, match="the language of Peru"):
        EmbeddedFacts.embed(many, FakeEncoder(), identity="entity,property")


def test_take_and_concat_keep_rows_together():
    facts = EmbeddedFacts.embed(FACTS, FakeEncoder())
    some = facts.take([2, 0])
    assert some.facts == (FACTS[2], FACTS[0])
    check_rows(some)
    check_rows(facts.take(np.array([False, True, False])))
    for wrong in ([3], [-1], [0, 0]):
        with pytest.raises(InputError):
            facts.take(wrong)
    together = some + facts
    assert together.facts == (FACTS[2], FACTS[0], FACTS[1])
    check_rows(together)
    assert len(facts.take([])) == 0


def test_concat_refuses_other_encoders_and_contradictions():
    facts = EmbeddedFacts.embed(FACTS, FakeEncoder())
    with pytest.raises(EncoderMismatchError, match="one encoder"):
        facts + EmbeddedFacts.embed(FACTS, FakeEncoder(revision="r2"))
    with pytest.raises(InputError, match="'Lima' and 'Cuzco'"):
        facts + EmbeddedFacts.embed([Fact("Peru", "capital", "Cuzco")], FakeEncoder())
    with pytest.raises(InputError, match="no facts"):
        EmbeddedFacts.concat([])


def test_split_is_by_entity_and_whole():
    facts = EmbeddedFacts.embed(list(SyntheticFacts(3).facts(0, 400)), FakeEncoder())
    train, held_out = facts.split(0.2, seed=5)
    assert {fact.entity for fact in train.facts}.isdisjoint(fact.entity for fact in held_out.facts)
    assert set(train.facts) | set(held_out.facts) == set(facts.facts)
    assert all(is_held_out(fact.entity, 0.2, 5) for fact in held_out.facts)
    assert 20 < len(held_out) < 160
    assert len(train.split(0.2, seed=5)[1]) == 0
    with pytest.raises(InputError, match="from 0 to 1"):
        facts.split(1.5)


def test_what_does_not_fit_together_is_refused():
    facts = EmbeddedFacts.embed(FACTS, FakeEncoder())
    with pytest.raises(InputError, match="one of each"):
        EmbeddedFacts(facts.facts, facts.fact_ids_M[:2], facts.keys_MP, facts.values_MP, facts.encoder)
    for number in (np.inf, -np.inf, np.nan):
        broken_MP = facts.values_MP.copy()
        broken_MP[1, 3] = number
        with pytest.raises(EmbeddingError, match="the population of Peru"):
            EmbeddedFacts(facts.facts, facts.fact_ids_M, facts.keys_MP, broken_MP, facts.encoder)
    with pytest.raises(EmbeddingError, match="float32"):
        EmbeddedFacts(facts.facts, facts.fact_ids_M, facts.keys_MP.astype(np.float32), facts.values_MP, facts.encoder)

    class Broken(FakeEncoder):
        def encode_batch(self, texts):
            return EncodedBatch(np.full((len(texts), 8), 1e6, np.float32))

    with pytest.raises(EmbeddingError, match="not finite in float16"):
        EmbeddedFacts.embed(FACTS, Broken())


def test_it_travels_between_processes():
    facts = EmbeddedFacts.embed(FACTS, FakeEncoder())
    again = pickle.loads(pickle.dumps(facts))
    assert again.facts == facts.facts
    check_rows(again)
