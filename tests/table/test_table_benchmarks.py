"""The table's benchmarks, on small tables: what they report is there and belongs to what they ran."""

from __future__ import annotations

import pytest

from kblam_ray.table.benchmark import LoadBenchmark, benchmark_load
from kblam_ray.table.pipeline.benchmark import EmbedBenchmark, _command, benchmark_embed


def test_load_compares_three_ways_and_leaves_nothing_behind(tmp_path):
    found = benchmark_load(LoadBenchmark(num_facts=500, dim=16, rounds=1, folder=str(tmp_path)))
    assert found["num_facts"] == 500
    assert found["ms"].keys() == {"table", "parquet_float32_lists", "npy_float32"}
    assert found["ratio"].keys() == {"parquet_float32_lists", "npy_float32"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["embed_kb", "compact_kb"])
def test_embed_needs_no_script_beside_the_package(job):
    """Installed from the wheel there is none."""
    _, _, program, *arguments = _command(job, ["--kb", "kb"])
    compile(program, job, "exec")
    assert "jobs" not in program
    assert arguments == ["--kb", "kb"]


@pytest.mark.slow
def test_embed_runs_the_job_once_per_number_of_workers(tmp_path):
    found = benchmark_embed(EmbedBenchmark(num_facts=2_000, workers=[1, 2], folder=str(tmp_path)))
    assert [run["workers"] for run in found["runs"]] == [1, 2]
    for run in found["runs"]:
        assert run["num_facts"] == 2_000
        assert run["peak_private_mb"]["driver"] > 0
    assert not list(tmp_path.iterdir())
