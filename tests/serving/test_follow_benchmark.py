"""`jobs/benchmark.py follow`: what it takes for exact and for wrong, and a whole run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.errors import BadRowError, GenerationError
from kblam_ray.serving.benchmark import FollowBenchmark, follow
from kblam_ray.serving.benchmark.clients import Answered
from kblam_ray.serving.benchmark.follow import Followed, Followup, _edition, _judged
from tests.jobs.running import run_job


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    """Files of two entities, and a table in step with them."""
    followed = Followed(tmp_path)
    followed.put("Kenya", [Fact("Kenya", "capital", "Nairobi"), Fact("Kenya", "continent", "Africa")])
    followed.put("Peru", [Fact("Peru", "capital", "Lima")])
    KnowledgeBase.create(followed.kb, "hashing:16").write([(*name, value) for name, value in followed.wanted.items()])
    return followed


def answer(version: int, *cited: tuple[str, str, str]) -> Answered:
    citations = [dict(zip(("entity", "property", "value"), fact, strict=True)) for fact in cited]
    return Answered("What?", "It.", version, False, citations, 0.1, 0.1)


def test_files_say_what_is_wanted(followed):
    assert followed.at(followed.newest()) == followed.wanted
    followed.put("Kenya", [Fact("Kenya", "capital", "Mombasa")])
    assert followed.wanted == {("Kenya", "capital"): "Mombasa", ("Peru", "capital"): "Lima"}
    followed.put("Peru", [])
    (file,) = followed.inputs.iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"entity": "Kenya", "property": "capital", "value": "Mombasa"}
    ]
    assert followed.at(followed.newest()) != followed.wanted


def test_a_citation_must_be_a_fact_of_the_version_that_the_answer_names(followed):
    before = followed.newest()
    after = KnowledgeBase.open(followed.kb).upsert([("Peru", "capital", "Cusco")])
    told = [
        (before, answer(before, ("Peru", "capital", "Lima"))),
        (before, answer(after, ("Peru", "capital", "Cusco"), ("Kenya", "capital", "Nairobi"))),
    ]
    found = _judged(told, followed)
    assert (found["citations_of_other_versions"], found["answers_older_than_served"]) == (0, 0)
    wrong = [
        (before, answer(after, ("Peru", "capital", "Lima"))),
        (after, answer(before, ("Peru", "capital", "Cusco"))),
    ]
    found = _judged([*told, *wrong], followed)
    assert (found["answers"], found["citations"], found["citations_of_other_versions"]) == (4, 5, 2)
    assert found["answers_older_than_served"] == 1
    assert "Lima" in found["wrong"][0]


def test_an_answer_that_does_not_come_ends_the_benchmark(followed, monkeypatch):
    async def fail(*_: object) -> None:
        raise GenerationError("status 503", where="a question", help="see the server's log")

    monkeypatch.setattr(follow, "_ask", fail)
    monkeypatch.setattr(Followed, "until_served", lambda self, since_s: Followup(0.0, 0.0))
    editions = {"Kenya": [Fact("Kenya", "capital", "Nairobi")]}, {"Kenya": [Fact("Kenya", "capital", "Mombasa")]}
    with pytest.raises(GenerationError):
        follow._become(FollowBenchmark(edition=["a", "b"]), followed, *editions)


def test_an_edition_with_a_bad_row_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"entity": "Kenya"}\n')
    with pytest.raises(BadRowError):
        _edition(str(tmp_path / "bad.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_editions_are_followed_exactly_while_clients_ask(tmp_path):
    rows = [(f"Country {n}", name, f"{name} {n}") for n in range(12) for name in ("capital", "currency")]
    later = [(e, p, f"{v} new" if e.endswith("3") else v) for e, p, v in rows[2:]] + [("Country 20", "capital", "C20")]
    for name, edition in {"old": rows, "new": later}.items():
        lines = [json.dumps({"entity": e, "property": p, "value": v}) for e, p, v in edition]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    flags = [f"--edition={tmp_path}/old.jsonl", f"--edition={tmp_path}/new.jsonl", "--changes=2", "--once=1"]
    code, found, stderr = run_job("benchmark", "follow", *flags, "--steps=2", "--clients=2")
    assert code == 0, stderr
    assert found["is_exact"]
    (edition,) = found["editions"]
    assert (edition["facts_added"], edition["facts_changed"], edition["facts_deleted"]) == (1, 2, 2)
    assert edition["steps"]["count"] == 2
    assert edition["answers"] > 0
    assert edition["citations_of_other_versions"] == edition["answers_older_than_served"] == 0
    assert (found["watched"]["count"], found["a_refresh_for_each"]["count"]) == (2, 1)
