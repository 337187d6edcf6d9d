"""jobs/evaluate.py: as a process, its parts in this one."""

from __future__ import annotations

import csv
import json
import signal
import sys
import time

import pyarrow.parquet as pq
import pytest
from model_samples import FACTS, make_kb, save_base, tiny_adapter, tiny_llama
from running import run_job, start_job

from jobs import evaluate
from kblam_ray.errors import EncoderMismatchError, InputError, MissingDependencyError, StorageError
from kblam_ray.evaluation import job, sources
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.evaluation.sweep import run
from kblam_ray.job import parse
from kblam_ray.model import KnowledgeModel
from kblam_ray.table import KnowledgeBase

QUESTION = "What is the capital of Peru?"
SMALL = {"num_questions": 2, "max_new_tokens": 3, "device": "cpu"}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Embedding in this process, though other tests of the session may have started Ray."""
    monkeypatch.setattr(sources, "_ray_runs", lambda: False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_adapter(tiny_llama(), "shared", question_prior=20.0).save_pretrained(str(folder / "adapter"))
    return {
        "base_model": save_base(folder / "base"),
        "adapter": [str(folder / "adapter")],
        "kb": [make_kb(folder / "kb").uri],
    }


def evaluated(parts, **settings):
    given = {**parts, **SMALL, **settings}
    return evaluate.evaluate(EvaluateSettings(**{name: value for name, value in given.items() if value is not None}))


def flags_of(parts, **settings):
    given = {**parts, **SMALL, **settings}
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return [f"--{name.replace('_', '-')}={one}" for name, value in lists.items() for one in value]


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def test_the_job_as_a_process(parts, tmp_path):
    output = tmp_path / "found"
    code, summary, stderr = run_job(
        "evaluate",
        *flags_of(parts, num_facts=[4, 6], kinds=["simple", "unanswerable"], grounding=["off"], baseline=["cosine"]),
        "--no-prior",
        f"--output={output}",
    )
    assert (code, summary["ok"], summary["job"]) == (0, True, "evaluate"), stderr
    assert (summary["num_units"], summary["num_resumed"], summary["num_questions"]) == (2, 0, 4)
    ways = [(found["num_facts"], found["system"]) for found in summary["results"]]
    assert ways == [(size, way) for size in (4, 6) for way in ("attention alone", "attention alone, off", "cosine")]
    assert "attention alone: 2 of 2 questions" in stderr
    written = summary_of(output)
    sizes = [unit["size"] for unit in written["units"]]
    assert [size["num_facts"] for size in sizes] == [4, 6]
    assert summary["results"][0]["retrieval_at_1"] == sizes[0]["results"][0]["retrieval"]["all"]["@1"]["value"]
    assert summary["results"][1]["exact_match"] == sizes[0]["results"][1]["answers"]["all"]["exact_match"]["value"]
    assert written["settings"]["num_facts"] == [4, 6]
    assert "jobs/evaluate.py --base-model=" in written["environment"]["command"]
    rows = pq.read_table(output / "rows.parquet").to_pylist()
    assert len(rows) == 2 * 3 * 2
    assert {row["num_facts"] for row in rows} == {4, 6}
    assert "Retrieval @1" in (output / "report.md").read_text()
    assert summary["report"] == str(output / "report.html")
    assert (output / "report.html").read_text().startswith("<!")
    assert list((output / "plots").glob("*.png"))


def swept_settings(parts, tmp_path, output):
    with (tmp_path / "cities.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("entity", "property", "value"), *FACTS])
    ways = {"num_facts": [4, 6], "selection": ["all", "similar:2"], "grounding": ["off"], "baseline": ["cosine"]}
    source = {"kb": [], "input": [str(tmp_path / "cities.csv")]}
    return {**parts, **source, **ways, "kinds": ["simple"], "output": str(output)}


def units_done(output):
    return len(list((output / "units").glob("*/summary.json")))


def kill_when(job, is_time):
    """SIGKILL a job as soon as something is so, without a chance to end in order."""
    until = time.monotonic() + 200
    while not is_time() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()


@pytest.mark.parametrize(
    "num_done", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 2, 3))], ids="after {}".format
)
def test_a_job_that_is_killed_is_finished_by_the_same_command(parts, tmp_path, num_done):
    """After a number of units; after none, while the facts are embedded."""
    output, whole = tmp_path / "killed", tmp_path / "whole"
    given = swept_settings(parts, tmp_path, output)
    kill_when(
        start_job("evaluate", *flags_of(given)), lambda: (output / "tables").exists() and units_done(output) >= num_done
    )
    assert not (output / "summary.json").exists()
    num_kept = units_done(output)
    assert num_done <= num_kept < 4
    found = evaluated(given)
    assert (found["num_units"], found["num_resumed"]) == (4, num_kept)
    evaluated({**given, "output": str(whole)})
    assert summary_of(output)["units"] == summary_of(whole)["units"]
    assert pq.read_table(output / "rows.parquet") == pq.read_table(whole / "rows.parquet")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_done", [0, 2])
def test_a_job_on_ray_that_is_killed_is_finished(parts, tmp_path, num_done):
    output, whole = tmp_path / "killed", tmp_path / "whole"
    given = {**swept_settings(parts, tmp_path, output), "num_workers": 2, "cost": [6], "interference": [0]}
    kill_when(
        start_job("evaluate", *flags_of(given)), lambda: (output / "tables").exists() and units_done(output) >= num_done
    )
    code, summary, stderr = run_job("evaluate", *flags_of(given))
    assert (code, summary["num_units"]) == (0, 6), stderr
    assert summary["num_resumed"] >= num_done
    code, _, stderr = run_job("evaluate", *flags_of({**given, "output": str(whole)}))
    assert code == 0, stderr
    found = [[unit for unit in summary_of(at)["units"] if unit["part"] != "cost"] for at in (output, whole)]
    assert found[0] == found[1]
    assert pq.read_table(output / "rows.parquet") == pq.read_table(whole / "rows.parquet")


def test_one_question(parts):
    summary = evaluated(parts, question=QUESTION)
    model = KnowledgeModel.from_pretrained(parts["base_model"], parts["adapter"][0], device="cpu")
    memory = model.load(parts["kb"][0])
    expected = model.ask(QUESTION, memory, max_new_tokens=3).to_json()
    assert summary == expected
    assert (summary["kb_version"], len(summary["citations"])) == (0, 5)
    similar = model.ask(QUESTION, memory, max_new_tokens=3, selection="similar:2").to_json()
    assert evaluated(parts, question=QUESTION, selection=["similar:2"]) == similar
    model.adapter.configure(kb_scale=7.0)
    scaled = model.ask(QUESTION, memory, max_new_tokens=3).to_json()
    assert scaled != expected
    assert evaluated(parts, question=QUESTION, kb_scale=[7]) == scaled
    model.adapter.configure(question_prior=0.0, kb_scale=100)
    alone = model.ask(QUESTION, memory, max_new_tokens=3).to_json()
    assert evaluated(parts, question=QUESTION, prior=False) == alone
    assert evaluated(parts, question=QUESTION, grounding=["off"])["citations"] == []


def test_own_questions(parts, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"question": QUESTION, "entity": "Peru", "property": "capital"}, {"question": "Zorro?", "value": None}]
    path.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "found"
    summary = evaluated(parts, questions=str(path), output=str(output), retrieval_only=True)
    assert summary["num_questions"] == 2
    (unit,) = summary_of(output)["units"]
    assert (unit["size"]["num_facts"], unit["size"]["num_questions"]) == (len(FACTS), {"own": 2})
    found = {part["system"]: part for part in summary["results"]}
    # The letters of the question lead to the fact, without any training.
    assert found["attention with prior"]["retrieval_at_1"] == 1


def test_synthetic_facts_are_embedded_once(parts, tmp_path, monkeypatch):
    given = {**parts, "kb": None, "synthetic": 32, "output": str(tmp_path / "found"), "retrieval_only": True}
    first = evaluated(given, kinds=["simple"], prior=True, baseline=[])
    ((kb,),) = summary_of(tmp_path / "found")["sources"].values()
    assert kb["uri"].startswith(str(tmp_path / "found" / "tables" / "synthetic-32-"))
    assert KnowledgeBase.open(kb["uri"]).num_facts == 32
    monkeypatch.setattr(KnowledgeBase, "create", None)
    again = evaluated(given, kinds=["simple"], prior=True, baseline=[])
    assert again == {**first, "num_resumed": 1}


def test_names_of_adapters_and_tables(parts, tmp_path):
    given = {"adapter": [f"mine={parts['adapter'][0]}"], "kb": [f"world={parts['kb'][0]}"], "baseline": []}
    summary = evaluated(parts, **given, kinds=["simple"], retrieval_only=True, prior=True, output=str(tmp_path))
    assert {(found["candidate"], found["source"]) for found in summary["results"]} == {("mine", "world")}
    with pytest.raises(InputError, match="two of the name 'adapter'"):
        evaluated(parts, adapter=[*parts["adapter"], "other/adapter"], output=str(tmp_path))


def test_a_table_without_the_adapters_encoder(parts, tmp_path):
    other = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:32")
    other.upsert([{"entity": "Peru", "property": "capital", "value": "Lima"}])
    for settings in ({"question": QUESTION}, {"output": str(tmp_path / "found")}):
        with pytest.raises(EncoderMismatchError):
            evaluated(parts, kb=[other.uri], **settings)
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--output=x"], "--kb, --input or --synthetic"),
        (["--kb=x", "--synthetic=5", "--kb-version=1", "--output=x"], "of one table"),
        (["--kb=x"], "--output"),
        (["--kb=x", "--adapter=a", "--output=x"], "--base-model and --adapter"),
        (["--kb=x", "--question=q", "--questions=f"], "--question or --questions"),
        (["--kb=x", "--kb=y", "--question=q"], "one table"),
        (["--kb=x", "--question=q", "--selection=all", "--selection=similar:2"], "one selection"),
        (["--kb=x", "--question=q", "--grounding=off", "--grounding=cite"], "one grounding"),
        (["--kb=x", "--questions=f", "--num-facts=5", "--output=x"], "all the facts"),
        (["--kb=x", "--kb=y", "--questions=f", "--output=x"], "one knowledge base"),
        (["--kb=x", "--num-facts=0", "--output=x"], "num_facts 0"),
        (["--kb=x", "--selection=nearest", "--output=x"], "similar:K"),
        (["--kb=x", "--kb-scale=0", "--output=x"], "larger than 0"),
        (["--kb=x", "--kb-scale=nan", "--output=x"], "finite number"),
        (["--kb=x", "--question=q", "--num-facts=5"], "all the facts"),
        (["--kb=x", "--entities=trained", "--output=x"], "--held-out"),
        (["--kb=x", "--kinds=unanswerable", "--output=x"], "has an answer"),
        (["--kb=x", "--kinds=hard", "--output=x"], "--kinds"),
        (["--kb=x", "--baseline=elastic", "--output=x"], "--baseline"),
    ],
)
def test_settings_that_do_not_fit_each_other(flags, error):
    with pytest.raises(InputError, match=error):
        parse("evaluate", EvaluateSettings, flags)


def test_wrong_input_comes_before_the_model(parts, tmp_path):
    with pytest.raises(InputError, match="there is no table"):
        evaluated(parts, kb=[str(tmp_path / "none")], base_model="/nothing", question=QUESTION)
    with pytest.raises(InputError, match="cannot read the questions"):
        evaluated(parts, base_model="/nothing", questions=str(tmp_path / "none"), output=str(tmp_path / "found"))
    with pytest.raises(InputError, match="7 facts of 6"):
        evaluated(parts, base_model="/nothing", num_facts=[7], output=str(tmp_path / "found"))


def test_a_place_that_cannot_be_written_is_found_before_the_evaluation(parts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "do_here", None)
    with pytest.raises(StorageError):
        evaluated(parts, output=str(tmp_path / "file" / "found"))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_what_the_report_needs_is_missed_before_the_evaluation(parts, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(job, "sweep", None)
    with pytest.raises(MissingDependencyError, match=package):
        evaluated(parts, output=str(tmp_path))
