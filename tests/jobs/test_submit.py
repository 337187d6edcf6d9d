"""The jobs under `ray job submit`, against a head on this machine: what they do, and what `ray job logs` shows."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.facts import write_facts
from tests.jobs.submitting import cluster, ray_job, submit
from tests.model_samples import save_base
from tests.openai_chat_server import Reply, chat_server
from tests.processes import free_port

__all__ = ["cluster"]  # a fixture


def test_embed_runs_unchanged_under_ray_job_submit(cluster, tmp_path):
    source, kb = str(tmp_path / "facts.jsonl"), str(tmp_path / "kb")
    write_facts((Fact(f"entity {n}", "code", str(n)) for n in range(300)), source)
    arguments = ["--kb", kb, "--input", source, "--encoder", "hashing", "--num-workers", "2"]
    code, summary, logs = submit(cluster, "python", "jobs/embed_kb.py", *arguments)
    assert (code, summary["ok"], summary["num_facts"]) == (0, True, 300), logs
    assert KnowledgeBase.open(kb).num_facts == 300

    code, summary, logs = submit(cluster, "python", "jobs/embed_kb.py", "--kb", kb, "--input", "nowhere.jsonl")
    assert code == 1
    assert (summary["ok"], summary["error"]["code"]) == (False, "bad_input")
    said = next(line for line in logs.splitlines() if line.startswith("embed_kb: "))
    assert "nowhere.jsonl" in said
    assert "Help:" in said
    assert "FAILED" in logs or "failed" in logs


def submitted(cluster: dict[str, str], job: str, number: int, *flags: str) -> dict[str, Any]:
    """The summary, which is the last line of a job's logs, with what the job said on its way as `progress`."""
    name = f"{job}-{number}"
    script = f"jobs/{job}.py"
    done = ray_job(cluster, "submit", "--working-dir", ".", "--submission-id", name, "--", "python", script, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = ray_job(cluster, "logs", name).stdout
    lines = [line for line in logs.splitlines() if line.strip()]
    found = json.loads(lines[-1])
    assert (found["ok"], found["job"]) == (True, job), logs
    return {**found, "progress": lines[:-1]}


def say(request: dict[str, Any]) -> Reply:
    """Facts of a document, as a chat model would state them."""
    fact = {"entity": "Ur", "property": "founder", "value": "Meskalamdug"}
    return Reply(json.dumps({"facts": [fact]}))


@pytest.mark.slow
@pytest.mark.timeout(1_500)
def test_progress_and_summary_of_one_job_after_another(cluster: dict[str, str], tmp_path: Path) -> None:
    def of(name: str) -> str:
        return str(tmp_path / name)

    kb, base = of("kb"), save_base(tmp_path / "base")
    tiny = ["--base-model", str(base), "--device", "cpu"]

    made = submitted(cluster, "synthesize_kb", 1, "--output", of("in/facts.jsonl"), "--num-facts", "300")
    assert made["num_facts"] == 300
    with chat_server(say) as chat:
        (tmp_path / "documents").mkdir()
        (tmp_path / "documents" / "ur.txt").write_text("Meskalamdug founded Ur.\n")
        flags = ["--input", of("documents"), "--output", of("extracted.jsonl"), "--chat-model", "m"]
        extracted = submitted(cluster, "extract_kb", 1, *flags, "--chat-url", chat.url)
    assert extracted["num_facts"] == 1
    embedded = submitted(cluster, "embed_kb", 1, "--kb", kb, "--input", of("in/facts.jsonl"), "--encoder", "hashing:64")
    assert embedded["num_facts"] == 300
    (tmp_path / "in" / "extracted.jsonl").write_text(Path(of("extracted.jsonl")).read_text())
    refreshed = submitted(cluster, "refresh_kb", 1, "--kb", kb, "--input", of("in"), "--once", "--settle-s", "0")
    assert refreshed["num_facts"] == KnowledgeBase.open(kb).num_facts == 301
    assert any("refresh: version" in line for line in refreshed["progress"])
    submitted(cluster, "compact_kb", 1, "--kb", kb)

    flags = ["--kb", kb, *tiny, "--output", of("adapter"), "--start", "random", "--kb-layers", "1", "--kb-layers", "3"]
    flags += ["--steps", "6", "--warmup-steps", "2", "--num-workers", "1", "--cpus-per-worker", "1", "--no-calibrate"]
    flags += ["--no-evaluate", "--no-tensorboard", "--mix-batch-size", "4", "--mix-kb-size", "4", "8"]
    trained = submitted(cluster, "train_adapter", 1, *flags, "--dtype", "float32")
    assert trained["steps"] == 6
    assert any("step 6:" in line for line in trained["progress"])
    model = [*tiny, "--adapter", of("adapter")]
    submitted(cluster, "ask", 1, *model, "--kb", kb, "--question", "Who founded Ur?", "--max-new-tokens", "4")
    submitted(cluster, "bundle_model", 1, *model[:2], *model[4:], "--kb", kb, "--output", of("bundle"))
    small = ["--num-questions", "2", "--max-new-tokens", "3"]
    evaluated = submitted(cluster, "evaluate", 1, *model, "--kb", kb, "--output", of("results"), *small)
    assert (tmp_path / "results" / "report.html").exists()
    assert any("questions" in line for line in evaluated["progress"]), evaluated
    reproduced = submitted(cluster, "reproduce", 1, "--output", of("paper"), "--experiment", "refusal")
    assert any("refusal" in line and "done in" in line for line in reproduced["progress"]), reproduced


@pytest.mark.slow
@pytest.mark.timeout(1_500)
def test_jobs_that_start_from_nothing_or_start_other_jobs(cluster: dict[str, str], tmp_path: Path) -> None:
    sizes = {"num-facts": 300, "adapter-facts": 40, "vocabulary": 600, "hidden-size": 32, "mlp-size": 48}
    sizes |= {"num-layers": 3, "num-heads": 2, "num-kv-heads": 2, "wiring-questions": 200, "steps": 4}
    sizes |= {"questions-per-step": 6, "readings-per-step": 3, "repeats-per-step": 2, "warmup-steps": 2}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    made = submitted(cluster, "pretrain_demo", 1, "--output", str(tmp_path / "demo"), *flags)
    assert made["steps"] == 4
    assert (tmp_path / "demo" / "model" / "config.json").exists()
    assert any('"step": 4' in line for line in made["progress"]), made
    small = ["--num-facts", "300", "--workers", "1", "--folder", str(tmp_path)]
    measured = submitted(cluster, "benchmark", 1, "embed", *small)
    assert [run["num_facts"] for run in measured["runs"]] == [300]
    # What the job that it measures says goes into its own log.
    assert any("texts" in line for line in measured["progress"]), measured


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_fails_has_failed_for_ray_too(cluster: dict[str, str], tmp_path: Path) -> None:
    done = ray_job(
        cluster,
        *("submit", "--working-dir", ".", "--submission-id", "fails", "--"),
        *("python", "jobs/compact_kb.py", "--kb", str(tmp_path / "nowhere")),
    )
    assert done.returncode == 1
    status = ray_job(cluster, "status", "fails")
    assert re.search(r"Job \S*fails\S* failed", status.stdout), status.stdout
    *lines, last = [line for line in ray_job(cluster, "logs", "fails").stdout.splitlines() if line.strip()]
    error = json.loads(last)["error"]
    # What happened, where, and what helps: once for people, and once in the summary.
    assert str(tmp_path / "nowhere") in error["message"]
    assert "Help:" in error["message"]
    assert f"compact_kb: {error['message']}" in lines


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_server_says_where_it_is_and_ends_when_its_job_is_stopped(cluster: dict[str, str], tmp_path: Path) -> None:
    kb, port = str(tmp_path / "kb"), free_port()
    KnowledgeBase.create(kb, "all-MiniLM-L6-v2").upsert([("Kenya", "capital", "Nairobi")])
    flags = ["--kb", f"world={kb}", "--port", str(port), "--replicas-num-cpus", "0.5"]
    started = ["submit", "--no-wait", "--working-dir", ".", "--submission-id", "server", "--"]
    done = ray_job(cluster, *started, "python", "jobs/serve.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(1)
    logs = ray_job(cluster, "logs", "server").stdout
    assert f":{port}" in logs, logs
    body = {"model": "kblam-demo:world", "messages": [{"role": "user", "content": "What is the capital of Kenya?"}]}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert ray_job(cluster, "stop", "server").returncode == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")
