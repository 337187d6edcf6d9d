"""The Ray Data pipeline from files to a table, in this process, against plain Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.encoders import load_encoder
from kblam_ray.encoders.base import EncodedBatch
from kblam_ray.errors import (
    BadRowError,
    EncoderMismatchError,
    FactIdCollisionError,
    InputError,
    StorageError,
    TableError,
)
from kblam_ray.facts.fact import fact_id, key_text
from kblam_ray.table.pipeline import run, spool
from kblam_ray.table.pipeline.run import EmbedSettings, embed

pytestmark = pytest.mark.usefixtures("ray_session")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(entity: str, name: str, value: str, **extra: str) -> dict:
    return {"entity": entity, "property": name, "value": value, **extra}


def embed_hashing(kb: Path, *inputs: str, **settings) -> dict:
    return embed(EmbedSettings(kb=str(kb), input=list(inputs), encoder="hashing:64", num_workers=2, **settings))


def embed_until_commit(kb: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies when all is embedded and nothing committed."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "commit_parts", die)
        with pytest.raises(KeyboardInterrupt):
            embed_hashing(kb, source)


def contents(kb: Path, version: int | None = None) -> dict[tuple[str, str], str]:
    facts = KnowledgeBase.open(str(kb), version=version).snapshot().facts.to_pylist()
    return {(fact["entity"], fact["property"]): fact["value"] for fact in facts}


CITIES = [row(f"City {n}", name, f"{name} {n % 7}") for n in range(40) for name in ("mayor", "river", "founded")]


def test_upsert_then_nothing_then_sync_and_every_version_stays_readable(tmp_path):
    kb, source = tmp_path / "kb", write(tmp_path / "facts.jsonl", CITIES)
    first = embed_hashing(kb, source)
    assert first["version"] == 0
    assert first["previous_version"] is None
    assert (first["added"], first["changed"], first["unchanged"], first["num_facts"]) == (120, 0, 0, 120)
    distinct = {key_text(r["entity"], r["property"]) for r in CITIES} | {r["value"] for r in CITIES}
    assert first["texts_embedded"] == len(distinct)

    again = embed_hashing(kb, source)
    assert (again["version"], again["committed"], again["texts_embedded"], again["unchanged"]) == (0, False, 0, 120)

    newer = [*CITIES[:100], row("City 0", "mayor", "Ada"), row("City 99", "mayor", "Bo")]
    changed = write(tmp_path / "newer.jsonl", newer)
    synced = embed_hashing(kb, changed, mode="sync")
    assert (synced["added"], synced["changed"], synced["deleted"], synced["duplicates"]) == (1, 1, 20, 1)
    assert synced["texts_embedded"] == 4
    assert contents(kb) == {(r["entity"], r["property"]): r["value"] for r in newer}
    assert embed_hashing(kb, source, mode="sync")["version"] == 2
    assert contents(kb) == contents(kb, 0) == {(r["entity"], r["property"]): r["value"] for r in CITIES}
    assert contents(kb, 1) == {(r["entity"], r["property"]): r["value"] for r in newer}


def test_each_embedding_is_the_encoders_for_its_text(tmp_path):
    kb = tmp_path / "kb"
    embed_hashing(kb, write(tmp_path / "facts.jsonl", CITIES))
    snapshot = KnowledgeBase.open(str(kb)).snapshot()
    encoder = load_encoder("hashing:64")
    facts = snapshot.facts.to_pylist()
    keys_MP = encoder.encode([key_text(fact["entity"], fact["property"]) for fact in facts])
    values_MP = encoder.encode([fact["value"] for fact in facts])
    np.testing.assert_array_equal(snapshot.key_embeddings_MP, keys_MP.astype(np.float16))
    np.testing.assert_array_equal(snapshot.value_embeddings_MP, values_MP.astype(np.float16))
    assert [fact["fact_id"] for fact in facts] == sorted(fact_id(Fact(r["entity"], r["property"], "")) for r in CITIES)


def test_many_files_are_one_input_in_the_order_given(tmp_path):
    kb = tmp_path / "kb"
    first = write(tmp_path / "b.jsonl", [row("x", "p", "from the first file")])
    second = write(tmp_path / "a.jsonl", [row("x", "p", "from the second file"), row("y", "p", "1")])
    summary = embed_hashing(kb, first, second)
    assert (summary["rows_read"], summary["duplicates"], summary["num_facts"]) == (3, 1, 2)
    assert contents(kb)["x", "p"] == "from the second file"


def test_metadata_comes_back_and_a_change_of_metadata_is_a_change(tmp_path):
    kb = tmp_path / "kb"
    embed_hashing(kb, write(tmp_path / "a.jsonl", [row("x", "p", "v", source="book")]))
    summary = embed_hashing(kb, write(tmp_path / "b.jsonl", [row("x", "p", "v", source="film")]))
    assert summary["changed"] == 1
    assert KnowledgeBase.open(str(kb)).snapshot().facts["metadata"].to_pylist() == ['{"source":"film"}']


def test_a_bad_row_fails_the_job_and_names_file_and_line(tmp_path):
    kb = tmp_path / "kb"
    source = tmp_path / "facts.jsonl"
    source.write_text('{"entity": "a", "property": "p", "value": "1"}\n{"entity": "b"}\n{"entity": \n')
    with pytest.raises(BadRowError, match=r"first of 2 bad rows.*facts.jsonl: line 2"):
        embed_hashing(kb, str(source))
    assert not kb.exists()


def test_skipped_rows_are_written_out_and_the_others_kept(tmp_path):
    kb = tmp_path / "kb"
    source = tmp_path / "facts.jsonl"
    source.write_bytes(
        b'{"entity": "a", "property": "p", "value": 7}\n{"entity": "b", "property": "p", "value": "v"}\n\xff\n'
    )
    summary = embed_hashing(kb, str(source), on_error="skip")
    assert (summary["rows_read"], summary["rows_rejected"], summary["added"]) == (3, 2, 1)
    rejected = [json.loads(line) for line in Path(summary["rejected_path"]).read_text().splitlines()]
    assert [bad["line"] for bad in rejected] == [1, 3]
    assert contents(kb) == {("b", "p"): "v"}


def test_a_table_that_is_a_whole_bucket_keeps_its_rejected_rows_inside(tmp_path, s3_uri):
    source = write(tmp_path / "facts.jsonl", [{"entity": "b"}])
    summary = embed(EmbedSettings(kb=s3_uri, input=[source], encoder="hashing:64", on_error="skip"))
    assert summary["rejected_path"].startswith(f"{s3_uri}/_rejected/")


def test_a_file_that_breaks_off_fails_even_when_bad_rows_are_skipped(tmp_path):
    source = tmp_path / "facts.json"
    source.write_text('[{"entity": "a", "property": "p", "value": "1"}, {"entity": "b", "prop')
    with pytest.raises(BadRowError, match=r"facts.json: row 2"):
        embed_hashing(tmp_path / "kb", str(source), on_error="skip")


def test_sync_with_an_input_of_no_facts_does_not_empty_the_table(tmp_path):
    kb = tmp_path / "kb"
    embed_hashing(kb, write(tmp_path / "a.jsonl", CITIES))
    with pytest.raises(InputError, match="would delete the whole table"):
        embed_hashing(kb, write(tmp_path / "b.jsonl", [{"entity": "only"}]), mode="sync", on_error="skip")
    assert len(contents(kb)) == 120


def test_another_encoder_or_identity_is_refused(tmp_path):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", CITIES[:3])
    embed_hashing(kb, source)
    with pytest.raises(EncoderMismatchError):
        embed(EmbedSettings(kb=str(kb), input=[source], encoder="hashing:32"))
    with pytest.raises(TableError, match="identity"):
        embed_hashing(kb, source, identity="entity,property,value")
    without = embed(EmbedSettings(kb=str(kb), input=[source]))
    assert (without["encoder"], without["unchanged"]) == ("hashing:64", 3)


def test_a_multi_valued_table_keeps_values_side_by_side(tmp_path):
    kb = tmp_path / "kb"
    rows = [{"head": "Kim", "relation": "speaks", "tail": language} for language in ("Korean", "English", "Korean")]
    summary = embed_hashing(kb, write(tmp_path / "a.jsonl", rows), identity="entity,property,value")
    assert (summary["added"], summary["duplicates"], summary["texts_embedded"]) == (2, 1, 3)
    assert summary["ambiguous_keys"] == 0
    values = KnowledgeBase.open(str(kb)).snapshot().facts["value"].to_pylist()
    assert sorted(values) == ["English", "Korean"]


def test_two_identities_with_one_id_are_named(tmp_path):
    kb = tmp_path / "kb"
    one, other = row("a\x1fb", "c", "v"), row("a", "b\x1fc", "w")
    with pytest.raises(FactIdCollisionError, match=r"'a\\x1fb', 'c'.*'a', 'b\\x1fc'"):
        embed_hashing(kb, write(tmp_path / "both.jsonl", [one, other]))
    embed_hashing(kb, write(tmp_path / "one.jsonl", [one]))
    with pytest.raises(FactIdCollisionError, match=r"'a\\x1fb', 'c'.*'a', 'b\\x1fc'"):
        embed_hashing(kb, write(tmp_path / "other.jsonl", [other]))


def test_facts_that_share_a_key_embedding_are_counted(tmp_path, capsys):
    kb = tmp_path / "kb"
    # The key texts coincide although the facts differ.
    rows = [row("y of z", "x", "1"), row("z", "x of y", "2"), row("other", "p", "3")]
    assert embed_hashing(kb, write(tmp_path / "a.jsonl", rows))["ambiguous_keys"] == 2
    assert "share a key embedding" in capsys.readouterr().err
    later = [row("f", "d of e", "2")]
    embed_hashing(kb, write(tmp_path / "b.jsonl", [row("e of f", "d", "1")]))
    assert embed_hashing(kb, write(tmp_path / "c.jsonl", later))["ambiguous_keys"] == 1
    capsys.readouterr()
    assert embed_hashing(kb, write(tmp_path / "d.jsonl", [row("clear", "p", "1")]))["ambiguous_keys"] == 0
    assert "share a key embedding" not in capsys.readouterr().err


def test_a_run_that_died_before_its_commit_is_continued(tmp_path, monkeypatch):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", CITIES)
    embed_until_commit(kb, source, monkeypatch)
    summary = embed_hashing(kb, source)
    assert summary["version"] == 0
    assert (summary["texts_embedded"], summary["texts_resumed"]) == (0, 141)
    assert contents(kb) == {(r["entity"], r["property"]): r["value"] for r in CITIES}


def test_damaged_leftovers_of_a_dead_run_are_embedded_anew(tmp_path, monkeypatch):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", CITIES)
    embed_until_commit(kb, source, monkeypatch)
    empty, cut, *_ = kb.glob("_spool/*/*/*.parquet")
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:100])
    summary = embed_hashing(kb, source)
    assert summary["texts_embedded"] + summary["texts_resumed"] == 141
    assert 0 < summary["texts_resumed"] < 141
    assert contents(kb) == {(r["entity"], r["property"]): r["value"] for r in CITIES}


def test_a_dead_runs_texts_are_kept_until_a_run_has_used_them_all(tmp_path, monkeypatch):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", [row("x", "p", "v"), row("y", "p", "w")])
    embed_until_commit(kb, source, monkeypatch)
    monkeypatch.setattr(spool, "ABANDONED_S", 0)
    embed_hashing(kb, write(tmp_path / "other.jsonl", [row("z", "p", "v")]))
    assert len(spool.find_leftovers(str(kb))) == 1
    assert embed_hashing(kb, source)["texts_embedded"] == 0
    assert not spool.find_leftovers(str(kb))


def test_runs_that_die_one_after_another_leave_no_more_than_the_first_of_them(tmp_path, monkeypatch):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", [row("x", "p", "v"), row("y", "p", "w")])

    def texts_of_spools() -> list[int]:
        found = spool.find_leftovers(str(kb))
        return [sum(len(spool.read_spool(file)) for file in leftover.files) for leftover in found]

    for _ in range(3):
        spool._given_up.clear()  # as if each were a process of its own
        embed_until_commit(kb, source, monkeypatch)
    assert texts_of_spools() == [4, 4, 4]
    # What this process knows to have failed is not kept beside its copy.
    embed_until_commit(kb, source, monkeypatch)
    assert texts_of_spools() == [4, 4, 4]


def test_what_two_dead_runs_noticed_of_one_text_counts_once(tmp_path):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", [row("x", "p", "v")])
    spec = load_encoder("hashing:64").spec
    noticed = EncodedBatch(np.ones((1, 64), np.float32), truncated=[0], unknown=[0])
    for run_id in ("earlier", "later"):
        spool.write_spool(spool.spool_uri(str(kb), spec, run_id), spool.spool_rows([spool.text_hash("v")], noticed))
    summary = embed_hashing(kb, source)
    assert (summary["texts_resumed"], summary["texts_embedded"]) == (1, 1)
    assert (summary["texts_truncated"], summary["texts_with_unknown_tokens"]) == (1, 1)


def overtaken(monkeypatch: pytest.MonkeyPatch, *writes) -> None:
    """Let other writers commit while a run works: each of `writes` before the commit of one pass."""
    pending, stamp = list(writes), run.next_updated_at

    def stamp_and_write(kb_uri: str) -> int:
        if pending:
            pending.pop(0)()
        return stamp(kb_uri)

    monkeypatch.setattr(run, "next_updated_at", stamp_and_write)


def test_a_sync_that_is_overtaken_makes_the_table_equal_to_its_input(tmp_path, monkeypatch):
    kb, source = tmp_path / "kb", write(tmp_path / "a.jsonl", CITIES)
    embed_hashing(kb, source)
    other = KnowledgeBase.open(str(kb))
    overtaken(
        monkeypatch,
        lambda: other.upsert([Fact("City 1", "mayor", "an intruder"), Fact("Atlantis", "mayor", "Plato")]),
        lambda: other.delete([("City 2", "mayor")]),
    )
    wanted = [*CITIES[1:], row("new", "p", "v")]
    summary = embed_hashing(kb, write(tmp_path / "b.jsonl", wanted), mode="sync")
    assert contents(kb, summary["version"]) == {(r["entity"], r["property"]): r["value"] for r in wanted}
    assert (summary["previous_version"], summary["version"], summary["num_facts"]) == (0, 5, 120)
    assert (summary["added"], summary["changed"], summary["deleted"]) == (2, 1, 2)


def test_an_upsert_that_is_overtaken_takes_nothing_from_the_other_writer(tmp_path, monkeypatch):
    kb = tmp_path / "kb"
    embed_hashing(kb, write(tmp_path / "a.jsonl", CITIES))
    other = KnowledgeBase.open(str(kb))
    overtaken(monkeypatch, lambda: other.upsert([Fact("Atlantis", "mayor", "Plato")]))
    summary = embed_hashing(kb, write(tmp_path / "b.jsonl", [row("new", "p", "v")]))
    assert (summary["version"], summary["num_facts"]) == (2, 122)
    assert contents(kb)["Atlantis", "mayor"] == "Plato"


def test_an_input_that_cannot_be_read_on_a_worker_is_a_storage_error(tmp_path, monkeypatch):
    source = Path(write(tmp_path / "a.jsonl", CITIES))
    found = run.expand_inputs([str(source)])
    source.unlink()
    monkeypatch.setattr(run, "expand_inputs", lambda _: found)
    with pytest.raises(StorageError, match=r"a\.jsonl"):
        embed_hashing(tmp_path / "kb", str(source))


def test_gpus_that_a_local_ray_does_not_have_are_refused_and_not_waited_for(tmp_path):
    with pytest.raises(InputError, match=r"GPUs for each worker.*--gpus-per-worker"):
        embed_hashing(tmp_path / "kb", write(tmp_path / "a.jsonl", CITIES), gpus_per_worker=64)
