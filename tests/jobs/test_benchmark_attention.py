"""jobs/benchmark.py attention: its summary and its files; as a process, where neither Ray nor Delta is installed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kblam_ray.attention.benchmark import AttentionBenchmark, benchmark_attention
from kblam_ray.attention.benchmark.settings import auto_rule
from kblam_ray.errors import InputError
from kblam_ray.job import parse

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "deltalake", "boto3", "sentence_transformers", "onnxruntime", "sklearn", "openai", "psutil")

RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent!r}))  # importing any of them raises ModuleNotFoundError
runpy.run_path("jobs/benchmark.py", run_name="__main__")
"""

TINY = [*("--shape", "tiny"), *("--dim", "16"), *("--rounds", "2"), *("--dtype", "float32"), *("--prompt-tokens", "5")]
SIZES = ["--num-facts", "40", "--num-facts", "3"]


def run(*arguments: str, absent: tuple[str, ...] = ABSENT) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(absent=absent), "attention", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_every_case_is_measured_and_written(tmp_path):
    folder = tmp_path / "results"
    refresh = ["--refresh", "--refresh-facts", "30", "--refresh-applies", "12", "--apply-changes", "8"]
    code, summary, stderr = run(*TINY, *SIZES, *refresh, "--threads", "1", "--output", str(folder))
    assert (code, summary["ok"], summary["benchmark"], summary["skipped"]) == (0, True, "attention", []), stderr
    assert (summary["threads"], summary["kb_layers"], summary["device"]) == (1, 2, "cpu")
    assert summary["no_kb"].keys() == {"prefill_ms", "decode_ms"}
    assert summary["auto"].keys() == {"paper", "shared"}

    cases = summary["cases"]
    forms = [("shared", "latent"), ("paper", "latent"), ("shared", "materialized"), ("paper", "materialized")]
    expected = [(*form, size) for size in (3, 40) for form in [*forms, ("paper", "published")]]
    assert [(row["kind"], row["form"], row["num_facts"]) for row in cases] == expected
    measured = ("nbytes", "ready_s", "prefill_ms", "decode_ms", "prefill_ratio", "decode_ratio")
    assert all(row[name] > 0 for row in cases for name in measured)
    for row in cases:
        assert ("published_over_ours" in row) == (row["form"] != "published")
        assert row["decode_ratio_smallest"] <= row["decode_ratio"] <= row["decode_ratio_largest"]
    # Base embeddings in 16 bit, an id, and for kind paper a float; keys and values of all slots in 32 bit.
    nbytes = {(row["kind"], row["form"]): row["nbytes"] for row in cases if row["num_facts"] == 40}
    assert nbytes["shared", "latent"] == 40 * (2 * 2 * 16 + 8)
    assert nbytes["paper", "latent"] == 40 * (2 * 2 * 16 + 8 + 4)
    assert nbytes["paper", "published"] == 40 * 2 * 2 * 64 * 4

    assert {(row["kind"], row["num_facts"]) for row in summary["materialized_over_latent"]} == {
        (kind, size) for kind in ("paper", "shared") for size in (3, 40)
    }
    assert (summary["apply"]["num_facts"], summary["apply"]["num_changes"]) == (40, 8)
    assert [row["kind"] for row in summary["refresh"]] == ["paper", "shared"]
    assert all(row["old_versions_alive"] == 0 < row["old_versions_watched"] for row in summary["refresh"])

    written = {name: folder / f"attention.{name}" for name in ("json", "csv", "png")}
    assert summary["files"] == [str(path) for path in written.values()]
    assert json.loads(written["json"].read_text())["cases"] == cases
    with written["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["form"], int(row["num_facts"])) for row in rows] == expected
    assert [float(row["decode_ratio"]) for row in rows] == [row["decode_ratio"] for row in cases]
    assert float(rows[0]["published_over_ours_bytes"]) == cases[0]["published_over_ours"]["bytes"]

    from matplotlib.image import imread

    image = imread(written["png"])
    assert image.shape[0] > 300
    assert image.shape[1] > 900
    assert len({tuple(pixel) for pixel in image.reshape(-1, image.shape[2])[::7]}) > 10
    table = [tuple(line.split()[:3]) for line in stderr.splitlines()]
    assert [row for row in table if row[1:2] in (("paper",), ("shared",))] == [
        (str(size), kind, form) for kind, form, size in expected
    ]


def measured(*arguments: str) -> dict[str, Any]:
    """The summary of a run in this process."""
    return benchmark_attention(parse("benchmark", AttentionBenchmark, list(arguments)))


def test_cases_beyond_the_memory_allowed_are_skipped_and_said(tmp_path, capsys):
    summary = measured(*TINY, *SIZES, "--kind", "paper", "--max-memory-gb", "0.00005", "--output", str(tmp_path))
    assert [(row["form"], row["num_facts"]) for row in summary["skipped"]] == [("materialized", 40), ("published", 40)]
    assert all("memory" in row["reason"] for row in summary["skipped"])
    assert "skipped: paper published, 40 facts" in capsys.readouterr().err
    assert [(row["form"], row["num_facts"]) for row in summary["cases"]] == [
        ("latent", 3),
        ("materialized", 3),
        ("published", 3),
        ("latent", 40),
    ]
    assert "published_over_ours" not in summary["cases"][3]


def test_only_what_is_asked_for_is_measured():
    asked = ["--kind", "shared", "--form", "latent", "--num-facts", "3", "--apply-changes", "0"]
    summary = measured(*TINY, *asked)
    assert [(row["kind"], row["form"]) for row in summary["cases"]] == [("shared", "latent")]
    assert "apply" not in summary
    assert "refresh" not in summary
    assert summary["files"] == []


def test_a_plan_measures_nothing_and_needs_no_such_device():
    summary = measured("--shape", "llama-8b", "--device", "cuda", "--max-memory-gb", "100", "--plan")
    assert summary["parameters"] == 8_030_261_248
    assert "cases" not in summary
    held = {(row["kind"], row["form"], row["num_facts"]): row["held_mb"] for row in summary["planned"]}
    assert held["paper", "latent", 1_000_000] == pytest.approx(1_000 * (4 * 384 + 12) / 1e3)
    # 2 x 11 KB layers x 32 heads x 128 numbers of 16 bit.
    assert held["paper", "published", 10_000] == pytest.approx(10_000 * 180_224 / 1e6, abs=0.1)
    assert {(row["form"], row["num_facts"]) for row in summary["skipped"]} == {
        ("materialized", 1_000_000),
        ("published", 1_000_000),
    }


def test_help_says_what_auto_chooses(capsys):
    with pytest.raises(SystemExit):
        parse("benchmark", AttentionBenchmark, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for kind, rule in auto_rule().items():
        assert f"kind {kind}: {rule}" in text
    assert "choose_form" in text


@pytest.mark.parametrize(
    "arguments", [["--form", "auto"], ["--num-facts", "none"], ["--rounds", "0"], ["--num-facts", "0"], ["--nonsense"]]
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(InputError, match=arguments[0]):
        parse("benchmark", AttentionBenchmark, arguments)


def test_wrong_settings_are_the_summary():
    code, summary, _ = run("--rounds", "0")
    assert (code, summary["ok"], summary["error"]["code"]) == (2, False, "bad_input")
    assert "--rounds" in summary["error"]["message"]


def test_without_torch_the_summary_says_so():
    code, summary, _ = run("--shape", "tiny", absent=("torch",))
    assert (code, summary["error"]["code"]) == (2, "missing_dependency")
    assert "torch is not installed" in summary["error"]["message"]
    assert "kblam-ray[model]" in summary["error"]["message"]
