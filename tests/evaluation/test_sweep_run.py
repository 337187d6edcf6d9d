"""A whole sweep: what it puts together, what it does again, and what it refuses before it begins."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
from model_samples import tiny_adapter, tiny_llama
from sweep_samples import SMALL, figures, make_parts, small, swept

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.errors import (
    AdapterError,
    BadRowError,
    EncoderMismatchError,
    InputError,
    StorageError,
    TableNotFoundError,
)
from kblam_ray.evaluation import sources
from kblam_ray.evaluation.cost import measure_cost
from kblam_ray.evaluation.interference import measure_interference
from kblam_ray.evaluation.outcomes import SCHEMA
from kblam_ray.evaluation.own_questions import OwnQuestion
from kblam_ray.evaluation.run import evaluate
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.evaluation.sweep import run, workers
from kblam_ray.evaluation.sweep import unit as units
from kblam_ray.evaluation.sweep.fingerprints import Candidate
from kblam_ray.evaluation.sweep.run import ROWS_SCHEMA, sweep
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.writing import write_facts
from kblam_ray.model import KnowledgeModel
from kblam_ray.table import KnowledgeBase
from kblam_ray.table.embedded import EmbeddedFacts


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Embedding in this process, though other tests of the session may have started Ray."""
    monkeypatch.setattr(sources, "_ray_runs", lambda: False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("sweep"))


SWEPT = {"num_facts": [6], "selection": ["all", "similar:2"], "kb_scale": [10, 100], "prior": True, "max_new_tokens": 1}


@pytest.fixture(scope="module")
def found(parts, tmp_path_factory):
    return swept(parts, tmp_path_factory.mktemp("found"), **SWEPT)


def test_a_unit_is_what_evaluating_it_alone_gives(parts, found):
    """Each with its own selection and C, baselines with all of them, whoever asked them."""
    model = KnowledgeModel.from_pretrained(parts["base_model"], parts["adapter"], device="cpu")
    facts = EmbeddedFacts.of(KnowledgeBase.open(parts["kb"]))
    assert (found.num_units, found.num_resumed) == (4, 0)
    first_row = 0
    for unit in found.summary["units"]:
        model.adapter.configure(kb_scale=unit["kb_scale"])
        alone = {name: value for name, value in SMALL.items() if name != "device"} | {"max_new_tokens": 1}
        num_facts = unit["size"]["num_facts"]
        asked = EvaluationSettings(**alone, num_facts=[num_facts], selection=unit["selection"], prior=True)
        evaluation = evaluate(model, facts, asked)
        assert {"sizes": [unit["size"]], "notes": unit["notes"]} == evaluation.summary()
        rows = found.rows.slice(first_row, len(evaluation.rows))
        first_row += len(rows)
        assert rows.select(SCHEMA.names).to_pylist() == evaluation.rows.to_pylist()
        labels = {"candidate": "tiny", "source": "kb", "entities": None}
        labels |= {"selection": unit["selection"], "kb_scale": unit["kb_scale"]}
        assert rows.select(list(labels)).to_pylist() == len(rows) * [labels]
    assert first_row == len(found.rows)
    assert found.rows.schema == ROWS_SCHEMA


def test_the_summary_says_what_was_measured_on_what(parts, found):
    summary = found.summary
    assert list(summary) == ["settings", "environment", "base_model", "candidates", "sources", "units", "notes"]
    assert summary["settings"]["kb_scale"] == [10, 100]
    config = KnowledgeAdapter.from_pretrained(parts["adapter"]).config
    assert summary["candidates"] == {
        "tiny": {
            "adapter": parts["adapter"],
            "kind": "shared",
            "encoder": config.encoder.model_dump(),
            "kb_layers": [0, 2],
            "num_layers": 4,
            "kb_scale": 100.0,
            "question_prior": 20.0,
            "refusal_threshold": None,
        }
    }
    assert summary["sources"] == {
        "kb": [{"uri": parts["kb"], "version": 0, "num_facts": 6, "encoder": config.encoder.model_dump()}]
    }
    environment = summary["environment"]
    assert {"version", "commit", "python", "torch", "transformers", "ray", "machine"} <= environment.keys()
    assert " GB, " in environment["machine"]
    assert len(summary["notes"]) == 1


