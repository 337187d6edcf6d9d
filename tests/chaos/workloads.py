"""What is running when things are killed: embed, refresh and train, each on a table of its own."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from kblam_ray import KnowledgeBase
from kblam_ray.errors import StorageError, TableNotFoundError
from tests.chaos.model import SWAPPED, generations_in, rows_of
from tests.chaos.workload import ENCODER, JOB_S, Program, Workload
from tests.model_samples import save_base

MAX_ROUNDS = 4
"""Of jobs that embed while blows are still to come."""


class Embed(Workload):
    """One or two `jobs/embed_kb.py` on one table, each run again until it is acknowledged."""

    name = "embed"
    worker_title = "Map"

    def prepare(self) -> None:
        if self.random.random() < 0.5:  # else the jobs and the writer are to make the table, all at once
            self.model.issue("before/8", 1)
            version = KnowledgeBase.create(self.kb, self.encoder).upsert(rows_of("before/8", 1))
            self.model.acknowledge("before/8", 1, version)

    def work(self) -> None:
        if self.has_writer:
            self.start_writer()
        self.start_reader()
        self.watch_for("kb/_spool/")
        num_jobs = self.random.choice([1, 1, 1, 2])
        for turn in range(MAX_ROUNDS):
            jobs = [self._job(turn * num_jobs + number) for number in range(num_jobs)]
            for thread in jobs:
                thread.start()
            for thread in jobs:
                thread.join()
            if not self.blows_are_due():
                break

    def _job(self, number: int) -> threading.Thread:
        groups = [f"embed-{number}-{part}/{self.random.choice([40, 400, 900])}" for part in range(2)]
        for part, group in enumerate(groups):
            self.put(f"in-{number}/{part}.jsonl", rows_of(group, 1))
            self.model.issue(group, 1)
        flags = ["--kb", self.kb, "--input", f"s3://{self.bucket}/in-{number}/", "--encoder", ENCODER]
        flags += ["--num-workers", "2", "--min-workers", "2"]

        def acknowledged(summary: dict[str, Any]) -> None:
            for group in groups:
                self.model.acknowledge(group, 1, summary["version"])

        return threading.Thread(
            target=self.until_done, args=(lambda: self.job("embed_kb", *flags), acknowledged), daemon=True
        )


class Refresh(Workload):
    """`jobs/refresh_kb.py` that watches an S3 prefix whose objects change, and is started again when it is killed.

    Where nobody else writes, objects may also go, and the table is to follow in that, too.
    """

    name = "refresh"
    span_s = 10.0
    worker_title = "Map"
    num_files = 5
    num_edits = 8
    max_edits = 60

    def prepare(self) -> None:
        self.mode = "sync" if not self.has_writer and self.random.random() < 0.7 else "upsert"
        # Where facts that are in no file go, those of one generation can go in the commit in which the next one's come.
        kind = SWAPPED if self.mode == "sync" else "file-"
        self.group_of = {f"in/{n}.jsonl": f"{kind}{n}/{self.random.choice([4, 12, 30])}" for n in range(self.num_files)}
        self.group_of["in/large.jsonl"] = "large/400"
        self.wanted: dict[str, int | None] = {}
        for key in list(self.group_of)[:3]:
            self._edit(key)

    def _edit(self, key: str, *, absent: bool = False) -> None:
        group = self.group_of[key]
        generation = self.model.newest(group) + 1
        self.model.issue(group, generation, absent=absent)
        self.put(key, [] if absent else rows_of(group, generation))
        # A file that is there counts as acknowledged: the refresh must take up the newest that there is of each.
        self.wanted[group] = None if absent else generation

    def _start(self) -> Program:
        flags = ["--kb", self.kb, "--input", f"s3://{self.bucket}/in/", "--encoder", ENCODER, "--settle-s", "0"]
        flags += ["--poll-s", "1", "--vacuum-every-h", "0.001", "--compact-files", str(self.random.choice([3, 8]))]
        flags += ["--mode", self.mode]
        # More texts than this go to the cluster's workers.
        return self.job("refresh_kb", *flags, "--small-texts", "300", "--num-workers", "2")

    def work(self) -> None:
        with self._lock:
            self.drivers = [self._start() for _ in range(self.random.choice([1, 1, 1, 2]))]
        self.start_reader()
        if self.has_writer:
            self.start_writer()
        self.watch_for("kb/_delta_log/", 1)
        needs_workers = bool(self.targets & {"worker", "node"}) or self.random.random() < 0.15
        small, number = list(self.group_of)[:-1], 0
        while number < self.num_edits or (self.blows_are_due() and number < self.max_edits):
            if needs_workers and number % 6 == 2:
                self._edit("in/large.jsonl")
            else:
                key = self.random.choice(small)
                may_go = self.mode == "sync" and len([value for value in self.wanted.values() if value]) > 2
                self._edit(key, absent=may_go and self.random.random() < 0.3)
            number += 1
            time.sleep(self.random.uniform(0.1, 1.0))
            self._restart()
        self._until_in_step()
        if self.seed % 2:
            self._kill_before_the_last_commit(self.random.choice(small))
            self._until_in_step()

    def _until_in_step(self) -> None:
        deadline = time.monotonic() + JOB_S
        while not self._is_in_step():
            self._restart()
            if time.monotonic() > deadline:
                self.problems.append(f"never in step with its files: {self.drivers[-1].error()}")
                break
            time.sleep(1)

    def _kill_before_the_last_commit(self, key: str) -> None:
        """Nothing comes after it that would make up for what is lost then."""
        for writer in self.writers:
            writer.stop(60)
        self._edit(key)
        self.await_file_to_commit(30)
        with self._lock:
            self.restarts += sum([driver.kill() for driver in self.drivers])

    def _restart(self) -> None:
        with self._lock:
            for number, driver in enumerate(self.drivers):
                if driver.process.poll() is not None:
                    if driver.process.returncode >= 0:
                        self.problems.append(f"the refresh ended with {driver.process.returncode}: {driver.error()}")
                    self.drivers[number] = self._start()

    def _is_in_step(self) -> bool:
        try:
            _, rows = self.table()
        except (StorageError, TableNotFoundError):
            return False
        shown, _ = generations_in(rows)
        return all(shown.get(group) == generation for group, generation in self.wanted.items())

    def finish(self) -> dict[str, Any]:
        with self._lock:
            self._restart()
        for driver in self.drivers:
            self.refuse_lost_race(driver.error())
            if not driver.stop(90):
                self.problems.append(f"the refresh does not end: {driver.error()}")
            else:
                lines = driver.lines()
                # One that was only just started again may not have come to where it listens to signals.
                is_new = not lines and driver.process.returncode in (-15, 143)
                if not is_new and (driver.process.returncode or not lines or not lines[-1].get("ok")):
                    self.problems.append(f"the refresh ended with {driver.process.returncode}: {driver.error()}")
        for group in self.wanted:
            self.model.acknowledge(group, self.model.newest(group))
        return super().finish()


class Train(Workload):
    """`jobs/train_adapter.py` with a worker on the cluster, resumed until it is done: the curve of an undisturbed run.

    The table that it trains on is written to meanwhile; it stays at the version with which it began.
    """

    name = "train"
    span_s = 15.0
    worker_title = "TrainWorker"
    steps = 150
    encoder = "hashing:64"
    _reference: dict[int, float] | None = None

    def prepare(self) -> None:
        self.model.issue("facts/120", 1)
        kb = KnowledgeBase.create(self.kb, self.encoder)
        self.model.acknowledge("facts/120", 1, kb.upsert(rows_of("facts/120", 1)))
        if Train._reference is None:
            Train._reference = self._undisturbed()

    def _flags(self, output: Path, num_workers: int) -> list[str]:
        flags = ["--kb", f"{self.kb}", "--base-model", self._base_model(), "--output", str(output), "--start", "random"]
        flags += ["--kb-layers", "1", "--kb-layers", "3", "--num-workers", str(num_workers), "--device", "cpu"]
        flags += ["--dtype", "float32", "--steps", str(self.steps), "--warmup-steps", "2", "--learning-rate", "0.01"]
        flags += ["--checkpoint-every", "5", "--log-every", "1", "--no-calibrate", "--no-evaluate", "--no-tensorboard"]
        flags += ["--mix-batch-size", "4", "--mix-kb-size", "4", "12", "--mix-max-tokens", "512", "--resume"]
        return [*flags, "--cpus-per-worker", "1"] if num_workers else flags

    def _base_model(self) -> str:
        folder = self.cluster.home / "base-model"
        if not folder.exists():
            save_base(folder)
        return str(folder)

    def _undisturbed(self) -> dict[int, float]:
        output = self.folder / "whole"
        program = self.job("train_adapter", *self._flags(output, 0))
        self.drivers.append(program)
        assert program.process.wait(JOB_S) == 0, program.error()
        return losses(output)

    def work(self) -> None:
        output = self.folder / "out"
        self.start_reader()

        def look() -> None:
            while not self.over.wait(0.1):
                names = [folder.name.removeprefix("step-") for folder in output.glob("checkpoints/step-*")]
                steps = [int(name) for name in names if name.isdecimal()]
                # From its first checkpoint on a run knows at which version it began; before, each try has its own.
                if steps and not self.writers:
                    self.start_writer()
                # That one is made before there are workers; to go on from it is to begin anew.
                if any(steps):
                    self.progress.set()
                    return

        threading.Thread(target=look, daemon=True).start()
        self.until_done(lambda: self.job("train_adapter", *self._flags(output, 1)), lambda summary: None)
        if self.problems:
            return
        assert Train._reference is not None
        found = losses(output)
        if found.keys() != Train._reference.keys():
            self.problems.append(f"steps {sorted(found)} instead of {sorted(Train._reference)}")
        elif off := [s for s, loss in found.items() if abs(loss - Train._reference[s]) > 1e-4]:
            self.problems.append(f"the loss is another one from step {min(off)} on")
        if not (output / "adapter_model.safetensors").exists():
            self.problems.append("no adapter")


def losses(output: Path) -> dict[int, float]:
    """The loss of each logged step; of a step that was done again, the last."""
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {event["step"]: event["loss"] for event in events if event["kind"] == "step"}
