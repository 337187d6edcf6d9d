"""Suites of experiments as YAML: all that ship are whole, and what is wrong in one is said when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kblam_ray.errors import InputError
from kblam_ray.evaluation.reproduce.experiments import SUITES, Suite, read_suite, suite_names
from kblam_ray.evaluation.reproduce.prepare import given_adapters
from kblam_ray.evaluation.reproduce.settings import ReproduceSettings
from kblam_ray.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {
    *("retrieval", "answers", "refusal", "cost", "encoders", "frequency", "scale"),
    *("kinds", "selection", "entities", "real", "interference"),
}
PAPER = ("llama-3-8b-instruct", "llama-3.2-1b-instruct", "phi-3-mini")
SMALL = {
    "title": "Small",
    "adapters": {"one": {"path": "adapters/one"}, "two": {"fit": {"kind": "paper", "mix": {"batch_size": 4}}}},
    "fitting": {"kind": "shared", "mix": {"batch_size": 8, "held_out": 0.2}},
    "settings": {"synthetic": 50, "num_questions": 5},
    "experiments": {"first": {"title": "First", "about": "?", "adapters": ["one"], "settings": {"num_facts": [10]}}},
}


def small(tmp_path, **changes):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return str(path)


@pytest.mark.parametrize("name", ["demo", *PAPER])
def test_a_suite_that_ships_has_every_experiment(name):
    assert name in suite_names()
    suite = read_suite(name)
    assert set(suite.experiments) == EXPERIMENTS
    for adapter, recipe in suite.adapters.items():
        for scale in suite.scales:
            if recipe.fit is not None:
                TrainSettings(**suite.fit_of(adapter, scale), base_model="base", output="adapters")
    used = {adapter for experiment in suite.experiments.values() for adapter in experiment.adapters}
    assert used == set(suite.adapters), "adapters that no experiment asks"


def test_the_demo_suite_sweeps_from_10_to_100_000_facts():
    full = read_suite("demo").settings_of("retrieval", "full", output="o")
    assert full.num_facts == [10, 100, 1_000, 10_000, 100_000]
    assert full.synthetic == 100_000


def test_the_papers_suites_train_as_the_cluster_file_does():
    told = yaml.safe_load((ROOT / "cluster" / "train" / "llama-3-8b.yaml").read_text())
    suite = read_suite("llama-3-8b-instruct")
    recipe = suite.fit_of("minilm", "full") | {"base_model": suite.base_model}
    for name, value in recipe.items():
        if name != "evaluate":
            assert told[name] == value, name
    names = {"meta-llama/Llama-3.2-1B-Instruct", "microsoft/Phi-3-mini-4k-instruct"}
    assert {read_suite(name).base_model for name in PAPER[1:]} == names
    for name in PAPER[1:]:
        other = read_suite(name)
        assert other.experiments == suite.experiments
        changed = {"num_workers", "strategy", "micro_batch_size"}
        mine, theirs = other.fit_of("minilm", "full"), suite.fit_of("minilm", "full")
        assert {key for key in mine if mine[key] != theirs[key]} <= changed


def test_settings_go_from_the_general_to_the_particular():
    suite = Suite.model_validate(
        SMALL
        | {
            "scales": ["quick", "full"],
            "quick": {"num_questions": 6, "seed": 1, "max_new_tokens": 9},
            "experiments": {
                "first": {
                    "title": "First",
                    "about": "?",
                    "adapters": ["one"],
                    "settings": {"seed": 2, "max_new_tokens": 8},
                    "quick": {"max_new_tokens": 7},
                }
            },
        }
    )
    quick = suite.settings_of("first", "quick", output="o")
    assert (quick.synthetic, quick.num_questions, quick.seed, quick.max_new_tokens) == (50, 6, 2, 7)
    full = suite.settings_of("first", "full", output="o", seed=3)
    assert (full.num_questions, full.seed, full.max_new_tokens) == (5, 3, 8)
    fewer = suite.model_copy(deep=True)
    fewer.experiments["first"].adapters = ["one", "two"]
    fewer.experiments["first"].quick_adapters = ["two"]
    assert [fewer.adapters_of("first", scale) for scale in ("quick", "full")] == [["two"], ["one", "two"]]
    fit = suite.fit_of("two", "quick")
    assert (fit["kind"], fit["mix"]) == ("paper", {"batch_size": 4, "held_out": 0.2})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"setings": {}}, "setings"),
        ({"settings": {"num_fact": [3]}}, "num_fact"),
        ({"settings": {"synthetic": 50, "unanswerable": 9}}, "unanswerable"),
        ({"settings": {"synthetic": 50, "output": "mine"}}, "output"),
        ({"adapters": {"two": {"path": "x"}}}, "there is no one"),
        ({"adapters": {"one": {"path": "x", "shipped": "y"}}}, "one of the three"),
        ({"experiments": {}}, "experiments"),
        ({"extends": "nobody"}, "no suite nobody"),
        ({"scales": ["huge"]}, "scales"),
    ],
)
def test_what_is_wrong_in_a_suite_is_said(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        read_suite(small(tmp_path, **changes))


def test_a_suite_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such suite") as caught:
        read_suite("llama-4")
    assert "demo" in caught.value.help
    torn = tmp_path / "torn.yaml"
    torn.write_text("a: [")
    with pytest.raises(InputError, match="cannot read"):
        read_suite(str(torn))


def test_a_suite_of_ones_own_extends_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\ntitle: Mine\nexperiments: {retrieval: {title: Other}}\n")
    mine, demo = read_suite(str(path)), read_suite("demo")
    assert (mine.title, mine.experiments["retrieval"].title) == ("Mine", "Other")
    assert mine.experiments["retrieval"].adapters == demo.experiments["retrieval"].adapters
    assert mine.experiments["cost"] == demo.experiments["cost"]


def test_experiments_scales_and_adapters_by_name(tmp_path):
    suite = read_suite(small(tmp_path))
    assert read_suite("demo").chosen(["cost", "retrieval"]) == ["retrieval", "cost"]
    assert (read_suite("demo").scale(None), suite.scale(None)) == ("quick", "full")
    with pytest.raises(InputError, match="no experiment costs"):
        suite.chosen(["costs"])
    with pytest.raises(InputError, match="no scale quick"):
        suite.scale("quick")
    assert given_adapters(suite, ["mine", "two=other"]) == {"one": "mine", "two": "other"}
    with pytest.raises(InputError, match="no adapter three"):
        given_adapters(suite, ["three=x"])
    with pytest.raises(InputError, match="two adapters"):
        given_adapters(suite, ["x", "one=y"])


@pytest.mark.parametrize(
    "told",
    [
        {"suite": ["demo", "demo"]},
        {"experiment": ["cost", "cost"]},
        {"suite": ["demo", "phi-3-mini"], "base_model": "x"},
        {"output": "s3://bucket/prefix"},
        {"num_question": 3},
    ],
)
def test_settings_that_do_not_go_together(told):
    with pytest.raises(ValueError, match=r"twice|one --suite|folder|num_question"):
        ReproduceSettings(**{"output": "o", **told})


def test_every_yaml_of_the_suites_is_one():
    assert sorted(path.name for path in SUITES.iterdir()) == [f"{name}.yaml" for name in suite_names()]
