"""A KnowledgeBase embeds what is new, once, commits only changes, and says clearly what it will not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_encoder import FakeEncoder
from rows import contents

from kblam_ray import KnowledgeBase
from kblam_ray.errors import (
    BadRowError,
    EncoderMismatchError,
    EncoderNotFoundError,
    FactIdCollisionError,
    InputError,
    TableError,
    TableNotFoundError,
)
from kblam_ray.facts.fact import Fact
from kblam_ray.table import knowledge_base as knowledge_base_module
from kblam_ray.table import writing
from kblam_ray.table.log import TableLog


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def kb(tmp_path: Path, encoder: FakeEncoder) -> KnowledgeBase:
    return KnowledgeBase.create(str(tmp_path / "kb"), encoder)


def test_create_writes_nothing_until_the_first_facts(kb):
    assert not Path(kb.uri).exists()
    assert (kb.version, kb.num_facts, kb.encoder.name, kb.encoder.dim) == (None, 0, "fake", 8)
    assert kb.refresh() is None
    with pytest.raises(TableNotFoundError, match="upsert the first facts"):
        kb.snapshot()
    with pytest.raises(TableNotFoundError):
        kb.upsert([])
    assert kb.upsert([("France", "capital", "Paris")]) == 0
    assert (kb.version, kb.num_facts) == (0, 1)


def test_every_form_of_a_fact(kb):
    kb.upsert(
        [
            Fact(" a ", "p", "1"),
            ["b", "p", "2"],
            ("c", "p", "3", '{"source": "x"}'),
            {"entity": "d", "property": "p", "value": "4", "source": "y"},
            {"entity": "e", "description": "5"},
        ]
    )
    snapshot = kb.snapshot()
    assert contents(snapshot) == {
        ("a", "p"): "1", ("b", "p"): "2", ("c", "p"): "3", ("d", "p"): "4", ("e", "description"): "5",
    }  # fmt: skip
    metadata = {row["entity"]: row["metadata"] for row in snapshot.facts.to_pylist()}
    assert metadata == {"a": None, "b": None, "c": '{"source":"x"}', "d": '{"source":"y"}', "e": None}


@pytest.mark.parametrize(
    "bad", [("a", "b"), ("a", "b", ""), ("a", "b", 3), {"entity": "a"}, "abc", None, Fact("a", "b", "c", "not json")]
)
def test_a_bad_fact_is_named_by_its_number(kb, bad):
    with pytest.raises(BadRowError, match=r"not a fact: .*item 2.*Help:"):
        kb.upsert([("a", "b", "c"), bad])
    assert kb.refresh() is None


def test_only_new_and_changed_facts_are_embedded_each_text_once(kb, encoder):
    kb.upsert([("France", "capital", "Paris"), ("Spain", "capital", "Madrid"), ("X", "capital", "Paris")])
    assert sorted(encoder.texts) == sorted(set(encoder.texts))
    encoder.texts.clear()
    version = kb.upsert([("France", "capital", "Paris"), ("Spain", "capital", "Toledo"), ("Y", "capital", "Paris")])
    assert sorted(encoder.texts) == ["Paris", "Toledo", "the capital of Spain", "the capital of Y"]
    assert version == 1


def test_nothing_changed_no_commit(kb, encoder):
    facts = [("France", "capital", "Paris"), ("Spain", "capital", "Madrid")]
    kb.upsert(facts)
    encoder.texts.clear()
    assert kb.upsert(facts) == 0
    assert kb.upsert([]) == 0
    assert kb.delete([("Italy", "capital")]) == 0
    assert encoder.texts == []
    assert TableLog.open(kb.uri).version == 0


def test_metadata_alone_is_a_change(kb):
    kb.upsert([("France", "capital", "Paris")])
    assert kb.upsert([("France", "capital", "Paris", '{"source": "atlas"}')]) == 1


def test_the_later_row_wins(kb):
    kb.upsert([("France", "capital", "Lyon"), ("France", "capital", "Paris")])
    assert contents(kb.snapshot()) == {("France", "capital"): "Paris"}


def test_delete_and_add_again(kb):
    kb.upsert([("France", "capital", "Paris"), ("Spain", "capital", "Madrid")])
    assert kb.delete([("France", "capital"), ("Italy", "capital"), (" Spain ", "capital")]) == 1
    assert (kb.num_facts, contents(kb.snapshot())) == (0, {})
    assert kb.upsert([("France", "capital", "Paris")]) == 2
    assert contents(kb.snapshot()) == {("France", "capital"): "Paris"}
    assert contents(kb.snapshot(0)) == {("France", "capital"): "Paris", ("Spain", "capital"): "Madrid"}
    assert kb.changes(0, 2).deleted_ids.shape == (1,)


def test_deleting_before_the_first_facts(kb):
    with pytest.raises(TableNotFoundError):
        kb.delete([("France", "capital")])


def test_many_values_side_by_side(tmp_path, encoder):
    kb = KnowledgeBase.create(str(tmp_path / "kb"), encoder, identity="entity,property,value")
    kb.upsert([("Paris", "in", "France"), ("Paris", "in", "Europe")])
    assert kb.upsert([("Paris", "in", "France"), ("Paris", "in", "the north")]) == 1
    assert kb.num_facts == 3
    with pytest.raises(BadRowError, match=r"3 texts \(entity,property,value\), this one 2"):
        kb.delete([("Paris", "in")])
    assert kb.delete([("Paris", "in", "Europe")]) == 2
    assert sorted(kb.snapshot().facts["value"].to_pylist()) == ["France", "the north"]
    assert KnowledgeBase.open(kb.uri).info.identity == "entity,property,value"


def test_every_form_of_an_identity(kb):
    kb.upsert([(name, "p", "v") for name in "abcd"])
    kb.delete([("a", "p"), ["b", "p"], {"entity": "c", "property": "p", "value": "ignored"}])
    assert list(contents(kb.snapshot())) == [("d", "p")]
    with pytest.raises(BadRowError, match="this one 1"):
        kb.delete([{"entity": "d"}])


def test_an_identity_of_the_wrong_length(kb):
    kb.upsert([("France", "capital", "Paris")])
    with pytest.raises(BadRowError, match=r"2 texts \(entity,property\), this one 3.*item 1"):
        kb.delete([("France", "capital", "Paris")])


SAME_ID = [("a\x1fb", "c", "1"), ("a", "b\x1fc", "2")]


def test_two_facts_with_one_id_in_one_input(kb):
    with pytest.raises(FactIdCollisionError, match=r"'a\\x1fb', 'c'.*'a', 'b\\x1fc'"):
        kb.upsert(SAME_ID)


def test_two_facts_with_one_id_one_of_them_in_the_table(kb):
    kb.upsert(SAME_ID[:1])
    with pytest.raises(FactIdCollisionError, match=r"'a\\x1fb', 'c'.*'a', 'b\\x1fc'"):
        kb.upsert(SAME_ID[1:])
    with pytest.raises(FactIdCollisionError):
        kb.delete([SAME_ID[1][:2]])
    assert contents(kb.snapshot()) == {("a\x1fb", "c"): "1"}


def test_create_where_a_table_is(kb, encoder):
    kb.upsert([("a", "b", "c")])
    with pytest.raises(TableError, match="there is a table already"):
        KnowledgeBase.create(kb.uri, encoder)


def test_create_with_an_encoder_that_cannot_be_had(tmp_path):
    with pytest.raises((EncoderNotFoundError, InputError)):
        KnowledgeBase.create(str(tmp_path / "kb"), "/no/such/model")


def test_open_what_is_not_there(tmp_path):
    with pytest.raises(TableNotFoundError):
        KnowledgeBase.open(str(tmp_path / "kb"))


def test_another_encoder_is_refused(kb):
    kb.upsert([("a", "b", "c")])
    with pytest.raises(EncoderMismatchError, match=r"revision r1.*not.*revision r2"):
        KnowledgeBase.open(kb.uri, encoder=FakeEncoder("r2"))
    with pytest.raises(EncoderMismatchError):
        KnowledgeBase.open(kb.uri, encoder=FakeEncoder(dim=16))


def test_two_handles_that_create_with_different_encoders(kb, tmp_path):
    other = KnowledgeBase.create(kb.uri, FakeEncoder("r2"))
    kb.upsert([("a", "b", "c")])
    with pytest.raises(EncoderMismatchError):
        other.upsert([("x", "y", "z")])


def test_an_encoder_is_loaded_by_the_tables_name_when_needed(tmp_path, monkeypatch):
    uri = str(tmp_path / "kb")
    KnowledgeBase.create(uri, "hashing:16").upsert([("France", "capital", "Paris")])
    loaded = []
    load = knowledge_base_module.load_encoder
    monkeypatch.setattr(knowledge_base_module, "load_encoder", lambda name: loaded.append(name) or load(name))
    kb = KnowledgeBase.open(uri)
    assert kb.snapshot().num_facts == 1
    kb.delete([("France", "capital")])
    assert loaded == []
    kb.upsert([("Spain", "capital", "Madrid")])
    assert loaded == ["hashing:16"]
    assert np.linalg.norm(kb.snapshot().key_embeddings_MP.astype(np.float32), axis=1) == pytest.approx([1], abs=1e-2)


def test_a_pinned_handle_reads_its_version_and_does_not_write(kb, encoder):
    kb.upsert([("a", "b", "1")])
    kb.upsert([("a", "b", "2")])
    pinned = KnowledgeBase.open(kb.uri, 0, encoder=encoder)
    assert (pinned.version, contents(pinned.snapshot())) == (0, {("a", "b"): "1"})
    for action in (
        lambda: pinned.upsert([("x", "y", "z")]),
        lambda: pinned.delete([("a", "b")]),
        pinned.compact,
        pinned.vacuum,
        pinned.refresh,
    ):
        with pytest.raises(TableError, match="pinned at version 0"):
            action()
    assert TableLog.open(kb.uri).version == 1


def test_a_handle_stays_at_its_version_until_it_is_refreshed_or_writes(kb, encoder):
    kb.upsert([("a", "b", "1")])
    reader = KnowledgeBase.open(kb.uri, encoder=encoder)
    kb.upsert([("a", "b", "2"), ("c", "d", "3")])
    assert (reader.version, reader.num_facts) == (0, 1)
    assert reader.refresh() == 1
    assert reader.num_facts == 2
    kb.upsert([("e", "f", "4")])
    assert reader.upsert([("a", "b", "2")]) == 2
    assert contents(reader.snapshot()) == {("a", "b"): "2", ("c", "d"): "3", ("e", "f"): "4"}


def test_an_encoder_that_fails_leaves_the_table(kb, encoder, monkeypatch):
    kb.upsert([("a", "b", "1")])

    def fail(texts):
        raise ConnectionError("no answer")

    monkeypatch.setattr(encoder, "encode_batch", fail)
    with pytest.raises(ConnectionError):
        kb.upsert([("a", "b", "2")])
    assert TableLog.open(kb.uri).version == 0


def test_a_large_upsert_is_one_commit_of_several_files(kb, monkeypatch):
    monkeypatch.setattr(writing, "FACTS_PER_PART", 10)
    assert kb.upsert((f"e{number}", "p", f"v{number}") for number in range(35)) == 0
    assert len(TableLog.open(kb.uri).files) == 4
    assert contents(kb.snapshot()) == {(f"e{number}", "p"): f"v{number}" for number in range(35)}


def test_a_table_is_used_without_the_libraries_of_encoders_and_jobs(tmp_path):
    """Reading and changing with an encoder of one's own needs none of the optional packages."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_encoder import FakeEncoder
from kblam_ray import KnowledgeBase
kb = KnowledgeBase.create({str(tmp_path / "kb")!r}, FakeEncoder())
kb.upsert([("a", "b", "c")])
assert KnowledgeBase.open(kb.uri).snapshot().key_embeddings_MP.shape == (1, 8)
print(sorted({{"torch", "ray", "openai", "sklearn", "transformers", "onnxruntime"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compact_and_vacuum_move_the_handle(kb):
    kb.upsert([("a", "b", "1")])
    kb.upsert([("a", "b", "2")])
    assert kb.compact() == kb.version == 2
    assert len(kb.vacuum(0, allow_short=True)) == 2
    assert kb.version == TableLog.open(kb.uri).version
    assert contents(kb.snapshot()) == {("a", "b"): "2"}
