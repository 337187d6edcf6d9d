"""The encode benchmark from its command line, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> tuple[int, dict[str, object]]:
    done = subprocess.run([sys.executable, "jobs/benchmark.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_encode_reports_rates_and_exactness() -> None:
    code, summary = run("encode", "--num-facts", "30", "--rounds", "2")
    assert (code, summary["ok"], summary["num_texts"]) == (0, True, 60)
    assert summary["min_cosine"] > 0.99999
    assert len(summary["ratios"]) == 2
    assert summary["ratio"] == pytest.approx(sum(summary["ratios"]) / 2, abs=1e-3)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["encode", "--nonsense"], ["encode", "--core", "9999"]])
def test_what_cannot_be_run_is_refused(arguments: list[str]) -> None:
    code, summary = run(*arguments)
    assert (code, summary["ok"], summary["error"]["code"]) == (2, False, "bad_input")
