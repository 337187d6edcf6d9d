"""jobs/evaluate.py: as a process once, its parts in this one."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from model_samples import FACTS, make_kb, save_base, tiny_adapter, tiny_llama
from running import run_job

from jobs import evaluate
from kblam_ray.errors import EncoderMismatchError, InputError, StorageError
from kblam_ray.evaluation import job
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.job import parse
from kblam_ray.model import KnowledgeModel
from kblam_ray.table import KnowledgeBase

QUESTION = "What is the capital of Peru?"
SMALL = {"num_questions": 2, "max_new_tokens": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_adapter(tiny_llama(), "shared", question_prior=20.0).save_pretrained(str(folder / "adapter"))
    return {
        "base_model": save_base(folder / "base"),
        "adapter": str(folder / "adapter"),
        "kb": make_kb(folder / "kb").uri,
    }


def evaluated(parts, **settings):
    given = {**parts, **SMALL, **settings}
    return evaluate.evaluate(EvaluateSettings(**{name: value for name, value in given.items() if value is not None}))


def test_the_job_as_a_process(parts, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**parts, **SMALL}.items()]
    output = tmp_path / "found"
    code, summary, stderr = run_job(
        "evaluate", *flags, "--num-facts=4", "--num-facts=6", "--kinds=simple", "--kinds=unanswerable",
        "--grounding=off", "--no-prior", "--baseline=cosine", f"--output={output}",
    )  # fmt: skip
    assert (code, summary["ok"], summary["job"]) == (0, True, "evaluate"), stderr
    assert (summary["kb"], summary["kb_version"], summary["kind"]) == (parts["kb"], 0, "shared")
    assert [size["num_facts"] for size in summary["sizes"]] == [4, 6]
    ways = [(found["system"], found["prior"], found["grounding"]) for found in summary["sizes"][1]["results"]]
    assert ways == [("attention", False, None), ("attention", False, "off"), ("cosine", None, None)]
    assert "attention alone: 2 of 2 questions" in stderr
    written = json.loads((output / "summary.json").read_text())
    assert written["sizes"] == summary["sizes"]
    assert written["settings"]["num_facts"] == [4, 6]
    rows = pq.read_table(output / "rows.parquet").to_pylist()
    assert len(rows) == 2 * 3 * 2
    assert {row["num_facts"] for row in rows} == {4, 6}
    assert "Retrieval @1" in (output / "report.md").read_text()


def test_one_question(parts):
    summary = evaluated(parts, question=QUESTION)
    model = KnowledgeModel.from_pretrained(parts["base_model"], parts["adapter"], device="cpu")
    memory = model.load(parts["kb"])
    expected = model.ask(QUESTION, memory, max_new_tokens=3).to_json()
    assert summary == expected
    assert (summary["kb_version"], len(summary["citations"])) == (0, 5)
    model.adapter.configure(question_prior=0.0)
    alone = model.ask(QUESTION, memory, max_new_tokens=3).to_json()
    assert evaluated(parts, question=QUESTION, prior=False) == alone
    assert evaluated(parts, question=QUESTION, grounding=["off"])["citations"] == []


def test_own_questions(parts, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"question": QUESTION, "entity": "Peru", "property": "capital"}, {"question": "Zorro?", "value": None}]
    path.write_text("\n".join(map(json.dumps, lines)))
    summary = evaluated(parts, questions=str(path), output=str(tmp_path / "found"), retrieval_only=True)
    (size,) = summary["sizes"]
    assert (size["num_facts"], size["num_questions"]) == (len(FACTS), {"own": 2})
    found = {(part["system"], part["prior"]): part for part in size["results"]}
    # The letters of the question lead to the fact, without any training.
    assert found["attention", True]["retrieval"]["all"]["@1"]["value"] == 1


def test_synthetic_facts_are_embedded_once(parts, tmp_path, monkeypatch):
    given = {**parts, "kb": None, "synthetic": 32, "output": str(tmp_path / "found"), "retrieval_only": True}
    first = evaluated(given, kinds=["simple"], prior=True, baseline=[])
    assert first["kb"].startswith(str(tmp_path / "found" / "synthetic-32-"))
    assert KnowledgeBase.open(first["kb"]).num_facts == 32
    monkeypatch.setattr(KnowledgeBase, "create", None)
    again = evaluated(given, kinds=["simple"], prior=True, baseline=[])
    assert again["sizes"] == first["sizes"]


def test_a_table_without_the_adapters_encoder(parts, tmp_path):
    other = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:32")
    other.upsert([{"entity": "Peru", "property": "capital", "value": "Lima"}])
    for settings in ({"question": QUESTION}, {"output": str(tmp_path / "found")}):
        with pytest.raises(EncoderMismatchError):
            evaluated(parts, kb=other.uri, **settings)
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--output=x"], "--kb or --synthetic"),
        (["--kb=x", "--synthetic=5", "--output=x"], "--kb or --synthetic"),
        (["--kb=x"], "--output"),
        (["--kb=x", "--adapter=a", "--output=x"], "--base-model and --adapter"),
        (["--kb=x", "--question=q", "--questions=f"], "--question or --questions"),
        (["--kb=x", "--question=q", "--grounding=off", "--grounding=cite"], "one grounding"),
        (["--kb=x", "--questions=f", "--num-facts=5", "--output=x"], "all the facts"),
        (["--kb=x", "--num-facts=0", "--output=x"], "num_facts 0"),
        (["--kb=x", "--kinds=unanswerable", "--output=x"], "has an answer"),
        (["--kb=x", "--kinds=hard", "--output=x"], "--kinds"),
        (["--kb=x", "--baseline=bm25", "--output=x"], "--baseline"),
    ],
)
def test_settings_that_do_not_fit_each_other(flags, error):
    with pytest.raises(InputError, match=error):
        parse("evaluate", EvaluateSettings, flags)


def test_wrong_input_comes_before_the_model(parts, tmp_path):
    with pytest.raises(InputError, match="there is no table"):
        evaluated(parts, kb=str(tmp_path / "none"), base_model="/nothing", question=QUESTION)
    with pytest.raises(InputError, match="cannot read the questions"):
        evaluated(parts, base_model="/nothing", questions=str(tmp_path / "none"), output=str(tmp_path / "found"))
    with pytest.raises(InputError, match="7 facts of 6"):
        evaluated(parts, num_facts=[7], output=str(tmp_path / "found"))


def test_a_place_that_cannot_be_written_is_found_before_the_evaluation(parts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(job, "evaluate", None)
    with pytest.raises(StorageError):
        evaluated(parts, output=str(tmp_path / "file" / "found"))
