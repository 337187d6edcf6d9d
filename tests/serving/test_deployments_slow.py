"""Servers that take minutes to show: a store that is down, a restart, autoscaling, keys, and Serve's own tools."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml
from serve_samples import ROOT, Gate, eventually, question_body, running_server
from serving_samples import ANSWER, QUESTION, capital_facts, make_kb, minilm

from kblam_ray import Fact, KnowledgeBase
from tests.jobs.submitting import BIN, cluster
from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

__all__ = ["cluster"]  # a fixture


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_store_that_is_down_is_survived_and_its_state_restored(s3_endpoint, monkeypatch):
    gate = Gate(int(s3_endpoint.rpartition(":")[2]))
    gate.open()
    places = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    bucket = f"kb-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    kb = KnowledgeBase.create(f"s3://{bucket}/capitals", minilm())
    kb.upsert(capital_facts())
    through_gate = {**places, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}"}
    flags = ["--grounding", "verbatim", "--state-uri", f"s3://{bucket}/state.json"]
    with running_server("--kb", kb.uri, *flags, **through_gate) as server:
        assert text_of(server.ask(QUESTION)) == ANSWER
        gate.shut()
        kb.upsert([Fact("Kenya", "capital", "Mombasa")])
        down_since = time.monotonic()
        eventually(lambda: server.kb()["status"] == "unreachable", "a store that is noticed to be down")
        assert server.http.get("/health").status_code == 200
        assert server.health()["status"] == "degraded"
        num_answers = 0
        while time.monotonic() < down_since + 30:
            answer = server.ask(QUESTION)
            assert text_of(answer) == ANSWER
            assert answer.json()["kb_version"] == 0
            num_answers += 1
        assert num_answers > 10
        # What needs the store says so, and changes nothing.
        facts = {"facts": [{"entity": "Kenya", "property": "capital", "value": "Kisumu"}]}
        failed = server.http.post("/v1/knowledge_bases/capitals/facts", json=facts)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "storage_failed")
        pin = server.http.put("/v1/knowledge_bases/capitals", json={"uri": kb.uri, "version": 0})
        assert pin.status_code == 503
        gate.open()
        eventually(lambda: "Mombasa" in text_of(server.ask(QUESTION)), "a table that is followed again", 30)
        eventually(lambda: server.health()["status"] == "ok", "health")
        pin = server.http.put("/v1/knowledge_bases/capitals?wait=true", json={"uri": kb.uri, "version": 0})
        assert pin.status_code == 200, pin.text
        assert text_of(server.ask(QUESTION)) == ANSWER
    with running_server(*flags, **through_gate) as server:
        assert server.kb()["pinned"]
        assert text_of(server.ask(QUESTION)) == ANSWER
    gate.shut()


def test_replicas_come_with_the_load_and_go_without_it(tmp_path):
    make_kb(tmp_path)
    flags = [
        *("--kb", str(tmp_path / "capitals"), "--grounding", "verbatim", "--replicas-max-replicas", "2"),
        *("--replicas-target-ongoing-requests", "2"),
        *("--replicas-upscale-delay-s", "1", "--replicas-downscale-delay-s", "3"),
        # Two replicas, and what a machine with two cores does beside them.
        *("--replicas-num-cpus", "0.5"),
    ]
    with running_server(*flags) as server:
        over, light = threading.Event(), threading.Event()
        wrong: list[str] = []
        num_answers = [0] * 12

        def ask(number: int) -> None:
            with httpx.Client(base_url=server.address, timeout=120) as client:
                while not over.is_set() and not (number and light.is_set()):
                    try:
                        answer = client.post("/v1/chat/completions", json=question_body(QUESTION))
                    except httpx.HTTPError as error:
                        wrong.append(repr(error))
                    else:
                        if answer.status_code != 200 or ANSWER not in answer.text:
                            wrong.append(answer.text)
                    num_answers[number] += 1

        asking = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(len(num_answers))]
        for thread in asking:
            thread.start()
        eventually(lambda: server.health()["replicas"] == 2, "a second replica", 180)
        light.set()
        eventually(lambda: server.health()["replicas"] == 1, "one replica", 120)
        before = num_answers[0]
        eventually(lambda: num_answers[0] > before + 3, "more answers")
        over.set()
        for thread in asking:
            thread.join(60)
        assert not wrong
        assert len(server.processes("Answerer")) == 1


def test_keys_are_asked_for_and_never_written_down(tmp_path):
    make_kb(tmp_path)
    keys = {"KBLAM_API_KEYS": f"ask-{uuid.uuid4().hex}", "KBLAM_ADMIN_KEYS": f"write-{uuid.uuid4().hex}"}
    asking, writing = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    facts = {"facts": [{"entity": "Kenya", "property": "capital", "value": "Kisumu"}]}
    path = "/v1/knowledge_bases/capitals/facts?wait=true"
    with running_server("--kb", str(tmp_path / "capitals"), "--host", "0.0.0.0", **keys) as server:
        body = question_body(QUESTION)
        post = server.http.post
        wrong = {"Authorization": f"Bearer wrong-{uuid.uuid4().hex}"}
        assert [post("/v1/chat/completions", json=body, headers=key).status_code for key in ({}, wrong)] == [401, 401]
        assert post("/v1/chat/completions", json=body, headers=asking).status_code == 200
        assert post(path, json=facts, headers=asking).status_code == 403
        assert post(path, json=facts, headers=writing).status_code == 200
        pids = {process.pid for name in ("Gateway", "Answerer") for process in server.processes(name)}
        logs = _logs_of(pids)
        summary = server.stop()
    assert summary["ok"]
    shown = json.dumps(summary) + "".join(
        path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()
    )
    assert "kblam_ray.serving.access" in shown
    for secret in [*keys.values(), wrong["Authorization"]]:
        assert secret not in shown


def _logs_of(pids: set[int]) -> Path:
    """The folder of logs of the Ray that processes belong to: their stderr is a file in it."""
    (folder,) = {Path(os.readlink(f"/proc/{pid}/fd/2")).parent for pid in pids}
    return folder


def test_serve_deploys_the_yaml_and_a_change_of_it_without_a_restart(cluster, tmp_path):
    make_kb(tmp_path).upsert([Fact("Kenya", "capital", "Mombasa")])
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "serve" / "laptop.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    world = config["applications"][0]["deployments"][0]["user_config"]["knowledge_bases"]["world"]
    world["uri"] = str(tmp_path / "capitals")
    file = tmp_path / "serve.yaml"

    def deploy() -> None:
        file.write_text(yaml.safe_dump(config))
        command = [str(BIN / "serve"), "deploy", "--address", cluster["RAY_API_SERVER_ADDRESS"], str(file)]
        done = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(http: httpx.Client) -> str:
        answer = http.post("/v1/chat/completions", json=question_body(QUESTION, "world"))
        return text_of(answer) if answer.status_code == 200 else f"{answer.status_code} {answer.text}"

    def replica_processes(http: httpx.Client) -> set[str]:
        lines = http.get("/metrics").text.splitlines()
        return {line.partition('process="')[2].partition('"')[0] for line in lines if line.startswith("kblam_process")}

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        deploy()
        eventually(lambda: "Mombasa" in ask(http), "an answer", 200)
        eventually(lambda: len(replica_processes(http)) == 3, "reports of all processes")
        processes = replica_processes(http)
        # A rollback is one line of the file.
        world["version"] = 0
        deploy()
        eventually(lambda: ask(http) == ANSWER, "the older version")
        assert http.get("/v1/knowledge_bases/world").json()["pinned"]
        assert replica_processes(http) == processes
        del world["version"]
        deploy()
        eventually(lambda: "Mombasa" in ask(http), "the newest version")


def test_a_job_submitted_to_a_cluster_leaves_nothing_behind(cluster, tmp_path):
    make_kb(tmp_path)
    port = free_port()
    ray = [str(BIN / "ray"), "job"]
    entrypoint = ["python", "jobs/serve.py", "--kb", str(tmp_path / "capitals"), "--port", str(port)]
    submitted = f"serve-{uuid.uuid4().hex[:8]}"

    def run(*command: str) -> str:
        done = subprocess.run(
            [*ray, *command], env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        return done.stdout + done.stderr

    def submit() -> bool:
        # A head listens before the agent that runs its jobs is up.
        told = run("submit", "--no-wait", "--submission-id", submitted, "--working-dir", ".", "--", *entrypoint)
        return "submitted successfully" in told or "already exists" in told

    eventually(submit, "a job that is taken", 120)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
        eventually(lambda: http.get("/health").status_code == 200, "an answer", 200)
        assert text_of(http.post("/v1/chat/completions", json=question_body(QUESTION, grounding="verbatim"))) == ANSWER
        slow = question_body(QUESTION, grounding="off", temperature=2.0, max_tokens=400, n=8, stream=True)
        said: list[str] = []

        def ask() -> None:
            with http.stream("POST", "/v1/chat/completions", json=slow) as answer:
                said.extend(filter(None, answer.iter_lines()))

        asking = threading.Thread(target=ask)
        asking.start()
        # Metrics are a second old: by then the answer may be over.
        eventually(lambda: said, "an answer that has begun")
        run("stop", submitted)
        asking.join(60)
        assert said[-1] == "data: [DONE]"
    status = [str(BIN / "serve"), "status", "--address", cluster["RAY_API_SERVER_ADDRESS"]]

    def is_gone() -> bool:
        done = subprocess.run(status, env=cluster, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode == 0 and "kblam-ray" not in done.stdout

    eventually(is_gone, "an application that is gone", 90)
