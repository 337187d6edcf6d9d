"""The whole embedding job: facts per second by number of workers, and the largest private memory of any process.

Each run is the job as a user starts it, on a table of its own, followed by a compaction. Memory is what a process
has for itself, Ray's own processes included and the object store's shared pages left out, sampled once a second.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from kblam_ray.errors import KblamError, MissingDependencyError
from kblam_ray.facts import write_facts
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.job import JobConfig

SAMPLE_S = 1.0

_PROGRAMS = {
    "embed_kb": """
from kblam_ray.job import main
from kblam_ray.table.pipeline.run import EmbedSettings, embed
main("embed_kb", EmbedSettings, embed)
""",
    "compact_kb": """
from kblam_ray import KnowledgeBase
from kblam_ray.job import JobConfig, main
class CompactSettings(JobConfig):
    kb: str
main("compact_kb", CompactSettings, lambda settings: {"version": KnowledgeBase.open(settings.kb).compact()})
""",
}
"""What the scripts in `jobs/` do, which an installed package does not have."""


class EmbedBenchmark(JobConfig):
    """Settings of `jobs/benchmark.py embed`."""

    input: str | None = Field(None, description="facts to embed; synthetic ones unless given")
    num_facts: int = Field(1_000_000, gt=0, description="synthetic facts")
    encoder: str = Field("hashing", description="encoder name")
    workers: list[int] = Field([2], min_length=1, description="numbers of encoder workers to compare with the first")
    folder: str | None = Field(None, description="where the tables are made and removed: a temporary folder")


def benchmark_embed(config: EmbedBenchmark) -> dict[str, Any]:
    """Run the job once per number of workers; returns seconds, facts per second and peak memory of each."""
    try:
        import psutil  # noqa: F401 - looked for before an hour of work
    except ImportError:
        raise MissingDependencyError(
            "psutil is not installed", where="benchmark", help="pip install 'kblam-ray[ray]'"
        ) from None
    folder = Path(tempfile.mkdtemp(prefix="kblam-benchmark-", dir=config.folder))
    try:
        source = config.input or str(folder / "facts.jsonl")
        if not config.input:
            write_facts(SyntheticFacts(0).facts(0, config.num_facts), source)
        runs = [_measure(config, source, folder / f"kb-{number}", number) for number in config.workers]
    finally:
        shutil.rmtree(folder)
    for run in runs:
        run["speedup"] = round(runs[0]["seconds"] / run["seconds"], 2)
    return {"encoder": config.encoder, "runs": runs}


def _measure(config: EmbedBenchmark, source: str, kb: Path, workers: int) -> dict[str, Any]:
    arguments = ["--kb", str(kb), "--input", source, "--encoder", config.encoder]
    arguments += ["--num-workers", str(workers), "--min-workers", str(workers)]
    embedded, embed_peaks = _watch("embed_kb", arguments)
    compacted, compact_peaks = _watch("compact_kb", ["--kb", str(kb)])
    return {
        "workers": workers,
        "num_facts": embedded["num_facts"],
        "texts_embedded": embedded["texts_embedded"],
        "seconds": embedded["seconds"],
        "facts_per_second": round(embedded["num_facts"] / embedded["seconds"]),
        "peak_private_mb": embed_peaks,
        "compact_seconds": compacted["seconds"],
        "compact_peak_private_mb": compact_peaks,
    }


def _watch(job: str, arguments: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Run a job; its summary, and the peak private memory by kind of process, in MB, largest first."""
    import psutil

    with subprocess.Popen(_command(job, arguments), stdout=subprocess.PIPE, text=True) as process:
        root = psutil.Process(process.pid)
        peaks: dict[str, float] = {}
        while process.poll() is None:
            for one in [root, *root.children(recursive=True)]:
                try:
                    name = "driver" if one == root else _kind(one.cmdline())
                    size_mb = _private_bytes(one) / 2**20
                except psutil.Error:
                    continue  # it ended between the listing and the look
                peaks[name] = max(peaks.get(name, 0), size_mb)
            time.sleep(SAMPLE_S)
        stdout = process.stdout.read() if process.stdout else ""
    summary = json.loads(stdout.splitlines()[-1])
    if not summary["ok"]:
        raise KblamError(f"{job} failed: {summary['error']['message']}", help="see its messages above")
    return summary, {name: round(size) for name, size in sorted(peaks.items(), key=lambda item: -item[1])[:6]}


def _command(job: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", _PROGRAMS[job], *arguments]


def _kind(command: list[str]) -> str:
    """The name of a Ray worker's task, or of a Ray daemon."""
    first = " ".join(command)
    if first.startswith("ray::"):
        return first.removeprefix("ray::").strip().partition(").")[0]
    return Path(command[0]).name if command else "other"


def _private_bytes(process: Any) -> int:
    # Resident pages that no file and no shared memory backs. Exact figures from the page maps cost the job a fifth of
    # its speed.
    memory = process.memory_info()
    return memory.rss - memory.shared
