"""jobs/embed_kb.py as a process: its summary, its exit codes, S3, and what SIGKILL cannot do."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.facts import write_facts
from tests.jobs.running import run_job, start_job
from tests.openai_server import KEY, Fault, no_quota, rate_limited, server_error, vector_of

NUM_FACTS = 20_000


@pytest.fixture(scope="module")
def many_facts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("facts") / "many.jsonl")
    write_facts((Fact(f"entity {n}", "code", f"value {n % 9_000}") for n in range(NUM_FACTS)), path)
    return path


def embed_arguments(kb: object, source: str) -> list[str]:
    return ["--kb", str(kb), "--input", source, "--encoder", "hashing", "--num-workers", "2", "--min-workers", "2"]


def wait_for_spool(kb: Path, job) -> None:
    deadline = time.monotonic() + 120
    while not list(kb.glob("_spool/*/*/*.parquet")):
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline, "nothing was encoded"
        time.sleep(0.02)


def assert_holds_exactly(kb: object, source: str) -> None:
    snapshot = KnowledgeBase.open(str(kb)).snapshot()
    found = sorted((fact["entity"], fact["value"]) for fact in snapshot.facts.to_pylist())
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    assert found == sorted((row["entity"], row["value"]) for row in rows)


def kill_tree(job) -> None:
    """SIGKILL the driver, then what is left of the Ray it started."""
    children = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)


def test_an_encoding_worker_killed_in_mid_run_changes_nothing(tmp_path, many_facts):
    kb = tmp_path / "kb"
    job = start_job("embed_kb", *embed_arguments(kb, many_facts))
    wait_for_spool(kb, job)
    workers = []
    for child in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.Error):  # Ray's processes come and go
            if any("_EncodeTexts" in part for part in child.cmdline()):
                workers.append(child)
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=240)
    summary = json.loads(stdout.splitlines()[-1])
    assert (job.returncode, summary["ok"], summary["version"]) == (0, True, 0), stderr
    assert summary["num_facts"] == NUM_FACTS
    assert_holds_exactly(kb, many_facts)


def test_a_driver_killed_before_its_commit_leaves_no_table_and_a_rerun_completes(tmp_path, many_facts):
    kb = tmp_path / "kb"
    job = start_job("embed_kb", *embed_arguments(kb, many_facts))
    wait_for_spool(kb, job)
    kill_tree(job)
    assert not (kb / "_delta_log").exists()
    code, summary, stderr = run_job("embed_kb", *embed_arguments(kb, many_facts))
    assert (code, summary["version"]) == (0, 0), stderr
    assert summary["texts_resumed"] > 0
    assert summary["texts_resumed"] + summary["texts_embedded"] == NUM_FACTS + 9_000
    assert_holds_exactly(kb, many_facts)


def test_a_driver_asked_to_end_says_so_in_its_last_line(tmp_path, many_facts):
    kb = tmp_path / "kb"
    job = start_job("embed_kb", *embed_arguments(kb, many_facts))
    wait_for_spool(kb, job)
    job.terminate()
    stdout, stderr = job.communicate(timeout=240)
    summary = json.loads(stdout.splitlines()[-1])
    assert (job.returncode, summary["ok"], summary["error"]["code"]) == (143, False, "interrupted"), stderr
    assert not (kb / "_delta_log").exists()


def test_the_same_on_s3_with_two_jobs_at_once(tmp_path, s3_uri):
    left, right = str(tmp_path / "left.jsonl"), f"{s3_uri}/inputs/right.csv"
    write_facts([Fact(f"left {n}", "p", "v") for n in range(200)] + [Fact("both", "p", "v")], left)
    write_facts([Fact(f"right {n}", "p", "v") for n in range(200)] + [Fact("both", "p", "v")], right)
    jobs = [start_job("embed_kb", *embed_arguments(f"{s3_uri}/kb", source)) for source in (left, right)]
    summaries = []
    for job in jobs:
        stdout, stderr = job.communicate(timeout=240)
        assert job.returncode == 0, stderr
        summaries.append(json.loads(stdout.splitlines()[-1]))
    kb = KnowledgeBase.open(f"{s3_uri}/kb")
    assert sorted(summary["version"] for summary in summaries) == [0, 1]
    assert (kb.version, kb.num_facts) == (1, 401)
    facts = kb.snapshot().facts
    assert sorted(facts["entity"].to_pylist()) == sorted(
        [f"{side} {n}" for side in ("left", "right") for n in range(200)] + ["both"]
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("half.jsonl", b'{"entity": "a", "property": "p", "value": "v"}\n{"entity": "b", "prop', "half.jsonl: line 2"),
        pytest.param(
            "latin.jsonl",
            b'{"entity": "a", "property": "p", "value": "\xe9"}\n',
            "latin.jsonl: line 1",
            marks=pytest.mark.slow,
        ),
        pytest.param("columns.csv", b"subject,predicate\na,b\n", "columns.csv", marks=pytest.mark.slow),
        ("number.jsonl", b'{"entity": "a", "property": "p", "value": 7}\n', "number.jsonl: line 1"),
        pytest.param(
            "long.csv",
            b"entity,property,value\n" + b"x" * 100_000 + b",p,v\n",
            "long.csv: line 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_exits_2_with_one_message_that_names_the_place(tmp_path, name, content, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    code, summary, stderr = run_job("embed_kb", *embed_arguments(tmp_path / "kb", str(source)))
    assert (code, summary["ok"]) == (2, False)
    assert message in summary["error"]["message"]
    assert "Help:" in summary["error"]["message"]
    assert "Traceback" not in stderr
    assert not (tmp_path / "kb").exists()


def test_a_directory_without_input_a_foreign_table_and_an_unwritable_target(tmp_path):
    (tmp_path / "nothing").mkdir()
    code, summary, _ = run_job("embed_kb", *embed_arguments(tmp_path / "kb", str(tmp_path / "nothing")))
    assert code == 2
    assert "nothing" in summary["error"]["message"]

    import pyarrow as pa
    from deltalake import write_deltalake

    source = str(tmp_path / "one.jsonl")
    write_facts([Fact("a", "p", "v")], source)
    write_deltalake(str(tmp_path / "foreign"), pa.table({"x": [1]}))
    code, summary, _ = run_job("embed_kb", *embed_arguments(tmp_path / "foreign", source))
    assert code == 2
    assert "foreign" in summary["error"]["message"]

    (tmp_path / "file").write_text("in the way")
    code, summary, stderr = run_job("embed_kb", *embed_arguments(tmp_path / "file" / "kb", source))
    assert code != 0
    assert "Help:" in summary["error"]["message"]
    assert "Traceback" not in stderr


def test_an_endpoint_that_is_down_is_a_clear_error(tmp_path):
    source = str(tmp_path / "one.jsonl")
    write_facts([Fact("a", "p", "v")], source)
    code, summary, stderr = run_job(
        "embed_kb",
        *embed_arguments("s3://bucket/kb", source),
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_DEFAULT_REGION="us-east-1",
    )
    assert (code, summary["error"]["code"]) == (1, "storage_failed")
    assert "Traceback" not in stderr


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    source = str(tmp_path / "one.jsonl")
    write_facts([Fact("a", "p", "v")], source)
    config = tmp_path / "job.yaml"
    config.write_text(f"kb: {tmp_path / 'from-yaml'}\ninput: [{source}]\nencoder: hashing\nnum-workers: 1\n")
    code, summary, stderr = run_job("embed_kb", "--config", str(config), "--kb", str(tmp_path / "from-flag"))
    assert (code, summary["kb"]) == (0, str(tmp_path / "from-flag")), stderr
    code, summary, _ = run_job("embed_kb", "--config", str(config), "--mode", "merge")
    assert code == 2
    assert "--mode" in summary["error"]["message"]
    code, summary, _ = run_job("embed_kb", "--inptu", source)
    assert code == 2


def test_a_remote_encoder_with_faults_embeds_every_text_once(tmp_path, openai_server):
    kb, source = tmp_path / "kb", str(tmp_path / "facts.jsonl")
    write_facts((Fact(f"entity {n}", "code", f"value {n % 50}") for n in range(200)), source)
    faults = [rate_limited("0"), server_error(500), Fault("drop"), Fault("drop_midway"), Fault("cut_json")]
    openai_server.faults.extend(faults)
    arguments = ["--kb", str(kb), "--input", source, "--encoder", "openai:text-embedding-3-small@64"]
    arguments += ["--request-texts", "25", "--num-workers", "2", "--base-url", openai_server.base_url]
    code, summary, stderr = run_job("embed_kb", *arguments, OPENAI_API_KEY=KEY)
    assert (code, summary["texts_embedded"]) == (0, 250), stderr
    assert summary["tokens"] > 0
    assert summary["cost_usd"] > 0
    assert not openai_server.faults
    assert set(openai_server.answered.values()) == {1}
    snapshot = KnowledgeBase.open(str(kb)).snapshot()
    for fact, value_P in zip(snapshot.facts.to_pylist(), snapshot.value_embeddings_MP, strict=True):
        assert value_P.astype(np.float32) @ vector_of(fact["value"], 64) > 0.999


def test_a_bad_key_and_an_exhausted_quota_are_told_apart(tmp_path, openai_server):
    source = str(tmp_path / "facts.jsonl")
    write_facts([Fact("a", "p", "v")], source)
    arguments = ["--kb", str(tmp_path / "kb"), "--input", source, "--encoder", "openai:text-embedding-3-small"]
    arguments += ["--base-url", openai_server.base_url]
    code, summary, _ = run_job("embed_kb", *arguments, OPENAI_API_KEY="sk-wrong")
    assert (code, summary["error"]["code"]) == (2, "encoder_unauthorized")
    openai_server.always = no_quota()
    code, summary, stderr = run_job("embed_kb", *arguments, OPENAI_API_KEY=KEY)
    assert (code, summary["error"]["code"]) == (1, "encoder_quota_exhausted")
    assert "Traceback" not in stderr
    assert not (tmp_path / "kb" / "_delta_log").exists()
