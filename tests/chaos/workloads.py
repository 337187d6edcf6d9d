"""What is running when things are killed: embed, refresh and train, each beside a writer and a reader of its table."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from deltalake import DeltaTable

from kblam_ray import KnowledgeBase
from kblam_ray.errors import StorageError, TableNotFoundError
from kblam_ray.storage import delta_storage_options
from tests.chaos.actors import read_version
from tests.chaos.cluster import ROOT, Cluster, kill_tree
from tests.chaos.model import Model, Row, generations_in, rows_of

ENCODER = "hashing:16"
JOB_S = 240
"""A job that takes longer hangs."""

MAX_TRIES = 6
MAX_ROUNDS = 4
EXCUSES = {"storage_failed", "ray_unavailable", "training_failed"}
"""What a job may say when what it needs was taken from it; anything else is a fault of its own."""

WRITER = "writer/5"


class Program:
    """A process whose lines of output are kept as they come."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._out = log.with_suffix(".out")
        self._err = log.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, cwd=ROOT, stdout=out, stderr=err, start_new_session=True
            )

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of JSON that it printed; one that its end cut off is none."""
        found = []
        for line in self._out.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def error(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")[-1_500:]

    def kill(self) -> bool:
        """SIGKILL it, and only it; False: it had ended."""
        if self.process.poll() is not None:
            return False
        self.process.kill()
        self.process.wait()
        return True

    def stop(self, timeout_s: float) -> bool:
        """Ask it to end; False: it had to be killed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill_tree(self.process)
            return False
        return True


