"""One refresh after another in this process: what is taken up, when, and what is left alone."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from refresh_samples import contents, lines, once, put, settings, watcher

from kblam_ray import KnowledgeBase
from kblam_ray.errors import BadRowError, EncoderMismatchError, InputError, RayStartError, StorageError
from kblam_ray.table.commits import read_commits
from kblam_ray.table.refresh import history as history_module
from kblam_ray.table.refresh import run as run_module
from kblam_ray.table.refresh import taking
from kblam_ray.table.refresh.history import History
from kblam_ray.table.refresh.ledger import METADATA_KEY, Verdict


@pytest.fixture
def kb(tmp_path: Path) -> Path:
    return tmp_path / "kb"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    return path


def test_only_what_is_new_or_changed_is_read_and_embedded(kb, folder):
    put(folder / "a.jsonl", ("a", "p", "1"), ("b", "p", "1"))
    first = once(kb, folder)
    assert (first["version"], first["previous_version"], first["added"], first["files_read"]) == (0, None, 2, 1)
    assert first["texts_embedded"] == 3
    assert first["lag_s"]["max"] >= first["lag_s"]["mean"] > 0
    put(folder / "b.jsonl", ("c", "p", "1"))
    put(folder / "a.jsonl", ("a", "p", "2"), ("b", "p", "1"))
    second = once(kb, folder)
    assert (second["version"], second["previous_version"]) == (1, 0)
    assert (second["added"], second["changed"], second["files_read"], second["num_facts"]) == (1, 1, 2, 3)
    third = once(kb, folder)
    assert (third["version"], third["refreshes"], third["files_read"], third["lag_s"]["last"]) == (1, 0, 0, None)
    assert contents(kb) == {("a", "p"): "2", ("b", "p"): "1", ("c", "p"): "1"}


def test_the_commit_says_what_it_took_up(kb, folder):
    path = put(folder / "a b ü.jsonl", ("a", "p", "1"))
    once(kb, folder)
    (commit,) = read_commits(str(kb), [0]) or []
    status = path.stat()
    tag = f"{status.st_size}-{status.st_mtime_ns}@{status.st_ctime_ns}"
    assert commit.info[METADATA_KEY]["files"] == [[str(path), tag]]
    (write_id,) = commit.write_ids
    assert write_id.startswith("refresh-")


def test_an_input_that_is_not_there_yet_is_fine(kb, tmp_path):
    summary = once(kb, tmp_path / "later", tmp_path / "also" / "*.csv")
    assert (summary["version"], summary["num_facts"], summary["files_read"]) == (None, 0, 0)
    put(tmp_path / "later" / "deep" / "a.jsonl", ("a", "p", "1"))
    assert once(kb, tmp_path / "later")["added"] == 1


def test_of_files_that_state_one_fact_the_one_modified_last_counts(kb, folder):
    for name, when, value in (("a", 300, "newest"), ("b", 100, "oldest"), ("c", 200, "middle")):
        put(folder / f"{name}.jsonl", ("x", "p", value))
        os.utime(folder / f"{name}.jsonl", (when, when))
    assert once(kb, folder)["refreshes"] == 1
    assert contents(kb) == {("x", "p"): "newest"}


def test_a_file_that_comes_back_with_an_older_time_is_a_change(kb, folder):
    path = put(folder / "a.jsonl", ("x", "p", "1"))
    once(kb, folder)
    put(path, ("x", "p", "2"))
    os.utime(path, (1_000, 1_000))
    assert once(kb, folder)["changed"] == 1
    assert contents(kb) == {("x", "p"): "2"}


def test_formats_and_names(kb, folder):
    (folder / "a.csv").write_text("entity,property,value\na,p,1\n")
    with gzip.open(folder / "日本 x.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines([("日本", "p", "東京")]))
    (folder / "array.json").write_text('[{"entity": "j", "property": "p", "value": "1"}]')
    for passed_over in ("notes.txt", "_SUCCESS", ".hidden.jsonl"):
        (folder / passed_over).write_text("no facts")
    assert once(kb, folder)["files_read"] == 3
    assert set(contents(kb)) == {("a", "p"), ("日本", "p"), ("j", "p")}


def test_a_name_that_is_not_utf8_is_said_and_passed_over(kb, folder, capfd):
    put(folder / "a.jsonl", ("a", "p", "1"))
    (folder / os.fsdecode(b"\xff.jsonl")).write_text(lines([("b", "p", "1")]))
    assert once(kb, folder)["num_facts"] == 1
    assert "not UTF-8" in capfd.readouterr().err


def test_the_table_beside_its_sources_is_none_of_them(tmp_path):
    put(tmp_path / "a.jsonl", ("a", "p", "1"))
    once(tmp_path / "kb", tmp_path)
    assert (tmp_path / "kb.refresh" / "status.json").exists()
    assert once(tmp_path / "kb", tmp_path)["files_read"] == 0


def test_a_bad_file_fails_the_job_after_the_good_ones_are_committed(kb, folder):
    put(folder / "good.jsonl", ("a", "p", "1"))
    (folder / "bad.jsonl").write_text('{"entity": "b", "prop')
    (folder / "empty.jsonl").touch()
    with pytest.raises(BadRowError, match=r"and 1 other files; all else is taken up .*(bad|empty).jsonl"):
        once(kb, folder)
    assert contents(kb) == {("a", "p"): "1"}
    status = json.loads((kb.parent / "kb.refresh" / "status.json").read_text())
    assert {Path(refused["file"]).name for refused in status["refused"]} == {"bad.jsonl", "empty.jsonl"}
    put(folder / "bad.jsonl", ("b", "p", "1"))
    (folder / "empty.jsonl").unlink()
    assert once(kb, folder)["added"] == 1


def test_bad_rows_are_left_out_and_kept(kb, folder):
    (folder / "a.jsonl").write_text(lines([("a", "p", "1")]) + '{"entity": "b"}\n')
    assert once(kb, folder, on_error="skip")["added"] == 1
    (rejected,) = (kb.parent / "kb.rejected").iterdir()
    assert json.loads(rejected.read_text())["line"] == 2
    (folder / "cut.json").write_text('[{"entity": "c", "property": "p", "value": "1"}, {"ent')
    with pytest.raises(BadRowError, match=r"cut\.json"):
        once(kb, folder, on_error="skip")


def test_facts_that_collide_keep_their_file_out_and_no_other(kb, folder):
    put(folder / "a.jsonl", ("a", "p\x1fq", "1"))
    put(folder / "b.jsonl", ("a\x1fp", "q", "1"))
    for number in range(5):
        put(folder / f"c{number}.jsonl", (f"c{number}", "p", "1"))
    with pytest.raises(InputError, match="one fact_id"):
        once(kb, folder)
    assert len(contents(kb)) == 6


def test_a_file_that_changes_while_it_is_read_is_read_again(kb, folder, monkeypatch):
    path = put(folder / "a.jsonl", ("a", "p", "old"))
    real, calls = taking.read_batch, []

    def changing(files, sources, on_error):
        batch = real(files, sources, on_error) if calls else None
        if not calls:
            look = sources.look_at
            put(path, ("a", "p", "new"))
            batch = real(files, sources, on_error)
            assert batch.moved == list(files)
            sources.look_at = look
        calls.append(len(files))
        return batch

    monkeypatch.setattr(taking, "read_batch", changing)
    once(kb, folder)
    assert len(calls) == 2
    assert contents(kb) == {("a", "p"): "new"}
    assert KnowledgeBase.open(str(kb)).version == 0


def test_without_the_copy_the_log_tells_and_without_both_nothing_is_embedded_again(kb, folder, monkeypatch):
    for number in range(3):
        put(folder / f"{number}.jsonl", (f"e{number}", "p", "1"))
        once(kb, folder)
    copy = kb.parent / "kb.refresh" / "ledger.json"
    for damage in (copy.unlink, lambda: copy.write_text("{"), lambda: copy.write_text('{"format": 1, "version": 9}')):
        damage()
        assert once(kb, folder)["files_read"] == 0
    copy.unlink()
    monkeypatch.setattr(history_module, "MAX_COMMITS_READ", 1)
    monkeypatch.setattr(history_module, "_COMMITS_AT_ONCE", 1)
    again = once(kb, folder)
    assert (again["files_read"], again["texts_embedded"], again["version"]) == (2, 0, 2)


def test_a_copy_of_another_table_is_not_believed(tmp_path, folder):
    put(folder / "a.jsonl", ("a", "p", "1"))
    once(tmp_path / "kb", folder)
    os.rename(tmp_path / "kb", tmp_path / "old")
    assert once(tmp_path / "kb", folder)["added"] == 1


def test_a_touched_file_is_read_once_more_and_changes_nothing(kb, folder):
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    once(kb, folder)
    KnowledgeBase.open(str(kb)).upsert([("b", "p", "by hand")])
    os.utime(path)
    assert once(kb, folder)["files_read"] == 1
    summary = once(kb, folder)
    assert (summary["files_read"], summary["version"]) == (0, 1)


def test_what_others_write_stays_until_the_file_changes(kb, folder):
    path = put(folder / "a.jsonl", ("a", "p", "1"), ("b", "p", "1"))
    once(kb, folder)
    KnowledgeBase.open(str(kb)).upsert([("a", "p", "by hand")])
    assert once(kb, folder)["refreshes"] == 0
    assert contents(kb)["a", "p"] == "by hand"
    put(path, ("a", "p", "1"), ("b", "p", "2"))
    once(kb, folder)
    assert contents(kb) == {("a", "p"): "1", ("b", "p"): "2"}


def test_sync_makes_the_table_equal_to_all_files(kb, folder):
    put(folder / "a.jsonl", ("a", "p", "1"), ("b", "p", "1"))
    put(folder / "b.jsonl", ("c", "p", "1"))
    once(kb, folder, mode="sync")
    KnowledgeBase.open(str(kb)).upsert([("d", "p", "by hand")])
    put(folder / "a.jsonl", ("a", "p", "2"))
    summary = once(kb, folder, mode="sync")
    assert (summary["changed"], summary["deleted"]) == (1, 2)
    assert contents(kb) == {("a", "p"): "2", ("c", "p"): "1"}
    (folder / "b.jsonl").unlink()
    assert once(kb, folder, mode="sync")["deleted"] == 1
    assert contents(kb) == {("a", "p"): "2"}
    assert once(kb, folder, mode="sync")["files_read"] == 0


def test_sync_deletes_nothing_while_a_file_cannot_be_read(kb, folder):
    put(folder / "a.jsonl", ("a", "p", "1"), ("b", "p", "1"))
    once(kb, folder, mode="sync")
    (folder / "bad.jsonl").write_text("{")
    put(folder / "a.jsonl", ("a", "p", "2"))
    with pytest.raises(BadRowError):
        once(kb, folder, mode="sync")
    assert contents(kb) == {("a", "p"): "2", ("b", "p"): "1"}
    (folder / "bad.jsonl").unlink()
    once(kb, folder, mode="sync")
    assert contents(kb) == {("a", "p"): "2"}


def test_sync_never_empties_a_table(kb, folder):
    path = put(folder / "a.json", ("a", "p", "1"))
    once(kb, folder, mode="sync")
    path.write_text("[]")
    with pytest.raises(InputError, match="delete the whole table"):
        once(kb, folder, mode="sync")
    path.unlink()
    assert once(kb, folder, mode="sync")["num_facts"] == 1
    folder.rmdir()
    assert once(kb, folder, mode="sync")["num_facts"] == 1


def test_a_thousand_small_files_are_one_commit(kb, folder):
    for number in range(1_000):
        (folder / f"{number}.jsonl").write_text(lines([(f"e{number}", "p", f"v{number % 7}")]))
    summary = once(kb, folder)
    assert (summary["refreshes"], summary["files_read"], summary["num_facts"]) == (1, 1_000, 1_000)
    assert once(kb, folder)["files_read"] == 0


def test_compaction_and_vacuum_when_worthwhile(kb, folder):
    for number in range(4):
        put(folder / "a.jsonl", ("a", "p", f"{number}"))
        once(kb, folder)
    summary = once(kb, folder, compact_files=4, vacuum_every_h=1)
    assert (summary["compactions"], summary["version"], summary["num_facts"]) == (1, 4, 1)
    assert json.loads((kb.parent / "kb.refresh" / "status.json").read_text())["vacuumed_at"] > 0
    assert once(kb, folder, compact_files=4, vacuum_every_h=1)["compactions"] == 0


def test_many_texts_go_through_the_pipeline_and_the_next_run_knows(kb, folder, ray_session):
    put(folder / "a.jsonl", *((f"e{number}", "p", f"v{number}") for number in range(30)))
    (folder / "bad.jsonl").write_text("{")
    with pytest.raises(BadRowError):
        once(kb, folder, small_texts=5, num_workers=1)
    (folder / "bad.jsonl").unlink()
    assert len(contents(kb)) == 30
    assert once(kb, folder, small_texts=5)["files_read"] == 0
    put(folder / "a.jsonl", ("e0", "p", "v0"))
    summary = once(kb, folder, mode="sync", small_texts=0, num_workers=1)
    assert summary["deleted"] == 29
    assert once(kb, folder, mode="sync", small_texts=0)["files_read"] == 0


def test_another_encoder_than_the_tables_is_refused(kb, folder):
    put(folder / "a.jsonl", ("a", "p", "1"))
    once(kb, folder)
    put(folder / "b.jsonl", ("b", "p", "1"))
    with pytest.raises(EncoderMismatchError):
        once(kb, folder, encoder="hashing:32")
    assert once(kb, folder, encoder=None)["added"] == 1


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError):
        settings("kb")
    with pytest.raises(InputError, match="not the URL of a queue"):
        watcher("/nowhere/kb", "/nowhere/in", sqs_queue_url="queue")
    with pytest.raises(InputError, match="wildcard in a bucket"):
        watcher("/nowhere/kb", "s3://b*/x")


def test_crossing_refreshes_are_noticed_and_put_right(kb, folder):
    """A slow refresh commits an old content after a fast one has committed the new one."""
    path = put(folder / "a.jsonl", ("x", "p", "0"))
    once(kb, folder)
    put(path, ("x", "p", "1"))
    slow = watcher(kb, folder)
    plan_facts, put_in = taking.plan_facts, []

    def planned(*arguments):
        plan = plan_facts(*arguments)
        if not put_in:
            put_in.append(True)
            put(path, ("x", "p", "2"))
            once(kb, folder)
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taking, "plan_facts", planned)
        patch.setattr(taking, "MAX_REPLANS", 1)
        slow._pass()
    assert contents(kb) == {("x", "p"): "1"}
    file = slow._sources.look_at(str(path))
    slow._history.look()
    assert slow._history.ledger.verdict(str(path), file.tag) is Verdict.DISPUTED
    once(kb, folder)
    assert contents(kb) == {("x", "p"): "2"}


def test_a_store_that_is_away_fails_once_and_nothing_is_lost(kb, folder, monkeypatch):
    put(folder / "a.jsonl", ("a", "p", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(taking, "commit", lambda *_: (_ for _ in ()).throw(StorageError("away", help="wait")))
        with pytest.raises(StorageError, match="away"):
            once(kb, folder)
    assert once(kb, folder)["added"] == 1


def test_workers_that_fail_are_said_in_our_words(kb, folder, monkeypatch):
    from ray.exceptions import RayError

    def fail(*_, **__):
        raise RayError("an actor died\nand so on")

    put(folder / "a.jsonl", ("a", "p", "1"))
    monkeypatch.setattr(run_module, "take_up_backlog", fail)
    monkeypatch.setattr(run_module, "_leave_ray", lambda: None)
    with pytest.raises(RayStartError, match="the workers failed: an actor died "):
        once(kb, folder, small_texts=0)


def test_the_history_of_a_table_that_was_made_anew(kb, folder, tmp_path):
    put(folder / "a.jsonl", ("a", "p", "1"))
    once(kb, folder)
    history = History(str(kb))
    history.look()
    assert history.ledger.records
    os.rename(kb, tmp_path / "old")
    assert history.look() is None
    KnowledgeBase.create(str(kb), "hashing:16").upsert([("b", "p", "1")])
    history.look()
    assert not history.ledger.records