def test_again_it_does_nothing_and_finds_the_same(parts, found, tmp_path, monkeypatch):
    first = swept(parts, tmp_path, num_facts=[4], prior=True, max_new_tokens=1)
    monkeypatch.setattr(workers, "do_unit", None)
    told = []
    again = swept(parts, tmp_path, num_facts=[4], prior=True, max_new_tokens=1, progress=told.append)
    assert (again.num_units, again.num_resumed) == (1, 1)
    assert (again.summary["units"], again.rows) == (first.summary["units"], first.rows)
    assert told == ["1 of 1 units were done by an earlier run"]


def test_more_of_a_sweep_does_what_is_missing(parts, tmp_path, monkeypatch):
    swept(parts, tmp_path, num_facts=[4], retrieval_only=True)
    done = []
    do_unit = workers.do_unit
    monkeypatch.setattr(
        workers, "do_unit", lambda unit, *rest: done.append(unit.told["num_facts"]) or do_unit(unit, *rest)
    )
    found = swept(parts, tmp_path, num_facts=[6, 4], retrieval_only=True)
    assert done == [[6]]
    assert [unit["size"]["num_facts"] for unit in found.summary["units"]] == [6, 4]
    # Units of another run in the folder are left alone and not reported.
    fewer = swept(parts, tmp_path, num_facts=[4], retrieval_only=True)
    assert (fewer.num_units, fewer.num_resumed) == (1, 1)
    assert set(fewer.rows["num_facts"].to_pylist()) == {4}
    assert len(list((tmp_path / "units").iterdir())) == 2


def test_units_of_other_code_are_named(parts, tmp_path, monkeypatch):
    given = {"num_facts": [4], "kinds": ["simple"], "retrieval_only": True, "baseline": []}
    assert not any("measured before" in note for note in swept(parts, tmp_path, **given).summary["notes"])
    known = run.environment()
    monkeypatch.setattr(run, "environment", lambda: {**known, "commit": "abc"})
    (note,) = [
        one for one in swept(parts, tmp_path, **{**given, "num_facts": [4, 6]}).summary["notes"] if "before" in one
    ]
    assert note == f"1 of 2 units were measured before, by version {known['version']}, commit {known['commit']}"


def test_an_adapter_in_the_place_of_another_is_another(parts, tmp_path):
    """A process that does both keeps them apart."""
    adapter = shutil.copytree(parts["adapter"], tmp_path / "adapter")
    candidates = []
    loaded = units.Loaded()
    for beta in (20.0, 1.0):
        changed = KnowledgeAdapter.from_pretrained(parts["adapter"])
        changed.configure(question_prior=beta)
        changed.save_pretrained(str(adapter))
        candidates.append(Candidate.read("tiny", str(adapter)))
        contents = ("base", candidates[-1].digest, "table")
        unit = units.Unit("", "cost", "", "", parts["base_model"], str(adapter), "", 0, {}, contents=contents)
        assert loaded.model(unit).adapter.config.question_prior == beta
        assert loaded.model(unit) is loaded.model(unit)
    assert candidates[0].digest != candidates[1].digest


