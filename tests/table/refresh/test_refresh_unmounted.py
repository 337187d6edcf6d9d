"""Inputs where nothing is: that is said, and a sync deletes nothing on the word of a disk that is not mounted."""

from __future__ import annotations

import json
import os

import pytest
from refresh_samples import contents, once, put, watcher


@pytest.mark.parametrize("given", ["two", "two/*.jsonl", "two/b.jsonl", "t*/*.jsonl", "link", "link.jsonl", "three"])
def test_facts_of_a_place_that_is_not_there_stay(tmp_path, capfd, given):
    """All the ways in which an input can name what lies on another disk."""
    disk = tmp_path / "disk"
    put(tmp_path / "one" / "a.jsonl", ("a", "p", "1"))
    put(disk / "two" / "b.jsonl", ("b", "p", "1"))
    (tmp_path / "link").symlink_to(disk / "two")
    (tmp_path / "link.jsonl").symlink_to(disk / "two" / "b.jsonl")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "c.jsonl").symlink_to(disk / "two" / "b.jsonl")
    (tmp_path / "three" / "never.jsonl").symlink_to(tmp_path / "nothing")
    kb, inputs = (
        tmp_path / "kb",
        (tmp_path / "one", (tmp_path if given[0] == "l" or given == "three" else disk) / given),
    )
    assert once(kb, *inputs, mode="sync")["num_facts"] == 2
    assert once(kb, *inputs, mode="sync")["nothing_deleted_because"] is None
    os.rename(disk, tmp_path / "unmounted")
    put(tmp_path / "one" / "a.jsonl", ("a", "p", "2"))
    capfd.readouterr()
    summary = once(kb, *inputs, mode="sync")
    assert contents(kb) == {("a", "p"): "2", ("b", "p"): "1"}
    assert (summary["changed"], summary["deleted"]) == (1, 0)
    assert "not there" in summary["nothing_deleted_because"]
    assert capfd.readouterr().err.count("nothing is deleted: ") == 1
    status = json.loads((tmp_path / "kb.refresh" / "status.json").read_text())
    assert status["nothing_deleted_because"] == summary["nothing_deleted_because"]
    os.rename(tmp_path / "unmounted", disk)
    (disk / "two" / "b.jsonl").rename(disk / "two" / "b.gone")
    if "link" not in given and given != "three":
        assert once(kb, *inputs, mode="sync")["deleted"] == 1


def test_inputs_without_a_file_are_said_and_so_is_no_more_once_they_are_back(tmp_path, capfd):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    refresher = watcher(kb, folder, mode="sync")
    refresher._pass()
    path.unlink()
    for _ in range(3):
        refresher._pass()
    assert capfd.readouterr().err.count("nothing is deleted: no input has a file") == 1
    put(folder / "b.jsonl", ("b", "p", "1"))
    refresher._pass()
    assert refresher._report.summary()["nothing_deleted_because"] is None
    assert contents(kb) == {("b", "p"): "1"}


def test_an_input_without_a_file_is_said_in_every_mode(tmp_path, capfd):
    """It may come, so that it is no error; but a misspelt one never does."""
    folder, bare = tmp_path / "in", tmp_path / "bare"
    put(folder / "a.jsonl", ("a", "p", "1"))
    bare.mkdir()
    (bare / "notes.md").write_text("no facts")
    wrong, file, glob = tmp_path / "misspelt", folder / "misspelt.jsonl", folder / "*.csv"
    summary = once(tmp_path / "kb", folder, bare, wrong, file, glob)
    assert summary["inputs_without_files"] == sorted(map(str, (bare, wrong, file, glob)))
    said = capfd.readouterr().err
    assert f"not there: {wrong}" in said
    assert f"not there: {file}" in said
    for uri in (bare, glob):
        assert (
            f"no file whose name ends in .json, .jsonl, .ndjson, .csv, .tsv (each also with .gz) or .parquet: {uri}"
            in said
        )
    status = json.loads((tmp_path / "kb.refresh" / "status.json").read_text())
    assert status["inputs_without_files"] == summary["inputs_without_files"]


def test_an_input_without_a_file_is_said_again_only_when_it_was_there(tmp_path, capfd):
    folder = tmp_path / "in"
    refresher = watcher(tmp_path / "kb", folder)
    for _ in range(3):
        refresher._pass()
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    refresher._pass()
    assert refresher._report.summary()["inputs_without_files"] == []
    path.unlink()
    refresher._pass()
    assert capfd.readouterr().err.count("nothing to take up: ") == 2
