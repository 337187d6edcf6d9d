"""A refresh tidies its table when that gains something, and not otherwise: every rewrite takes room until vacuum."""

from __future__ import annotations

from pathlib import Path

import pytest
from refresh_samples import contents, once, put

from kblam_ray.table.log import TableLog
from kblam_ray.table.refresh import upkeep


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "MIN_ROWS_COUNTED", 10)


def rows_of_files(kb: Path) -> list[int]:
    return sorted(file.num_rows or 0 for file in TableLog.open(str(kb)).files)


def test_delete_rows_that_must_stay_are_nothing_to_gain(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", *((f"e{number}", "p", "v") for number in range(40)))
    once(kb, folder, mode="sync")
    put(folder / "a.jsonl", ("e0", "p", "v"))
    once(kb, folder, mode="sync", compact_files=32)
    for number in range(1, 4):
        put(folder / f"{number}.jsonl", (f"n{number}", "p", "v"))
        assert once(kb, folder, mode="sync", compact_files=32)["compactions"] == 0
    assert contents(kb) == {("e0", "p"): "v"} | {(f"n{number}", "p"): "v" for number in range(1, 4)}


def test_small_changes_do_not_rewrite_a_large_file(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", *((f"e{number}", "p", "v") for number in range(2_000)))
    once(kb, folder, small_texts=10_000)
    for number in range(3):
        put(folder / f"{number}.jsonl", (f"e{number}", "p", "second"))
        summary = once(kb, folder, compact_files=4)
    assert summary["compactions"] == 1
    assert rows_of_files(kb) == [3, 2_000]
    assert [contents(kb)[f"e{number}", "p"] for number in range(4)] == ["second"] * 3 + ["v"]


def test_superseded_rows_that_are_many_go(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    for value in ("first", "second", "third"):
        put(folder / "a.jsonl", *((f"e{number}", "p", value) for number in range(40)))
        summary = once(kb, folder, compact_files=32, compact_dead=0.6)
    assert summary["compactions"] == 1
    assert rows_of_files(kb) == [40]
    assert set(contents(kb).values()) == {"third"}
