"""Refreshes in processes of their own, at once, killed, beside other writers and compactions: the table is exact."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from refresh_samples import ROOT, Job, contents, holds, lines, once, put, wait_until

from kblam_ray import KnowledgeBase
from kblam_ray.table.live import find_winners


class Edits:
    """Files whose facts change, some facts stated by two files; what the table must hold in the end."""

    def __init__(self, folder: Path, seed: int, mode: str = "upsert") -> None:
        self.folder, self.random, self.number, self.mode = folder, random.Random(seed), 0, mode
        self.ever: dict[tuple[str, str], str] = {}
        self.files: dict[int, dict[tuple[str, str], str]] = {}

    @property
    def expected(self) -> dict[tuple[str, str], str]:
        if self.mode == "upsert":
            return self.ever
        return {name: value for rows in self.files.values() for name, value in rows.items()}

    def make(self) -> None:
        self.number += 1
        name = self.random.randrange(6)
        if self.mode == "sync" and name in self.files and len(self.files) > 2 and self.random.random() < 0.4:
            del self.files[name]
            (self.folder / f"{name}.jsonl").unlink()
            return
        rows = [(f"own {name}", f"p{i}", f"{self.number}") for i in range(3)]
        rows += [(f"shared {name // 2}", "p", f"{self.number}")]
        # Files of one fact are told apart by their times, which a coarse clock may make equal. A watcher must not see
        # the file before it has its time: it would be the newest of all.
        timed = put(self.folder.parent / "timed" / f"{name}.jsonl", *rows)
        os.utime(timed, ns=(self.number * 10**9 + 10**18,) * 2)
        self.folder.mkdir(exist_ok=True)
        timed.replace(self.folder / timed.name)
        self.files.pop(name, None)  # the one modified last comes last
        self.files[name] = {(entity, name): value for entity, name, value in rows}
        self.ever.update(self.files[name])


def others_write(uri: str, writer: str, stop: threading.Event, written: dict) -> None:
    number = 0
    while not stop.wait(0.3):
        number += 1
        KnowledgeBase.open(uri).upsert([(writer, f"p{number % 5}", str(number))])
        written[writer, f"p{number % 5}"] = str(number)


def compact_now_and_then(uri: str, stop: threading.Event) -> None:
    while not stop.wait(0.5):
        KnowledgeBase.open(uri).compact()


def run_all_at_once(tmp_path: Path, seed: int, num_edits: int, num_kills: int, mode: str = "upsert") -> None:
    kb, edits = str(tmp_path / "kb"), Edits(tmp_path / "in", seed, mode)
    edits.make()
    once(kb, edits.folder, mode=mode)
    stop, by_hand = threading.Event(), {}
    beside = [threading.Thread(target=compact_now_and_then, args=(kb, stop))]
    if mode == "upsert":
        beside.append(threading.Thread(target=others_write, args=(kb, "by hand", stop, by_hand)))
    jobs = [Job(kb, edits.folder, compact_files=3, mode=mode) for _ in range(2)]
    for thread in beside:
        thread.start()
    try:
        kills = sorted(edits.random.sample(range(num_edits), num_kills))
        for number in range(num_edits):
            edits.make()
            stop.wait(edits.random.random() * 0.5)
            if number in kills:
                which = edits.random.randrange(2)
                jobs[which].kill()
                jobs[which] = Job(kb, edits.folder, compact_files=3, mode=mode)
        stop.set()
        for thread in beside:
            thread.join()
        wait_until(lambda: holds(kb, {**edits.expected, **by_hand}))
    finally:
        stop.set()
        summaries = [job.stop(may_be_new=True) for job in jobs]
    assert [summary["ok"] for summary in summaries] == [True, True], summaries
    once(kb, edits.folder, mode=mode)
    assert contents(kb) == {**edits.expected, **by_hand}
    KnowledgeBase.open(kb).compact()
    if mode == "upsert":  # rows of deletes stay for a while
        assert find_winners(kb).rows_of_file.tolist() == [len(contents(kb))]
    assert once(kb, edits.folder, mode=mode)["files_read"] == 0


def test_two_refreshes_a_writer_and_a_compaction_at_once(tmp_path):
    run_all_at_once(tmp_path, seed=0, num_edits=12, num_kills=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["upsert", "sync"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_two_refreshes_killed_at_random_moments(tmp_path, seed, mode):
    run_all_at_once(tmp_path, seed=seed, num_edits=60, num_kills=8, mode=mode)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_two_embed_jobs_a_refresh_and_a_compaction_at_once(tmp_path):
    kb, edits = str(tmp_path / "kb"), Edits(tmp_path / "in", 7)
    edits.make()
    once(kb, edits.folder)
    expected = {}
    embeds = []
    for number in range(2):
        rows = [(f"embed {number}", f"p{i}", f"v{i}") for i in range(3_000)]
        expected.update({(entity, name): value for entity, name, value in rows})
        source = tmp_path / f"embed{number}.jsonl"
        source.write_text(lines(rows))
        command = [sys.executable, str(ROOT / "jobs" / "embed_kb.py"), "--kb", kb, "--input", str(source)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        embeds.append(subprocess.Popen([*command, "--num-workers", "1"], stdout=subprocess.DEVNULL, env=environment))
    stop = threading.Event()
    compaction = threading.Thread(target=compact_now_and_then, args=(kb, stop))
    compaction.start()
    job = Job(kb, edits.folder, compact_files=4)
    try:
        while any(embed.poll() is None for embed in embeds):
            edits.make()
            stop.wait(0.4)
        assert [embed.wait() for embed in embeds] == [0, 0]
        wait_until(lambda: holds(kb, {**edits.expected, **expected}))
    finally:
        stop.set()
        compaction.join()
        summary = job.stop()
    assert summary["ok"], summary
    assert contents(kb) == {**edits.expected, **expected}


def test_killed_right_after_its_commit_nothing_is_done_twice(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    path = put(folder / "a.jsonl", ("a", "p", "1"))
    job = Job(kb, folder)
    wait_until(lambda: holds(kb, {("a", "p"): "1"}))
    job.kill()
    assert not (tmp_path / "kb.refresh" / "ledger.json").exists()
    assert once(kb, folder)["files_read"] == 0

    job = Job(kb, folder, metrics_port=0)
    put(path, ("a", "p", "2"))
    (folder / "bad.jsonl").write_text('{"entity": "b", "prop')
    wait_until(lambda: holds(kb, {("a", "p"): "2"}))
    put(folder / "bad.jsonl", ("b", "p", "1"))
    wait_until(lambda: holds(kb, {("a", "p"): "2", ("b", "p"): "1"}))
    summary = job.stop()
    assert (summary["ok"], summary["exit_code"], summary["files_failed"], summary["num_facts"]) == (True, 0, 0, 2)
    assert summary["version"] == summary["previous_version"] + summary["refreshes"]
    assert (tmp_path / "kb.refresh" / "ledger.json").exists()
