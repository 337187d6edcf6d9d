"""Files of facts that change, and refreshes of them in this process and in others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from kblam_ray import KnowledgeBase
from kblam_ray.table.refresh.run import Refresher, refresh
from kblam_ray.table.refresh.settings import RefreshSettings

ROOT = Path(__file__).parents[3]
JOB = ROOT / "jobs" / "refresh_kb.py"


def lines(rows: Iterable[tuple[str, str, str]]) -> str:
    return "".join(json.dumps({"entity": e, "property": p, "value": v}, ensure_ascii=False) + "\n" for e, p, v in rows)


def put(path: Path, *rows: tuple[str, str, str]) -> Path:
    """Write a file of facts as careful programs do: under another name, then moved to its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}"
    unfinished.write_text(lines(rows), encoding="utf-8")
    unfinished.replace(path)
    return path


def settings(kb: str | Path, *inputs: str | Path, **others) -> RefreshSettings:
    given = {"encoder": "hashing:16", "settle_s": 0, "poll_s": 0.1, "vacuum_every_h": 0, "compact_files": 0, **others}
    return RefreshSettings(kb=str(kb), input=[str(path) for path in inputs], **given)


def once(kb: str | Path, *inputs: str | Path, **others) -> dict:
    return refresh(settings(kb, *inputs, once=True, **others))


def watcher(kb: str | Path, *inputs: str | Path, **others) -> Refresher:
    return Refresher(settings(kb, *inputs, **others))


def contents(kb: str | Path, version: int | None = None) -> dict[tuple[str, str], str]:
    facts = KnowledgeBase.open(str(kb), version).snapshot().facts.to_pylist()
    found = {(fact["entity"], fact["property"]): fact["value"] for fact in facts}
    assert len(found) == len(facts)
    return found


class Job:
    """`jobs/refresh_kb.py` in a process of its own."""

    def __init__(self, kb: str | Path, *inputs: str | Path, **flags: object) -> None:
        given = {"encoder": "hashing:16", "settle-s": 0, "poll-s": 0.1, "vacuum-every-h": 0, **flags}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        self.process = subprocess.Popen(
            [sys.executable, str(JOB), "--kb", str(kb), *(f"--input={path}" for path in inputs), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def stop(self, *, may_be_new: bool = False) -> dict:
        """Ask it to end, and return its summary.

        Args:
            may_be_new: it may not have come to where it listens to signals, and is well then if it just ends.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.finished(may_be_new=may_be_new)

    def finished(self, *, may_be_new: bool = False) -> dict:
        out, err = self.process.communicate(timeout=240)
        if may_be_new and not out and self.process.returncode == -signal.SIGTERM:
            return {"ok": True, "exit_code": self.process.returncode, "stderr": err}
        assert out.strip(), err
        return {**json.loads(out.splitlines()[-1]), "exit_code": self.process.returncode, "stderr": err}

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


def wait_until(condition, timeout_s: float = 120.0) -> None:
    """Look again and again until it is so."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def holds(kb: str | Path, expected: dict) -> bool:
    try:
        return contents(kb) == expected
    except Exception:  # noqa: BLE001 - no table yet, or one that is being made
        return False
