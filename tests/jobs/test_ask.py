"""jobs/ask.py as a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_samples import FACTS, make_kb, save_base, tiny_adapter, tiny_llama
from running import run_job

from jobs import ask
from kblam_ray.demo import shipped
from kblam_ray.errors import EncoderMismatchError, InputError
from kblam_ray.model import KnowledgeModel, write_bundle
from kblam_ray.table import KnowledgeBase

QUESTION = "What is the capital of Peru?"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask")
    tiny_adapter(tiny_llama()).save_pretrained(str(folder / "adapter"))
    kb = make_kb(folder / "kb")
    kb.delete([("Ur", "founder")])
    return {
        "--base-model": save_base(folder / "base"),
        "--adapter": str(folder / "adapter"),
        "--kb": kb.uri,
    }


def flags(parts, **others):
    given = {**parts, **{"--" + name.replace("_", "-"): str(value) for name, value in others.items()}}
    return [part for flag in given.items() for part in flag]


def test_an_answer(parts):
    code, summary, _ = run_job("ask", *flags(parts, question=QUESTION, max_citations=2, max_new_tokens=5, device="cpu"))
    assert (code, summary["ok"], summary["job"]) == (0, True, "ask")
    model = KnowledgeModel.from_pretrained(parts["--base-model"], parts["--adapter"], device="cpu")
    memory = model.load(parts["--kb"])
    expected = model.ask(QUESTION, memory, max_citations=2, max_new_tokens=5)
    assert summary["text"] == expected.text
    assert summary["refused"] is False
    assert summary["kb_version"] == 1
    assert [citation["fact_id"] for citation in summary["citations"]] == [
        str(citation.fact_id) for citation in expected.citations
    ]
    cited = summary["citations"][0]
    assert set(cited) == {"fact_id", "entity", "property", "value", "metadata", "score"}
    assert (cited["entity"], cited["property"], cited["value"]) in FACTS


def test_a_bundle_an_older_version_and_a_selection(parts, tmp_path):
    write_bundle(tmp_path / "bundle", parts["--base-model"], parts["--adapter"], parts["--kb"])
    bundle = {"--bundle": str(tmp_path / "bundle"), "--question": QUESTION}
    code, summary, _ = run_job("ask", *flags(bundle, selection="similar:1", kb_version=0, max_new_tokens=3))
    assert code == 0
    assert summary["kb_version"] == 0
    assert [(fact["entity"], fact["property"]) for fact in summary["citations"]] == [("Peru", "capital")]


def test_a_plan_loads_nothing(parts, tmp_path):
    settings = {flag.strip("-").replace("-", "_"): value for flag, value in parts.items()}
    summary = ask.ask(ask.AskSettings(**settings, plan=True, form="materialized", dtype="bfloat16"))
    assert summary["plan"]["num_facts"] == len(FACTS) - 1
    assert summary["plan"]["base_parameters"] == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert "text" not in summary
    other = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:32")
    other.upsert([{"entity": "Peru", "property": "capital", "value": "Lima"}])
    with pytest.raises(EncoderMismatchError):
        ask.ask(ask.AskSettings(**{**settings, "kb": other.uri}, plan=True))


@pytest.mark.parametrize(
    ("left_out", "others", "error"),
    [
        (["--adapter"], {}, "--adapter not given"),
        (["--kb"], {}, "--kb not given"),
        ([], {"question": None}, "--question not given"),
        ([], {"selection": "best:3"}, "best:3"),
        ([], {"bundle": "somewhere"}, "a bundle and"),
        ([], {"kb_version": 7}, "version"),
        ([], {"adapter": "/nothing/there"}, "no such folder"),
        ([], {"base_model": "/nothing/there", "kb": "/nothing/kb"}, "there is no table"),  # before anything large
    ],
)
def test_wrong_input_is_named(parts, left_out, others, error):
    given = {flag: value for flag, value in parts.items() if flag not in left_out}
    settings = {flag.strip("-").replace("-", "_"): value for flag, value in given.items()}
    with pytest.raises(InputError, match=error):
        ask.ask(ask.AskSettings(**{**settings, "question": QUESTION, "device": "cpu", **others}))


def test_without_a_model_the_demos_answers(parts, monkeypatch):
    monkeypatch.setattr(shipped, "BASE_MODEL", Path(parts["--base-model"]))
    monkeypatch.setattr(shipped, "ADAPTER", Path(parts["--adapter"]))
    settings = ask.AskSettings(kb=parts["--kb"], question=QUESTION, grounding="off", max_new_tokens=4, device="cpu")
    named = settings.model_copy(update={"base_model": parts["--base-model"], "adapter": parts["--adapter"]})
    assert ask.ask(settings) == ask.ask(named)
    planned = ask.ask(ask.AskSettings(kb=parts["--kb"], plan=True))
    assert planned["plan"]["num_facts"] == len(FACTS) - 1


def test_a_verbatim_answer(parts):
    settings = {flag.strip("-").replace("-", "_"): value for flag, value in parts.items()}
    given = {"question": QUESTION, "grounding": "verbatim", "selection": "similar:1", "max_new_tokens": 4}
    summary = ask.ask(ask.AskSettings(**settings, **given, device="cpu"))
    assert (summary["text"], summary["refused"], summary["kb_version"]) == ("The capital of Peru is Lima.", False, 1)
    (cited,) = summary["citations"]
    assert set(cited) == {"fact_id", "entity", "property", "value", "metadata", "score"}
    assert (cited["entity"], cited["value"], type(cited["fact_id"])) == ("Peru", "Lima", str)


def test_wrong_input_is_the_summary(parts):
    code, summary, _ = run_job("ask", "--question", QUESTION)
    assert (code, summary["ok"], summary["error"]["code"]) == (2, False, "bad_input")
