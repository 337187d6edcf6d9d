"""`jobs/serve.py` on the cluster under writes and questions while its replicas, its parts and its job are killed.

The server outlives a run, for it takes a minute to start; every run has tables of its own on it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from kblam_ray import KnowledgeBase
from tests.chaos.cluster import ROOT, Cluster
from tests.chaos.model import PROPERTY, generations_in, rows_of
from tests.chaos.workload import JOB_S, Program, Workload
from tests.processes import free_port

NUM_REPLICAS = 2
PARTS = ["Registry", "Writer", "Gateway"]
SERVED = "served/4"
QUESTION = "What is the capital of Kenya?"
FACTS = [("Kenya", "capital", "Nairobi"), ("France", "capital", "Paris"), ("Peru", "capital", "Lima")]

BUSY = {429, 500, 502, 503, 504}
"""What a server may answer that has lost something; anything else but 200 is wrong."""


class Serve(Workload):
    """Groups of facts written over HTTP, acknowledged with a version, read back; a question asked all the time."""

    name = "serve"
    span_s = 12.0
    encoder = "all-MiniLM-L6-v2"
    num_writes = 14
    max_writes = 60
    _program: Program | None = None
    _port = 0
    _state = ""

    def __init__(self, cluster: Cluster, seed: int, folder: Path) -> None:
        super().__init__(cluster, seed, folder)
        self.http = httpx.Client(timeout=60)
        self.answers: list[str] = []
        self.cited: dict[int, set[tuple[str, str]]] = {}
        self._served_everywhere = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{Serve._port}"

    def prepare(self) -> None:
        fixed = f"s3://{self.bucket}/capitals"
        KnowledgeBase.create(fixed, self.encoder).upsert(FACTS)
        self.model.issue(SERVED, 1)
        version = KnowledgeBase.create(self.kb, self.encoder).upsert(rows_of(SERVED, 1))
        self.model.acknowledge(SERVED, 1, version)
        if Serve._program is None or Serve._program.process.poll() is not None:
            self._start_server()
        # All of it: a replica that dies before the others were ever up ends the deployment, as it should.
        self._await(self._is_up, "a server")
        for name, uri in {"asked": fixed, "written": self.kb}.items():
            place = f"{self.address}/v1/knowledge_bases/{name}-{self.seed}?wait=true"
            self._await(
                lambda place=place, uri=uri: self.http.put(place, json={"uri": uri, "version": None}).is_success,
                "a knowledge base",
            )

    def _is_up(self) -> bool:
        health = self.http.get(f"{self.address}/health")
        return health.status_code == 200 and health.json()["replicas"] == NUM_REPLICAS

    def _start_server(self) -> None:
        if not Serve._port:
            Serve._port = free_port()
            self.s3.create_bucket(Bucket="served-state")
        flags = ["--port", str(Serve._port), "--state-uri", "s3://served-state/state.json", "--grounding", "verbatim"]
        flags += ["--replicas-min-replicas", str(NUM_REPLICAS), "--replicas-max-replicas", str(NUM_REPLICAS)]
        flags += ["--replicas-num-cpus", "0.5"]
        number = len(list(self.cluster.home.glob("server-*.err")))
        log = self.cluster.home / f"server-{number}"
        Serve._program = Program([str(ROOT / "jobs" / "serve.py"), *flags], self.cluster.driver_environment, log)

    def _await(self, look: Any, what: str) -> None:
        deadline = time.monotonic() + JOB_S
        while True:
            try:
                if look():
                    return
            except (httpx.TransportError, ValueError):  # Serve answers before the application does
                pass
            if time.monotonic() > deadline:
                said = Serve._program.error() if Serve._program else ""
                raise AssertionError(f"not in {JOB_S} s: {what}: {said}")
            if Serve._program is None or Serve._program.process.poll() is not None:
                ended = f"the server's job ended: {Serve._program.error()[-400:] if Serve._program else ''}"
                (self.notes if "driver" in self.targets else self.problems).append(ended)
                self._start_server()
            time.sleep(0.2)

    def work(self) -> None:
        self.start_reader()
        beside = [
            threading.Thread(target=self._all_the_time, args=(do,), daemon=True)
            for do in (self._asked_well, self._seen, self._cites)
        ]
        for thread in beside:
            thread.start()
        self.progress.set()
        groups = [SERVED, "served/1", "served/60"]
        number = 0
        while number < self.num_writes or (self.blows_are_due() and number < self.max_writes):
            number += 1
            group = self.random.choice(groups)
            generation = self.model.newest(group) + 1
            absent = generation % 5 == 0
            self.model.issue(group, generation, absent=absent)
            self._await(lambda one=(group, generation, absent): self._write(*one), "a write")
            self._await(lambda one=(group, generation, absent): self._is_read_back(*one), "a fact that was written")
            time.sleep(self.random.uniform(0, 0.8))
        self._await(self._asked_well, "an answer at the end")
        self.over.set()
        for thread in beside:
            thread.join(90)

    @property
    def _facts(self) -> str:
        return f"{self.address}/v1/knowledge_bases/written-{self.seed}/facts"

    def _write(self, group: str, generation: int, absent: bool) -> bool:
        rows = [{"entity": e, "property": p, "value": v} for e, p, v in rows_of(group, generation)]
        if absent:
            names = [{"entity": row["entity"], "property": row["property"]} for row in rows]
            answer = self.http.post(f"{self._facts}/delete?wait=true", json={"facts": names})
        else:
            answer = self.http.post(f"{self._facts}?wait=true", json={"facts": rows})
        if answer.status_code == 200:
            self._served_everywhere = answer.json()["kb_version"]
            self.model.acknowledge(group, generation, self._served_everywhere)
            return True
        if answer.status_code not in BUSY | {404}:  # 404: the application is being put up again
            self.problems.append(f"a write was answered {answer.status_code}: {answer.text[:200]}")
        return False

    def _is_read_back(self, group: str, generation: int, absent: bool) -> bool:
        entity, _, value = rows_of(group, generation)[-1]
        answer = self.http.get(self._facts, params={"entity": entity})
        if answer.status_code != 200:
            return False
        found = [fact["value"] for fact in answer.json()["data"]]
        if found != ([] if absent else [value]):
            self.problems.append(f"{entity} was acknowledged in {generation} and read as {found}")
        return True

    def _seen(self) -> bool:
        """What a replica holds of the table that is written to, all of it and of one version."""
        at_least = self._served_everywhere
        with httpx.Client(timeout=60) as http:
            answer = http.get(self._facts, params={"limit": 1_000})
        if answer.status_code != 200:
            return False
        page = answer.json()
        self._is_not_older(page["kb_version"], at_least)
        groups, problems = generations_in([(fact["entity"], fact["property"], fact["value"]) for fact in page["data"]])
        told = [f"a replica in version {page['kb_version']}: {problem}" for problem in problems]
        self.reads.append({"version": page["kb_version"], "groups": groups, "problems": told})
        return True

    def _is_not_older(self, version: int, at_least: int) -> None:
        """Once a write is answered, every replica serves it, those too that start later."""
        if version < at_least:
            self.problems.append(f"version {version} was served after {at_least} was served everywhere")

    def _cites(self) -> bool:
        """Which facts an answer from the table that is written to goes by, of the version that it names."""
        at_least = self._served_everywhere
        entity = f"{SERVED}#0"
        body = {
            "model": f"kblam-demo:written-{self.seed}",
            "messages": [{"role": "user", "content": f"What is the {PROPERTY} of {entity}?"}],
        }
        with httpx.Client(timeout=60) as http:
            answer = http.post(f"{self.address}/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return False
        said = answer.json()
        self._is_not_older(said["kb_version"], at_least)
        self.cited.setdefault(said["kb_version"], set()).update((c["entity"], c["value"]) for c in said["citations"])
        return True

    def _asked_well(self) -> bool:
        body = {"model": f"kblam-demo:asked-{self.seed}", "messages": [{"role": "user", "content": QUESTION}]}
        with httpx.Client(timeout=60) as http:
            answer = http.post(f"{self.address}/v1/chat/completions", json=body)
        self.answers.append(str(answer.status_code))
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["message"]["content"]
            if "Nairobi" not in text:
                self.problems.append(f"answered {text!r}")
            return True
        if answer.status_code not in BUSY | {404}:
            self.problems.append(f"a question was answered {answer.status_code}: {answer.text[:200]}")
        return False

    def _all_the_time(self, do: Callable[[], bool]) -> None:
        while not self.over.wait(0.2):
            try:
                do()
            except (httpx.TransportError, ValueError) as error:
                if do == self._asked_well:
                    self.answers.append(type(error).__name__)

    def kill_driver(self) -> str:
        if Serve._program is None or not Serve._program.kill():
            return ""
        self.restarts += 1
        self._start_server()
        return "the server's job"

    def kill_part(self, target: str, number: int) -> str:
        generator = random.Random(number)
        part = "Answerer" if target == "replica" else generator.choice(PARTS)
        return self.cluster.kill_worker(generator, part, self.over)

    def finish(self) -> dict[str, Any]:
        found = super().finish()
        for version, cited in self.cited.items():
            _, rows = self.table(version)
            if strange := cited - {(entity, value) for entity, _, value in rows}:
                self.problems.append(f"an answer of version {version} cites {strange}")
        num_cited = sum(map(len, self.cited.values()))
        if self.targets <= {"store", "cut", "pause"} and set(self.answers) != {"200"}:
            self.problems.append(f"the store was away, and questions were answered {set(self.answers)}")
        counts = {status: self.answers.count(status) for status in sorted(set(self.answers))}
        return {**found, "answers": counts, "cited": num_cited}

    def close(self) -> None:
        super().close()
        for name in ("asked", "written"):
            try:
                self.http.delete(f"{self.address}/v1/knowledge_bases/{name}-{self.seed}")
            except httpx.TransportError:
                self.notes.append("the server did not take a table away")
        self.http.close()

    @classmethod
    def stop_server(cls) -> None:
        """The last thing of all; the cluster's processes end with the cluster."""
        if Serve._program is not None:
            Serve._program.kill()
        Serve._program, Serve._port = None, 0
