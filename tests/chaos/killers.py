"""What is killed and when: planned from a seed, done beside a workload that runs."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from tests.chaos.cluster import Cluster

TARGETS = {
    "embed": ["worker", "node", "driver", "writer", "store", "cut", "pause"],
    "refresh": ["driver", "driver", "driver", "worker", "node", "writer", "writer", "store", "store", "cut", "pause"],
    "train": ["worker", "node", "driver", "writer", "store", "cut", "pause"],
    "serve": ["replica", "replica", "part", "node", "driver", "store", "cut", "pause"],
}
"""What each workload loses. `store` is the S3 endpoint itself, `cut` the way to it, `pause` its answers for a while;
`part` is a process of the server beside the replicas, `writer` the program that writes to the same table. A refresh
does most of its work in its own process."""

LONGEST_OUTAGE_S = {"store": 2.0, "cut": 4.0, "pause": 6.0}


@dataclass(frozen=True)
class Fault:
    """One blow.

    Attributes:
        target: see `TARGETS`.
        after_progress: whether its time counts from the first sign of work; else from the start.
        delay_s: how long after that.
        outage_s: how long a store is away.
        number: which one of several.
    """

    target: str
    after_progress: bool
    delay_s: float
    outage_s: float
    number: int


def plan_faults(generator: random.Random, workload: str, span_s: float) -> list[Fault]:
    """One to three blows within `span_s` seconds of the start, or a third of that after the first sign of work."""
    faults = []
    for _ in range(generator.choice([1, 2, 2, 3])):
        target = generator.choice(TARGETS[workload])
        after_progress = generator.random() < 0.7
        delay_s = generator.uniform(0, span_s / 3 if after_progress else span_s)
        outage_s = round(generator.uniform(0.2, LONGEST_OUTAGE_S.get(target, 0.2)), 2)
        faults.append(Fault(target, after_progress, round(delay_s, 2), outage_s, generator.randrange(1_000)))
    return faults


class Victim(Protocol):
    """What the killers must know of a workload."""

    progress: threading.Event
    over: threading.Event
    worker_title: str

    def kill_driver(self) -> str: ...

    def kill_writer(self) -> str: ...

    def kill_part(self, target: str, number: int) -> str: ...


@dataclass
class Killers:
    """A thread per blow; `done` says what each did, and when."""

    cluster: Cluster
    victim: Victim
    faults: list[Fault]
    done: list[dict[str, object]] = field(default_factory=list)

    def start(self) -> None:
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._strike, args=(fault,), daemon=True) for fault in self.faults]
        for thread in self._threads:
            thread.start()

    @property
    def are_due(self) -> bool:
        """Whether blows are still to come or under way."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self, timeout_s: float = 60.0) -> None:
        """Wait for all blows; those that were to come after the workload's end do not come."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _strike(self, fault: Fault) -> None:
        what = "nothing: it failed"
        try:
            if fault.after_progress:
                while not self.victim.progress.wait(0.05) and not self.victim.over.is_set():
                    pass
            what = "" if self.victim.over.wait(fault.delay_s) else self._hit(fault)
            if not what:
                what = "nothing: it was over" if self.victim.over.is_set() else "nothing: none was there"
        finally:
            at_s = round(time.monotonic() - self._started, 2)
            with self._lock:
                self.done.append({"target": fault.target, "at_s": at_s, "did": what})

    def _hit(self, fault: Fault) -> str:
        match fault.target:
            case "worker":
                generator = random.Random(fault.number)
                return self.cluster.kill_worker(generator, self.victim.worker_title, self.victim.over)
            case "node":
                return self.cluster.kill_node(fault.number)
            case "driver":
                return self.victim.kill_driver()
            case "writer":
                return self.victim.kill_writer()
            case "store":
                self.cluster.endpoint.kill(fault.outage_s)
                return f"the S3 endpoint, away for {fault.outage_s} s and its start"
            case "cut":
                self.cluster.endpoint.cut(fault.outage_s)
                return f"S3 cut off for {fault.outage_s} s"
            case "pause":
                self.cluster.endpoint.pause(fault.outage_s)
                return f"S3 stood still for {fault.outage_s} s"
            case _:
                return self.victim.kill_part(fault.target, fault.number)


def is_hit(did: dict[str, object]) -> bool:
    """Whether a blow hit something."""
    return not str(did["did"]).startswith("nothing")
