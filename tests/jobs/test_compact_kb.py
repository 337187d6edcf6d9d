"""jobs/compact_kb.py as a process: fewer files, the same facts; wrong settings change nothing."""

from __future__ import annotations

import pytest

from kblam_ray import Fact, KnowledgeBase
from tests.jobs.running import run_job


@pytest.fixture
def kb(tmp_path) -> KnowledgeBase:
    """Three files: of four facts one is replaced and one deleted."""
    kb = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:64")
    kb.upsert([Fact(f"entity {n}", "p", "old") for n in range(4)])
    kb.upsert([Fact("entity 0", "p", "new")])
    kb.delete([("entity 1", "p")])
    return kb


def test_files_become_one_and_facts_stay(kb):
    before = kb.snapshot().facts
    code, summary, stderr = run_job("compact_kb", "--kb", kb.uri)
    assert (code, summary["ok"], summary["committed"]) == (0, True, True), stderr
    assert (summary["previous_version"], summary["version"], summary["num_facts"]) == (2, 3, 3)
    assert (summary["files_before"], summary["files_after"], summary["files_vacuumed"]) == (3, 1, 0)
    assert KnowledgeBase.open(kb.uri).snapshot().facts.equals(before)
    code, summary, _ = run_job("compact_kb", "--kb", kb.uri)
    assert (code, summary["version"], summary["committed"]) == (0, 3, False)


def test_vacuum_removes_what_no_kept_version_needs(kb):
    before = kb.snapshot().facts
    code, summary, stderr = run_job(
        "compact_kb", "--kb", kb.uri, "--vacuum", "--retention-h", "0", "--allow-short-retention"
    )
    assert (code, summary["files_after"], summary["files_vacuumed"]) == (0, 1, 3), stderr
    assert KnowledgeBase.open(kb.uri).snapshot().facts.equals(before)


def test_a_short_retention_without_leave_and_a_missing_table_are_refused_and_nothing_changed(kb, tmp_path):
    code, summary, _ = run_job("compact_kb", "--kb", kb.uri, "--vacuum", "--retention-h", "0")
    assert (code, summary["error"]["code"]) == (2, "bad_input")
    assert "--allow-short-retention" in summary["error"]["message"]
    assert KnowledgeBase.open(kb.uri).version == 2
    code, summary, _ = run_job("compact_kb", "--kb", str(tmp_path / "none"))
    assert (code, summary["error"]["code"]) == (2, "table_not_found")
