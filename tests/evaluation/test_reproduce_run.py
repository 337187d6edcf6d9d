"""Suites that are run: facts and adapters made once, sweeps resumed, one report, and models that cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from model_samples import FACTS, save_base, tiny_adapter, tiny_llama

from kblam_ray.errors import InputError, TrainingError
from kblam_ray.evaluation.reproduce.run import run
from kblam_ray.evaluation.reproduce.settings import ReproduceSettings
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.facts.writing import write_facts
from kblam_ray.table import KnowledgeBase

MISSING = "no/such-model-anywhere"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    tiny_adapter(tiny_llama(), "shared", question_prior=20.0).save_pretrained(str(folder / "adapter"))
    return {"base_model": save_base(folder / "base"), "tiny": str(folder / "adapter")}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def no_plots(monkeypatch):
    """Without drawing: it has tests of its own, and takes longer than all the rest."""
    monkeypatch.setattr("kblam_ray.evaluation.report.make.chart_png", lambda chart: b"png")


class Fitting:
    """Stands in for a training: saves an adapter of the kind that is asked for, or fails."""

    def __init__(self, fails=False):
        self.told, self.fails = [], fails

    def __call__(self, told):
        self.told.append(dict(told))
        if self.fails:
            raise TrainingError("the loss is not a number", help="lower the learning rate")
        tiny_adapter(tiny_llama(), told["kind"]).save_pretrained(told["output"])
        return {"seconds": {"training": 1.0}}


class Making:
    """Makes facts, and counts how often."""

    def __init__(self):
        self.num = 0

    def __call__(self, path):
        self.num += 1
        return write_facts((Fact(*fact) for fact in FACTS), str(path))

    def many(self, path):
        self.num += 1
        return write_facts(SyntheticFacts(3).facts(0, 64), str(path))


def suite(folder: Path, name="mine", **changes) -> str:
    told = {
        "title": "Tiny experiments",
        "about": "On a model of random numbers.",
        "adapters": {
            "tiny": {"shipped": "tiny"},
            "fitted": {"fit": {"kind": "paper", "synthetic": 20, "encoder": "hashing:64"}},
        },
        "facts": {"places": {"make": "places"}, "many": {"make": "many", "full": 40}},
        "settings": {
            "synthetic": 40,
            "num_questions": 2,
            "kinds": ["simple", "unanswerable"],
            "retrieval_only": True,
            "baseline": ["cosine"],
        },
        "experiments": {
            "retrieval": {
                "title": "By size",
                "about": "How often?",
                "adapters": ["tiny", "fitted"],
                "settings": {"num_facts": [8]},
            },
            "real": {
                "title": "Real facts",
                "about": "Places.",
                "adapters": ["tiny"],
                "facts": ["places", "many"],
                "real": True,
                "settings": {"synthetic": None},
            },
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(told | changes))
    return str(path)


def reproduced(settings, shipped, fitting=None, making=None, **more):
    making = making or Making()
    return run(
        ReproduceSettings(device="cpu", **settings),
        fit=fitting or Fitting(),
        make_facts={"places": making, "many": making.many},
        shipped=shipped,
        **more,
    )


def test_experiments_are_run_once_and_reported_together(shipped, tmp_path):
    output, fitting, making = tmp_path / "out", Fitting(), Making()
    extra = tmp_path / "more.jsonl"
    write_facts(SyntheticFacts(4).facts(0, 24), str(extra))
    settings = {"suite": [suite(tmp_path)], "output": str(output), "input": [f"own={extra}"]}
    checked: list[dict] = []
    summary = reproduced(settings, shipped, fitting, making, check_fit=lambda told: checked.append(dict(told)))

    done = summary["experiments"]["mine"]
    assert (done["retrieval"]["num_units"], done["retrieval"]["num_resumed"]) == (2, 0)
    assert done["real"]["num_units"] == 3
    assert [told["kind"] for told in checked] == ["paper"]
    (told,) = fitting.told
    assert (told["kind"], told["device"], told["resume"]) == ("paper", "cpu", True)
    assert "synthetic" not in told
    assert KnowledgeBase.open(*told["kb"]).num_facts == 20

    rows = {fact.uri for fact in map(KnowledgeBase.open, (output / "tables").iterdir())}
    assert {Path(uri).name.rpartition("-")[0] for uri in rows} == {
        *("training-20-0", "synthetic-40-1000003", "places", "many", "own"),
    }
    assert KnowledgeBase.open(next(uri for uri in rows if "many" in uri)).num_facts == 40
    found = json.loads((output / "retrieval" / "summary.json").read_text())
    assert set(found["candidates"]) == {"tiny", "fitted"}
    assert (output / "retrieval" / "rows.parquet").is_file()
    whole = json.loads((output / "summary.json").read_text())
    assert whole["experiments"] == summary["experiments"]
    assert whole["not_run"] == {}
    page = (output / "report.html").read_text()
    for text in ("Tiny experiments", "By size", "Real facts", "AtlasKV", "not run here"):
        assert text in page

    again = reproduced(settings, shipped, fitting, making)
    assert again["experiments"]["mine"]["retrieval"]["num_resumed"] == 2
    assert again["experiments"]["mine"]["real"]["num_resumed"] == 3
    assert len(fitting.told) == 1
    assert making.num == 2
    assert json.loads((output / "retrieval" / "summary.json").read_text())["units"] == found["units"]


def test_flags_win_over_the_suite(shipped, tmp_path, no_plots):
    output, fitting = tmp_path / "out", Fitting()
    settings = {
        "suite": [suite(tmp_path)],
        "output": str(output),
        "experiment": ["retrieval"],
        "num_questions": 3,
        "seed": 5,
        "adapter": [f"fitted={shipped['tiny']}"],
        "baseline": ["bm25"],
    }
    summary = reproduced(settings, shipped, fitting)
    assert list(summary["experiments"]["mine"]) == ["retrieval"]
    assert not fitting.told
    found = json.loads((output / "retrieval" / "summary.json").read_text())
    assert (found["settings"]["num_questions"], found["settings"]["seed"]) == (3, 5)
    assert found["settings"]["baseline"] == []
    assert found["units"][0]["size"]["num_questions"]["simple"] == 3


def test_a_suite_whose_model_cannot_be_had_is_an_error_with_the_published_figures(shipped, tmp_path, no_plots):
    output = tmp_path / "out"
    path = suite(tmp_path, base_model=MISSING, download="download it")
    with pytest.raises(InputError) as caught:
        reproduced({"suite": [path], "output": str(output), "experiment": ["retrieval"]}, shipped)
    assert "download it" in caught.value.help
    assert "--base-model" in caught.value.help
    assert MISSING in caught.value.where
    page = (output / "report.html").read_text()
    assert "not run here" in page
    assert "AtlasKV" in page
    assert json.loads((output / "summary.json").read_text())["not_run"].keys() == {"mine"}
    # With a model in its place it is run.
    settings = {
        "suite": [path],
        "output": str(output),
        "experiment": ["retrieval"],
        "base_model": shipped["base_model"],
    }
    assert reproduced(settings, shipped)["not_run"] == {}


def test_beside_others_it_is_marked_and_the_rest_is_run(shipped, tmp_path, no_plots):
    output = tmp_path / "out"
    paths = [suite(tmp_path, "there"), suite(tmp_path, "missing", base_model=MISSING)]
    summary = reproduced({"suite": paths, "output": str(output), "experiment": ["retrieval"]}, shipped)
    assert list(summary["experiments"]) == ["there"]
    assert list(summary["not_run"]) == ["missing"]
    assert (output / "there" / "retrieval" / "summary.json").is_file()
    assert not (output / "missing").exists()
    text = (output / "report.md").read_text()
    assert "not run here" in text
    published = json.loads((output / "summary.json").read_text())["published"]
    assert all("not run here" in row for row in published["missing/retrieval"]["rows"])
    assert any("run here" in row for row in published["there/retrieval"]["rows"])


def test_what_was_measured_before_a_failure_is_reported(shipped, tmp_path, no_plots):
    told = yaml.safe_load(Path(suite(tmp_path)).read_text())
    experiments = {"real": told["experiments"]["real"], "retrieval": told["experiments"]["retrieval"]}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(told | {"experiments": experiments}, sort_keys=False))
    output = tmp_path / "out"
    with pytest.raises(TrainingError):
        reproduced({"suite": [str(path)], "output": str(output)}, shipped, Fitting(fails=True))
    assert list(json.loads((output / "summary.json").read_text())["experiments"]["other"]) == ["real"]
    assert "Real facts" in (output / "report.html").read_text()
    # A training that was cut short is done again.
    assert reproduced({"suite": [str(path)], "output": str(output)}, shipped)["fitted"]["other"].keys() == {"fitted"}


def test_facts_and_adapters_that_nobody_has(shipped, tmp_path):
    settings = {"suite": [suite(tmp_path, facts={"places": {"make": "stars"}, "many": {"make": "many"}})]}
    with pytest.raises(InputError, match="nothing makes the facts stars"):
        reproduced({**settings, "output": str(tmp_path / "a"), "experiment": ["real"]}, shipped)
    with pytest.raises(InputError, match="no adapter tiny comes"):
        reproduced(
            {"suite": [suite(tmp_path)], "output": str(tmp_path / "b"), "experiment": ["real"]},
            {"base_model": shipped["base_model"]},
        )


def test_a_command_that_cannot_be_done_is_refused_before_anything_is_made(shipped, tmp_path):
    output, mine = tmp_path / "out", suite(tmp_path)
    (tmp_path / "other").mkdir()
    paths = [mine, suite(tmp_path / "other")]
    with pytest.raises(InputError, match="two suites of the name mine"):
        reproduced({"suite": paths, "output": str(output)}, shipped)
    (tmp_path / "bad.csv").write_text("entity,property,value\nLima,country\n")
    facts = tmp_path / "facts.csv"
    write_facts((Fact(*fact) for fact in FACTS), str(facts))
    for given, told in (
        ([str(tmp_path / "no.jsonl")], "no.jsonl"),
        (["x=a.csv", "x=b.csv"], "two of the name 'x'"),
        ([f"places={facts}"], "of the name 'places'"),
        ([f"synthetic={facts}"], "of the name 'synthetic'"),
        ([str(tmp_path / "bad.csv")], r"bad\.csv: line 2"),
    ):
        with pytest.raises(InputError, match=told):
            reproduced({"suite": [mine], "output": str(output), "input": given}, shipped)
    chosen = {"suite": [mine], "output": str(output), "experiment": ["retrieval"]}
    with pytest.raises(InputError, match="no experiment chosen asks facts of one's own"):
        reproduced({**chosen, "input": [f"own={facts}"]}, shipped)
    assert not output.exists()