class Workload:
    """One seeded run on a table of its own; subclasses say what works on it.

    Attributes:
        model: what is known of the table.
        problems: what went wrong beside what the model finds.
        reads: versions as this process read them, in the words of `actors.read_version`.
        targets: what is going to be hit.
        blows_are_due: whether some of it is still to come: until then there must be work that can be hit.
        has_writer: whether the program that writes beside it runs.
        notes: how jobs ended that were run again.
        progress, over: set at the first sign of work, and at its end.
    """

    name = ""
    span_s = 8.0
    worker_title = ""
    encoder = ENCODER
    has_writer = True
    targets: frozenset[str] = frozenset()

    def __init__(self, cluster: Cluster, seed: int, folder: Path) -> None:
        self.cluster, self.seed, self.folder = cluster, seed, folder
        self.random = random.Random(f"{self.name} {seed}")
        self.model, self.problems, self.notes = Model(), list[str](), list[str]()
        self.progress, self.over = threading.Event(), threading.Event()
        self.restarts = 0
        self.blows_are_due: Callable[[], bool] = lambda: False
        self.drivers: list[Program] = []
        self._lock = threading.RLock()
        self.s3 = cluster.endpoint.client()
        self.bucket = f"chaos-{self.name}-{seed}-{time.monotonic_ns()}"
        self.s3.create_bucket(Bucket=self.bucket)
        self.kb = f"s3://{self.bucket}/kb"
        self._writers: list[Program] = []
        self.reads: list[dict[str, Any]] = []
        self._num_programs = 0
        self.reader: Program | None = None

    def prepare(self) -> None:
        """What must be there before the first blow."""

    def work(self) -> None:
        """Everything until all is acknowledged."""
        raise NotImplementedError

    def start_program(self, *arguments: str, on_cluster: bool = True) -> Program:
        with self._lock:
            self._num_programs += 1
            environment = self.cluster.driver_environment if on_cluster else self.cluster.environment
            return Program(list(arguments), environment, self.folder / f"{self._num_programs}")

    def job(self, name: str, *flags: str) -> Program:
        return self.start_program(str(ROOT / "jobs" / f"{name}.py"), *flags)

    def start_reader(self) -> None:
        self.reader = self.start_program("-m", "tests.chaos.actors", "read", self.kb, str(self.seed), on_cluster=False)

    def start_writer(self) -> None:
        """A writer goes on after what the one before began."""
        self._note_writes()
        first = self.model.newest(WRITER) + 1
        arguments = ["write", self.kb, WRITER, str(first), self.encoder, str(self.random.randrange(10**6))]
        self._writers.append(self.start_program("-m", "tests.chaos.actors", *arguments, on_cluster=False))

    def _note_writes(self) -> None:
        for writer in self._writers:
            for line in writer.lines():
                if "issued" in line:
                    self.model.issue(line["group"], line["issued"], absent=line["absent"])
                elif "acknowledged" in line:
                    self.model.acknowledge(line["group"], line["acknowledged"], line["version"])

    def kill_driver(self) -> str:
        with self._lock:
            running = [driver for driver in self.drivers if driver.process.poll() is None]
            if not running:
                return ""
            driver = running[self.random.randrange(len(running))]
            self.restarts += 1
            return f"driver {driver.process.pid}" if driver.kill() else ""

    def kill_writer(self) -> str:
        with self._lock:
            if self.over.is_set() or not self._writers or not self._writers[-1].kill():
                return ""
            self.start_writer()
            return "writer"

    def kill_part(self, target: str, number: int) -> str:
        raise NotImplementedError

    def until_done(self, start: Any, acknowledged: Any) -> None:
        """Run a job again and again until it says that it is done; `acknowledged` is given its summary."""
        for _ in range(MAX_TRIES):
            with self._lock:
                driver = start()
                self.drivers.append(driver)
            try:
                driver.process.wait(JOB_S)
            except subprocess.TimeoutExpired:
                self.problems.append(f"a job hangs: {' '.join(driver.process.args[1:4])}: {driver.error()}")
                kill_tree(driver.process)
                continue
            lines = driver.lines()
            if driver.process.returncode == 0 and lines and lines[-1].get("ok"):
                acknowledged(lines[-1])
                return
            # Killed, or it says that what it needs failed: nothing was acknowledged.
            if driver.process.returncode > 0:
                code = lines[-1]["error"]["code"] if lines and lines[-1].get("error") else "no summary"
                self.notes.append(f"a job ended with {driver.process.returncode}, {code}: {driver.error()[-300:]}")
                if code not in EXCUSES:
                    self.problems.append(f"a job ended with {driver.process.returncode}, {code}: {driver.error()}")
                self.restarts += 1
        self.problems.append(f"a job did not succeed in {MAX_TRIES} tries: {self.drivers[-1].error()}")

    def watch_for(self, prefix: str, more_than: int = 0) -> None:
        """Set `progress` when there are more objects below a prefix than there were."""

        def look() -> None:
            while not self.over.wait(0.5):
                with suppress(BotoCoreError, ClientError):  # the endpoint is away
                    found = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=more_than + 1)
                    if found.get("KeyCount", 0) > more_than:
                        self.progress.set()
                        return

        threading.Thread(target=look, daemon=True).start()

    def put(self, key: str, rows: list[Row]) -> None:
        """An object of facts: it is there, whole. No facts: there is no such object any more."""
        body = "".join(json.dumps({"entity": e, "property": p, "value": v}) + "\n" for e, p, v in rows)
        deadline = time.monotonic() + JOB_S
        while True:
            try:
                if rows:
                    self.s3.put_object(Bucket=self.bucket, Key=key, Body=body.encode())
                else:
                    self.s3.delete_object(Bucket=self.bucket, Key=key)
            except (BotoCoreError, ClientError):  # the endpoint is away or stands still
                assert time.monotonic() < deadline, "the S3 endpoint does not come back"
                time.sleep(0.1)
            else:
                return

    def table(self, version: int | None = None) -> tuple[int, list[Row]]:
        """The version and the facts of the table."""
        kb = KnowledgeBase.open(self.kb, version)
        assert kb.version is not None
        return kb.version, [(f["entity"], f["property"], f["value"]) for f in kb.snapshot().facts.to_pylist()]

    def finish(self) -> dict[str, Any]:
        """End what runs beside, and compare the table and all that was read of it with the model."""
        for writer in self._writers:
            if not writer.stop(60):
                self.problems.append("the writer hangs")
            elif writer.process.returncode > 0:
                self.problems.append(f"the writer failed: {writer.error()}")
        self._note_writes()
        newest, rows = self.table()
        self.problems += self.model.check_end(rows)
        if sorted(rows) != sorted(rows_by_the_rule(self.kb)):
            self.problems.append("the live facts are others than those that the rule makes of the table's rows")
        reads: list[dict[str, Any]] = []
        if self.reader:
            self._await_reader(newest)
            if not self.reader.stop(60):
                self.problems.append("the reader hangs")
            elif self.reader.process.returncode:
                self.problems.append(f"the reader failed: {self.reader.error()}")
            reads = self.reader.lines()
        found = {read["version"] for read in reads if "version" in read}
        # Those that it passed over can still be read, and must be as whole.
        late = [
            read_version(KnowledgeBase.open(self.kb, version)) for version in sorted(set(range(newest + 1)) - found)
        ]
        self.problems += self.model.check_reads([*reads, *self.reads, *late])
        return {
            "version": newest,
            "num_facts": len(rows),
            "acknowledged": self.model.num_acknowledged,
            "in_doubt": self.model.num_in_doubt,
            "reads": sum("version" in read for read in reads) + len(self.reads),
            "versions_read": len(found),
            "versions_read_late": len(late),
            "restarts": self.restarts,
        }

    def _await_reader(self, version: int) -> None:
        """Let the reader come to the newest version: the last one, too, is read as others read it."""
        assert self.reader is not None
        deadline = time.monotonic() + JOB_S
        while version not in [read.get("version") for read in self.reader.lines()]:
            if time.monotonic() > deadline or self.reader.process.poll() is not None:
                self.problems.append(f"the reader did not come to version {version}: {self.reader.error()}")
                return
            time.sleep(0.2)

    def close(self) -> None:
        """Nothing of it goes on."""
        self.over.set()
        for program in [*self.drivers, *self._writers, *([self.reader] if self.reader else [])]:
            if program.process.poll() is None:
                kill_tree(program.process)


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
        self.group_of = {f"in/{n}.jsonl": f"file-{n}/{self.random.choice([4, 12, 30])}" for n in range(self.num_files)}
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
        flags += ["--poll-s", "1", "--vacuum-every-h", "0", "--compact-files", str(self.random.choice([3, 8]))]
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
        deadline = time.monotonic() + JOB_S
        while not self._is_in_step():
            self._restart()
            if time.monotonic() > deadline:
                self.problems.append(f"never in step with its files: {self.drivers[-1].error()}")
                break
            time.sleep(1)

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
        flags = ["--kb", f"{self.kb}", "--base-model", str(_base_model()), "--output", str(output), "--start", "random"]
        flags += ["--kb-layers", "1", "--kb-layers", "3", "--num-workers", str(num_workers), "--device", "cpu"]
        flags += ["--dtype", "float32", "--steps", str(self.steps), "--warmup-steps", "2", "--learning-rate", "0.01"]
        flags += ["--checkpoint-every", "5", "--log-every", "1", "--no-calibrate", "--no-evaluate", "--no-tensorboard"]
        flags += ["--mix-batch-size", "4", "--mix-kb-size", "4", "12", "--mix-max-tokens", "512", "--resume"]
        return [*flags, "--cpus-per-worker", "1"] if num_workers else flags

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
                # From its first checkpoint on a run knows at which version it began; before, each try has its own.
                if list(output.glob("checkpoints/step-*")):
                    self.start_writer()
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


def rows_by_the_rule(uri: str) -> list[Row]:
    """The live facts of a table by the rule that it is published with, from all of its rows as deltalake gives them."""
    table = DeltaTable(uri, storage_options=delta_storage_options(uri)).to_pyarrow_table()
    winners: dict[int, dict[str, Any]] = {}
    for row in table.select(["fact_id", "op", "updated_at", "write_id", "entity", "property", "value"]).to_pylist():
        other = winners.get(row["fact_id"])
        if other is None or (other["updated_at"], other["write_id"]) < (row["updated_at"], row["write_id"]):
            winners[row["fact_id"]] = row
    live = [row for row in winners.values() if row["op"] == "upsert"]
    return [(row["entity"], row["property"], row["value"]) for row in live]


def losses(output: Path) -> dict[int, float]:
    """The loss of each logged step; of a step that was done again, the last."""
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {event["step"]: event["loss"] for event in events if event["kind"] == "step"}


_BASE: list[Path] = []


def _base_model() -> Path:
    if not _BASE:
        from tests.model_samples import save_base

        _BASE.append(Path(tempfile.mkdtemp(prefix="chaos-base-")))
        save_base(_BASE[0])
    return _BASE[0]
