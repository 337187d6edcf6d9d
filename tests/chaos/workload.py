"""What every workload has: jobs that are run again, a writer and a reader beside them, and the model in the end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from deltalake import DeltaTable

from kblam_ray import KnowledgeBase
from kblam_ray.storage import delta_storage_options
from tests.chaos.actors import read_version
from tests.chaos.cluster import ROOT, Cluster
from tests.chaos.killers import LONGEST_OUTAGE_S
from tests.chaos.model import Model, Row
from tests.processes import kill_tree

ENCODER = "hashing:16"
JOB_S = 240
"""A job that takes longer hangs."""

MAX_TRIES = 6
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


class Workload(ABC):
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
        self.writers: list[Program] = []
        self.reads: list[dict[str, Any]] = []
        self._num_programs = 0
        self.reader: Program | None = None

    @abstractmethod
    def prepare(self) -> None:
        """What must be there before the first blow."""

    @abstractmethod
    def work(self) -> None:
        """Everything until all is acknowledged."""

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
        self.writers.append(self.start_program("-m", "tests.chaos.actors", *arguments, on_cluster=False))

    def _note_writes(self) -> None:
        for writer in self.writers:
            for line in writer.lines():
                if "issued" in line:
                    self.model.issue(line["group"], line["issued"], absent=line["absent"])
                elif "acknowledged" in line:
                    self.model.acknowledge(line["group"], line["acknowledged"], line["version"])
                elif "failed" in line:
                    self.refuse_lost_race(line["error"])

    def refuse_lost_race(self, error: str) -> None:
        """Writers never conflict: a commit may fail only where the store was taken away."""
        if "the commit failed" in error and not self.targets & LONGEST_OUTAGE_S.keys():
            self.problems.append(f"a commit failed though the store was there: {error}")

    def kill_driver(self) -> str:
        with self._lock:
            running = [driver for driver in self.drivers if driver.process.poll() is None]
            if not running:
                return ""
            driver = running[self.random.randrange(len(running))]
            self.restarts += 1
            return f"driver {driver.process.pid}" if driver.kill() else ""

    def await_file_to_commit(self, timeout_s: float) -> None:
        """Wait for a new file in the table: who wrote it and is killed then has not committed it."""

        def files() -> set[str]:
            found = self.s3.list_objects_v2(Bucket=self.bucket, Prefix="kb/part-")
            return {entry["Key"] for entry in found.get("Contents", [])}

        deadline = time.monotonic() + timeout_s
        with suppress(BotoCoreError, ClientError):  # the endpoint is away
            before = files()
            while time.monotonic() < deadline and files() <= before:
                time.sleep(0.02)

    def kill_writer(self) -> str:
        with self._lock:
            if self.over.is_set() or not self.writers or not self.writers[-1].kill():
                return ""
            self.start_writer()
            return "writer"

    def kill_part(self, target: str, number: int) -> str:
        """SIGKILL a part of a server; says which, and nothing where there is no server."""
        return ""

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
                self.refuse_lost_race(driver.error())
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
        for writer in self.writers:
            if not writer.stop(60):
                self.problems.append("the writer hangs")
            elif writer.process.returncode > 0:
                self.problems.append(f"the writer failed: {writer.error()}")
        self._note_writes()
        newest, rows = self.table()
        self.problems += self.model.check_end(rows)
        if sorted(rows) != sorted(rows_by_the_rule(self.kb)):
            self.problems.append("the live facts are others than those that the rule makes of the table's rows")
        self.problems += read_version(KnowledgeBase.open(self.kb, newest), is_last=True)["problems"]
        self.problems += self._written_twice()
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

    def _written_twice(self) -> list[str]:
        """Writes that the log holds in more than one version."""
        found: dict[str, list[str]] = {}
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix="kb/_delta_log/"):
            for name in (entry["Key"] for entry in page.get("Contents", []) if entry["Key"].endswith(".json")):
                text = self.s3.get_object(Bucket=self.bucket, Key=name)["Body"].read().decode()
                for action in map(json.loads, text.splitlines()):
                    if "txn" in action:
                        found.setdefault(action["txn"]["appId"], []).append(name)
        return [f"write {write} was committed in {names}" for write, names in found.items() if len(names) > 1]

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
        for program in [*self.drivers, *self.writers, *([self.reader] if self.reader else [])]:
            if program.process.poll() is None:
                kill_tree(program.process)


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
