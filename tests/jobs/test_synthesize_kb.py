"""synthesize_kb end to end on Ray: templates in shards, and a chat model asked only for what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kblam_ray.errors import ChatAnswerError, ChatAuthenticationError, ChatError, InputError
from kblam_ray.facts import Fact, expand_inputs, read_facts
from kblam_ray.facts.reading import FactRow
from kblam_ray.facts.synthetic import SyntheticFacts, run
from kblam_ray.facts.synthetic.recipe import IDEA_TYPES, OBJECT_TYPES, Recipe
from kblam_ray.facts.synthetic.run import SynthesizeSettings, synthesize
from tests.openai_chat_server import Reply, chat_server

ROOT = Path(__file__).parents[2]


def make(**settings: Any) -> dict[str, Any]:
    return synthesize(SynthesizeSettings(**settings))


def read(uri: str) -> list[Fact]:
    rows = [row for file in expand_inputs([uri]) for row in read_facts(file)]
    assert all(isinstance(row, FactRow) for row in rows), rows
    return [row.fact for row in rows if isinstance(row, FactRow)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["facts.jsonl", "facts.parquet", "facts"])
def test_templates_fill_a_file_or_a_directory(tmp_path: Path, name: str) -> None:
    summary = make(output=str(tmp_path / name), num_facts=1_003, seed=4)
    expected = list(SyntheticFacts(4).facts(0, 1_003))
    assert read(summary["output"]) == expected
    assert summary["num_facts"] == 1_003
    assert summary["num_entities"] == len({fact.entity for fact in expected})
    assert summary["num_properties"] == len({fact.property for fact in expected})


@pytest.mark.usefixtures("ray_session")
def test_a_shorter_output_leaves_no_parts_of_a_longer_one(tmp_path: Path) -> None:
    target = tmp_path / "facts"
    make(output=str(target), num_facts=run.SHARD_FACTS + 5)
    assert sorted(path.name for path in target.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    make(output=str(target), num_facts=50)
    assert len(read(str(target))) == 50


@pytest.mark.usefixtures("ray_session")
def test_questions_name_rows_of_the_output(tmp_path: Path) -> None:
    summary = make(
        output=str(tmp_path / "f.jsonl"), num_facts=7_000, questions=str(tmp_path / "q.jsonl"), num_questions=301
    )
    facts = read(summary["output"])
    questions = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(questions) == summary["num_questions"] == 301
    for question in questions:
        assert [facts[number].value for number in question["facts"]] == question["values"]
    assert max(number for question in questions for number in question["facts"]) > 6_000
    pairs = {(fact.entity, fact.property) for fact in facts}
    unanswerable = [question for question in questions if question["kind"] == "unanswerable"]
    assert unanswerable
    assert not any(tuple(question["asked"][0]) in pairs for question in unanswerable)


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    with pytest.raises(InputError, match=r"the output directory holds thesis\.doc"):
        make(output=str(tmp_path / "mine"))
    with pytest.raises(InputError, match="an unknown kind of output"):
        make(output=str(tmp_path / "facts.docx"))
    with pytest.raises(InputError, match="questions are JSON Lines"):
        make(output=str(tmp_path / "f.jsonl"), questions=str(tmp_path / "q.csv"))


def entities(numbers: Any) -> Callable[[dict[str, Any]], Reply]:
    """A model that invents two new entities at a time."""

    def respond(request: dict[str, Any]) -> Reply:
        made = []
        for _ in range(2):
            n = next(numbers)
            made.append({"name": f"Zed {n}", "description": f"d {n}", "objectives": f"o {n}", "purpose": f"p {n}"})
        return Reply(json.dumps({"entities": made}))

    return respond


def test_the_recipe_has_its_themes() -> None:
    assert len(set(OBJECT_TYPES)) == len(set(IDEA_TYPES)) == 30
    recipe = Recipe(SynthesizeSettings(output="x", chat_model="m"), 3, 5)
    units = [recipe.unit(number) for number in range(1_000)]
    assert len({unit["key"] for unit in units}) == 1_000
    assert len({unit["question"].split(". ")[0] for unit in units[:900]}) == 900
    assert Recipe(SynthesizeSettings(output="x", chat_model="m2"), 3, 5).unit(0)["key"] != units[0]["key"]


@pytest.mark.usefixtures("ray_session")
def test_a_chat_model_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    with chat_server(entities(count())) as server:
        settings = {
            "generator": "openai",
            "chat_model": "m",
            "chat_url": server.url,
            "entities_per_request": 2,
            "output": str(tmp_path / "f.jsonl"),
        }
        first = make(num_facts=30, **settings)
        assert len(server.requests) == 5
        again = make(num_facts=30, **settings)
        assert len(server.requests) == 5
        more = make(num_facts=41, questions=str(tmp_path / "q.jsonl"), num_questions=20, **settings)
    assert len(server.requests) == 7
    assert (first["num_facts"], first["num_entities"], first["num_properties"], first["tokens"]) == (30, 10, 3, 600)
    assert (again["requests_reused"], more["requests_reused"], more["num_facts"]) == (5, 5, 41)
    assert len(read(more["output"])) == 41
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 20
    assert {fact.property for fact in read(more["output"])} == {"description", "objectives", "purpose"}


@pytest.mark.usefixtures("ray_session")
def test_faults_bad_answers_and_repeated_entities(tmp_path: Path) -> None:
    turn = count()
    good = entities(count())
    faults = {
        0: Reply(status=429, headers={"Retry-After": "0"}),
        1: Reply(status=500, headers={"retry-after-ms": "1"}),
        2: Reply("not JSON"),
        3: Reply('{"entities": []}'),
        4: Reply(drop=True),
    }
    twice = {"name": "zed 0", "description": "d", "objectives": "o", "purpose": "p"}
    faults[6] = Reply(json.dumps({"entities": [twice]}))

    def respond(request: dict[str, Any]) -> Reply:
        return faults.get(next(turn)) or good(request)

    with chat_server(respond) as server:
        summary = make(
            generator="openai", chat_model="m", chat_url=server.url, entities_per_request=2, num_facts=24,
            output=str(tmp_path / "f.jsonl"), chat_concurrency=1, num_workers=1,
        )  # fmt: skip
    facts = read(summary["output"])
    assert len({(fact.entity.casefold(), fact.property) for fact in facts}) == len(facts) == 24
    assert summary["answers_repeated"] == 2
    assert summary["duplicates"] == 3


@pytest.mark.usefixtures("ray_session")
def test_answers_that_never_become_valid_fail_the_job_or_are_counted(tmp_path: Path) -> None:
    good = entities(count())

    def respond(request: dict[str, Any]) -> Reply:
        return Reply("never") if "bakery" in request["messages"][1]["content"] else good(request)

    with chat_server(respond) as server:
        settings = {
            "generator": "openai",
            "chat_model": "m",
            "chat_url": server.url,
            "entities_per_request": 2,
            "num_facts": 300,
            "output": str(tmp_path / "f.jsonl"),
        }
        with pytest.raises(ChatAnswerError, match="in 3 attempts"):
            make(**settings)
        assert not (tmp_path / "f.jsonl").exists()
        before = len(server.requests)
        summary = make(on_error="skip", **settings)
        assert summary["requests_failed"] >= 1
        assert summary["num_facts"] == 300
        assert len(server.requests) - before < 30, "finished answers must be kept when others fail"


@pytest.mark.usefixtures("ray_session")
def test_an_endpoint_that_fails_or_brings_nothing_new(tmp_path: Path) -> None:
    settings = {"generator": "openai", "chat_model": "m", "num_facts": 30, "output": str(tmp_path / "f.jsonl")}
    with (
        chat_server(lambda request: Reply(status=401)) as server,
        pytest.raises(ChatAuthenticationError, match="refused the credentials"),
    ):
        make(chat_url=server.url, **settings)
    with (
        chat_server(lambda request: Reply(status=500, headers={"retry-after-ms": "1"})) as server,
        pytest.raises(ChatError, match="no answer after 1 retries"),
    ):
        make(chat_url=server.url, chat_retries=1, **settings)
    same = {"name": "Zed", "description": "d", "objectives": "o", "purpose": "p"}
    with (
        chat_server(lambda request: Reply(json.dumps({"entities": [same]}))) as server,
        pytest.raises(ChatAnswerError, match=r"brought no new fact \(3 of 30"),
    ):
        make(chat_url=server.url, **settings)


@pytest.mark.slow
def test_a_killed_job_keeps_what_was_finished(tmp_path: Path) -> None:
    """The model answers four requests and holds the rest; the driver is killed; a rerun asks for the rest only."""
    gate, held, turn = threading.Event(), threading.Event(), count()
    good = entities(count())

    def respond(request: dict[str, Any]) -> Reply:
        reply = good(request)
        if next(turn) >= 4 and not gate.is_set():
            held.set()
            reply.hang = gate
        return reply

    with chat_server(respond) as server:
        command = [
            sys.executable, str(ROOT / "jobs" / "synthesize_kb.py"), "--generator", "openai", "--chat-model", "m",
            "--chat-url", server.url, "--entities-per-request", "2", "--num-facts", "60", "--num-workers", "1",
            "--chat-concurrency", "1", "--output", str(tmp_path / "f.jsonl"),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            assert held.wait(200)
            os.kill(job.pid, signal.SIGKILL)
        stored = len(list((tmp_path / ".f.jsonl.units").glob("*.json")))
        assert stored == 4
        assert not (tmp_path / "f.jsonl").exists()
        gate.set()
        before = len(server.requests)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["ok"] is True
    assert summary["requests_reused"] >= 4
    assert len(server.requests) - before <= 6
    assert len(read(str(tmp_path / "f.jsonl"))) == 60
