"""The write plan against a plain dictionary."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.errors import FactIdCollisionError
from kblam_ray.facts.fact import Fact, content_hash, fact_id
from kblam_ray.table.plan import index_facts, plan_write, refuse_collisions_with_live

IDENTITY = "entity,property"
texts = st.sampled_from(["a", "b", "c", "d"])
facts = st.lists(st.builds(Fact, texts, texts, texts), max_size=30)


def live_table(rows: list[Fact]) -> pa.Table:
    live = sorted({fact_id(fact, IDENTITY): content_hash(fact) for fact in rows}.items())
    return pa.table(
        {
            "fact_id": pa.array([id_ for id_, _ in live], pa.int64()),
            "content_hash": pa.array([content for _, content in live], pa.string()),
        }
    )


@given(before=facts, given_facts=facts, mode=st.sampled_from(["upsert", "sync"]))
def test_plan_equals_a_dictionary(before, given_facts, mode):
    old = {fact_id(fact, IDENTITY): content_hash(fact) for fact in before}
    new = {fact_id(fact, IDENTITY): (row, content_hash(fact)) for row, fact in enumerate(given_facts)}
    plan = plan_write(index_facts(given_facts, IDENTITY), live_table(before), mode)
    assert plan.added.tolist() == sorted(row for id_, (row, _) in new.items() if id_ not in old)
    changed = sorted(row for id_, (row, content) in new.items() if id_ in old and old[id_] != content)
    assert plan.changed.tolist() == changed
    assert plan.unchanged == len(new) - len(plan.written)
    assert plan.duplicates == len(given_facts) - len(new)
    gone = sorted(old.keys() - new.keys()) if mode == "sync" else []
    assert plan.deleted_ids.tolist() == gone


def test_two_identities_with_one_id_in_the_input_are_refused():
    clash = [Fact("x", "y", "z"), Fact("a\x1fb", "c", "v"), Fact("a", "b\x1fc", "w")]
    assert fact_id(clash[1]) == fact_id(clash[2])
    with pytest.raises(FactIdCollisionError, match="rows 2 and 3"):
        plan_write(index_facts(clash, IDENTITY), live_table([]), "upsert")


def test_two_identities_with_one_id_against_the_table_are_refused():
    there, given_fact = Fact("a\x1fb", "c", "v"), Fact("a", "b\x1fc", "w")
    rows = pa.table({"fact_id": [fact_id(there)], "entity": ["a\x1fb"], "property": ["c"], "value": ["v"]})
    with pytest.raises(FactIdCollisionError, match="'a', 'b"):
        refuse_collisions_with_live([given_fact], [rows], IDENTITY)
    refuse_collisions_with_live([there], [rows], IDENTITY)


def test_a_large_index_is_planned_by_hashes_alone():
    facts = [Fact(f"e{n}", "p", str(n)) for n in range(1000)]
    index = pa.concat_tables([index_facts(facts[:300], IDENTITY), index_facts(facts[300:], IDENTITY)])
    plan = plan_write(index, live_table(facts[500:]), "upsert")
    np.testing.assert_array_equal(plan.added, np.arange(500))
    assert plan.unchanged == 500