def test_a_sweep_that_was_interrupted_is_finished(parts, found, tmp_path, monkeypatch):
    do_unit = workers.do_unit
    done = []

    def interrupted(unit, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit)
        return do_unit(unit, *rest)

    monkeypatch.setattr(workers, "do_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(parts, tmp_path, **SWEPT)
    monkeypatch.setattr(workers, "do_unit", do_unit)
    again = swept(parts, tmp_path, **SWEPT)
    assert again.num_resumed == 3
    assert figures(again) == figures(found)
    assert again.rows == found.rows


def test_a_unit_that_fails_ends_the_sweep_and_those_before_are_kept(parts, tmp_path, monkeypatch):
    do_unit = workers.do_unit

    def failing(unit, *rest):
        if unit.told["num_facts"] == [6]:
            raise InputError("a bad day", help="wait for a better one")
        return do_unit(unit, *rest)

    monkeypatch.setattr(workers, "do_unit", failing)
    with pytest.raises(InputError, match="a bad day"):
        swept(parts, tmp_path, num_facts=[4, 6], retrieval_only=True)
    monkeypatch.setattr(workers, "do_unit", do_unit)
    assert swept(parts, tmp_path, num_facts=[4, 6], retrieval_only=True).num_resumed == 1


def test_two_adapters_of_two_encoders_on_two_sources(parts, tmp_path):
    base = tiny_llama()
    wide = tiny_adapter(base, "paper", kb_scale=5)
    from kblam_ray.attention.adapter.config import EncoderRef
    from kblam_ray.encoders import load_encoder

    encoder = EncoderRef.of(load_encoder("hashing:96").spec)
    wide = KnowledgeAdapter.for_model(base, kind="paper", encoder=encoder, kb_layer_frequency=2)
    wide.save_pretrained(str(tmp_path / "wide"))
    write_facts([Fact("Lima", "country", "Peru"), Fact("Ur", "country", "Iraq")], str(tmp_path / "cities.csv"))
    adapters = {"tiny": parts["adapter"], "wide": str(tmp_path / "wide")}
    given = {"input": [str(tmp_path / "cities.csv")], "synthetic": 24, "kinds": ["simple"], "retrieval_only": True}
    found = swept(parts, tmp_path / "out", adapters=adapters, baseline=["cosine"], **given)
    labels = [(unit["candidate"], unit["source"], unit["size"]["num_facts"]) for unit in found.summary["units"]]
    assert labels == [
        ("tiny", "cities", 2),
        ("tiny", "synthetic", 24),
        ("wide", "cities", 2),
        ("wide", "synthetic", 24),
    ]
    dims = {name: [one["encoder"]["dim"] for one in tables] for name, tables in found.summary["sources"].items()}
    assert dims == {"cities": [64, 96], "synthetic": [64, 96]}
    assert sorted({(row["candidate"], row["source"]) for row in found.rows.to_pylist()}) == sorted(
        {(candidate, source) for candidate, source, _ in labels}
    )
    # The base model is loaded once: the second adapter finds it as the first one found it.
    alone = swept(parts, tmp_path / "alone", adapters={"wide": adapters["wide"]}, baseline=["cosine"], **given)
    assert alone.summary["units"] == found.summary["units"][2:]
    with pytest.raises(EncoderMismatchError, match="adapter wide"):
        swept(parts, tmp_path / "kb", adapters=adapters)
    assert not (tmp_path / "kb").exists()


def test_held_out_entities_beside_those_trained_on(parts, tmp_path):
    from kblam_ray.facts.split import is_held_out

    given = {"synthetic": 96, "held_out": 0.5, "num_facts": [64], "retrieval_only": True, "baseline": []}
    found = swept(parts, tmp_path, entities=["held_out", "trained"], num_questions=20, **given)
    assert [unit["entities"] for unit in found.summary["units"]] == ["held_out", "trained"]
    facts = EmbeddedFacts.of(KnowledgeBase.open(found.summary["sources"]["synthetic"][0]["uri"])).facts
    held = {name: {fact.value for fact in facts if is_held_out(fact.entity, 0.5) is name} for name in (True, False)}
    assert held[True] - held[False]
    asked = 0
    for row in found.rows.to_pylist():
        own = held[row["entities"] == "held_out"]
        assert set(row["wanted"]) <= own
        asked += bool(row["wanted"])
    assert asked > 40


def test_own_questions(parts, tmp_path):
    own = [OwnQuestion(question="What is the capital of Peru?", entity="Peru", property="capital")]
    found = swept(parts, tmp_path, own=own, prior=True, retrieval_only=True)
    (unit,) = found.summary["units"]
    assert unit["size"]["num_questions"] == {"own": 1}
    other = swept(parts, tmp_path, own=[own[0].model_copy(update={"question": "Peru, capital?"})], retrieval_only=True)
    assert other.num_resumed == 0
    assert {row["question"] for row in other.rows.to_pylist()} == {"Peru, capital?"}


def test_cost_and_interference(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        units, "measure_interference", partial(measure_interference, texts=["A quiet day.", "Good night!"])
    )
    monkeypatch.setattr(units, "measure_cost", partial(measure_cost, new_tokens=2, rounds=1))
    found = swept(parts, tmp_path, interference=[0, 6], cost=[6], kb_scale=[10], kinds=["simple"], baseline=[])
    assert [unit["part"] for unit in found.summary["units"]] == ["questions", "interference", "cost"]
    _, interference, cost = found.summary["units"]
    assert (interference["source"], interference["kb_scale"]) == ("kb", 10)
    assert {point["num_facts"] for point in interference["interference"]["points"]} == {0, 6}
    assert np.isfinite([point["perplexity"]["value"] for point in interference["interference"]["points"]]).all()
    assert {point["num_facts"] for point in cost["cost"]["points"]} == {6}
    assert " GB, " in cost["cost"]["machine"]
    assert set(cost) == {"part", "candidate", "source", "cost"}
    again = swept(parts, tmp_path, interference=[0, 6], cost=[6], kb_scale=[10], kinds=["simple"], baseline=[])
    assert again.num_resumed == 3
    assert again.summary["units"] == found.summary["units"]


def test_on_an_object_store(parts, found, s3_uri, tmp_path):
    output = f"{s3_uri}/results"
    given = {"synthetic": 24, "kinds": ["simple"], "retrieval_only": True, "baseline": []}
    stored = swept(parts, output, **given)
    assert stored.summary["sources"]["synthetic"][0]["uri"].startswith(f"{output}/tables/synthetic-24-")
    again = swept(parts, output, **given)
    assert again.num_resumed == 1
    assert again.rows == stored.rows
    local = swept(parts, tmp_path, **given)
    assert local.rows == stored.rows
    assert local.summary["units"] == stored.summary["units"]


def test_tables_can_be_shared_and_notes_be_added(parts, tmp_path):
    for name in ("a", "b"):
        settings = small(tmp_path / name, synthetic=24, kinds=["simple"], retrieval_only=True, baseline=[])
        adapters = {"tiny": parts["adapter"]}
        found = sweep(
            settings, parts["base_model"], adapters, tables=str(tmp_path / "tables"), note={"command": "make report"}
        )
        assert found.summary["environment"]["command"] == "make report"
        assert not (tmp_path / name / "tables").exists()
        assert found.summary["sources"]["synthetic"][0]["version"] == 0


def test_what_is_wrong_is_found_before_the_model_is_loaded(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "do_unit", None)
    monkeypatch.setattr(run, "make_table", None)
    cities = str(tmp_path / "cities.csv")
    write_facts(
        [Fact("Lima", "country", "Peru"), Fact("Ur", "country", "Iraq"), Fact("Lima", "country", "Peru")], cities
    )
    (tmp_path / "bad.csv").write_text("entity,property,value\nLima,country,Peru\nUr,country\n")
    for name in ("num_facts", "interference", "cost"):
        with pytest.raises(InputError, match="7 facts of 6"):
            swept(parts, tmp_path / "out", **{name: [4, 7]})
        with pytest.raises(InputError, match="9 facts of 8"):
            swept(parts, tmp_path / "out", synthetic=8, **{name: [9]})
        with pytest.raises(InputError, match="3 facts of 2 that 'cities' has"):
            swept(parts, tmp_path / "out", input=[cities], **{name: [3]})
    with pytest.raises(BadRowError, match=r"bad\.csv: line 3.*mend the row$"):
        swept(parts, tmp_path / "out", input=[cities, str(tmp_path / "bad.csv")])
    with pytest.raises(TableNotFoundError):
        swept(parts, tmp_path / "out", kb=[str(tmp_path / "none")])
    with pytest.raises(AdapterError, match="no such folder"):
        swept(parts, tmp_path / "out", adapters={"none": "/no/such"})
    with pytest.raises(InputError, match="and no workers"):
        swept(parts, tmp_path / "out", gpus_per_worker=1)
    with pytest.raises(InputError, match="no base model"):
        swept({**parts, "base_model": "/no/such"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        swept(parts, tmp_path / "file" / "out")
