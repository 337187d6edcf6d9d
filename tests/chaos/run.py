"""Seeded runs and their verdicts: `python -m tests.chaos.run --seeds 50 --output verdicts.jsonl`.

One cluster serves them all; each has a table of its own. What a seed decides: the workload, what is hit, when and for
how long. What it cannot decide is how far the processes are then, so a seed that failed is worth repeating.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.chaos.cluster import Cluster
from tests.chaos.killers import Killers, is_hit, plan_faults
from tests.chaos.serve import Serve
from tests.chaos.workload import Workload
from tests.chaos.workloads import Embed, Refresh, Train

WORKLOADS: dict[str, type[Workload]] = {"embed": Embed, "refresh": Refresh, "train": Train, "serve": Serve}
SHARES = {"embed": 3, "refresh": 3, "train": 1, "serve": 2}


def workload_of(seed: int, among: Iterable[str] = WORKLOADS) -> str:
    """Which workload a seed means."""
    names = list(among)
    return random.Random(seed).choices(names, [SHARES[name] for name in names])[0]


def run_seed(cluster: Cluster, seed: int, name: str, keep: Path | None = None) -> dict[str, Any]:
    """One run; its verdict: `ok`, the `problems`, what was hit and what was seen."""
    for variable, value in cluster.environment.items():
        if variable.startswith("AWS_"):
            os.environ[variable] = value
    cluster.mend()
    folder = Path(tempfile.mkdtemp(prefix="chaos-run-"))
    started = time.monotonic()
    workload = WORKLOADS[name](cluster, seed, folder)
    found: dict[str, Any] = {}
    killers = None
    try:
        faults = plan_faults(random.Random(f"faults {seed}"), name, workload.span_s)
        workload.targets = frozenset(fault.target for fault in faults)
        workload.has_writer = "writer" in workload.targets or workload.random.random() < 0.5
        workload.prepare()
        killers = Killers(cluster, workload, faults)
        killers.start()
        workload.blows_are_due = lambda: killers is not None and killers.are_due
        workload.work()
        workload.over.set()
        killers.join()
        found = workload.finish()
    except Exception:  # noqa: BLE001 - a run that fails is a verdict, too
        workload.problems.append(traceback.format_exc(limit=-4))
    finally:
        workload.close()
        if killers is not None:
            killers.join()
    done = killers.done if killers else []
    if killers and (len(done) != len(killers.faults) or any("failed" in str(blow["did"]) for blow in done)):
        workload.problems.append(f"a blow failed: {done}")
    ok = not workload.problems
    if ok or keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        shutil.move(folder, keep / f"{name}-{seed}")
    return {
        "seed": seed,
        "workload": name,
        "ok": ok,
        "hits": sum(map(is_hit, done)),
        "faults": done,
        "problems": workload.problems,
        "notes": workload.notes,
        "wall_s": round(time.monotonic() - started, 1),
        **found,
    }


def table_of(verdicts: list[dict[str, Any]]) -> str:
    """The verdicts, one line per workload, as Markdown."""
    lines = [
        "| workload | runs | hit | exact | kills and outages | acknowledged writes | versions | reads | restarts |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in [*WORKLOADS, "all"]:
        of = [verdict for verdict in verdicts if name in (verdict["workload"], "all")]
        if not of:
            continue
        hits = Counter(fault["target"] for verdict in of for fault in verdict["faults"] if is_hit(fault))
        told = ", ".join(f"{count} {target}" for target, count in sorted(hits.items())) or "none"
        sums = [sum(v.get(key, 0) for v in of) for key in ("acknowledged", "version", "reads", "restarts")]
        cells = [name, len(of), sum(v["hits"] > 0 for v in of), sum(v["ok"] for v in of), told, *sums]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="only these")
    parser.add_argument("--output", type=Path, help="a file that gets one line of JSON per run")
    parser.add_argument("--keep", type=Path, help="a folder that gets the logs of runs that failed")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.keep:
        asked.keep.mkdir(parents=True, exist_ok=True)
    verdicts: list[dict[str, Any]] = []
    until = time.monotonic() + 60 * asked.minutes
    cluster = Cluster()
    try:
        seeds = range(asked.first, asked.first + asked.seeds)
        named = [(workload_of(seed, asked.workload or WORKLOADS), seed) for seed in seeds]
        # The server stays when its first run is over, and would be hit, and start again, beside all that follows.
        for name, seed in sorted(named, key=lambda one: one[0] == "serve"):
            if time.monotonic() > until:
                break
            verdict = run_seed(cluster, seed, name, asked.keep)
            verdicts.append(verdict)
            line = json.dumps(verdict)
            print(line, flush=True)
            if asked.output:
                with asked.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    finally:
        Serve.stop_server()
        has_failed = not all(verdict["ok"] for verdict in verdicts)
        cluster.stop(asked.keep if has_failed else None)
    print(table_of(verdicts), file=sys.stderr)
    return 0 if all(verdict["ok"] for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
