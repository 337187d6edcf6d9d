"""Which units a sweep has: every combination once, under keys that change with what decides the numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sweep_samples import make_parts, small

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.errors import AdapterMismatchError, InputError
from kblam_ray.evaluation.own_questions import OwnQuestion
from kblam_ray.evaluation.sweep.fingerprints import Base, Candidate
from kblam_ray.evaluation.sweep.plan import Plan, check_candidates, check_sizes
from kblam_ray.table import KnowledgeBase


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("plan"))


def planned(parts, *, names=("tiny",), sources=("kb",), own=None, output="/nowhere", **settings):
    kb = KnowledgeBase.open(parts["kb"])
    candidates = [Candidate.read(name, parts["adapter"]) for name in names]
    tables = {(source, candidate.name): kb for source in sources for candidate in candidates}
    asked = small(output, kb=[parts["kb"]], **settings)
    return Plan(asked, Base.read(parts["base_model"]), candidates, tables, own, output).units()


def keys(parts, **settings):
    return {unit.key for unit in planned(parts, **settings)}


def test_every_combination_once(parts):
    units = planned(
        parts,
        names=("a", "b"),
        sources=("kb", "other"),
        num_facts=[4, 6, 4],
        selection=["all", "similar:2"],
        kb_scale=[10, 100],
        held_out=0.5,
        entities=["held_out", "trained"],
        interference=[6, 0],
        cost=[6],
    )
    asked = [unit for unit in units if unit.part == "questions"]
    labels = [tuple(unit.labels.values()) + tuple(unit.told["num_facts"]) for unit in asked]
    wanted = {
        ("questions", candidate, source, selection, kb_scale, entities, num_facts)
        for candidate in ("a", "b")
        for source in ("kb", "other")
        for selection in ("all", "similar:2")
        for kb_scale in (10.0, 100.0)
        for entities in ("held_out", "trained")
        for num_facts in (4, 6)
    }
    assert len(labels) == len(wanted) == 64
    assert set(labels) == wanted
    assert [unit.part for unit in units[-4:]] == ["cost"] * 4
    others = {tuple(unit.labels.values()) for unit in units if unit.part != "questions"}
    assert others == {
        *(
            ("interference", name, source, scale)
            for name in "ab"
            for source in ("kb", "other")
            for scale in (10.0, 100.0)
        ),
        *(("cost", name, source) for name in "ab" for source in ("kb", "other")),
    }
    assert len(units) == 64 + 8 + 4
    sizes = {unit.part: unit.told["sizes"] for unit in units if unit.part != "questions"}
    assert sizes == {"interference": [0, 6], "cost": [6]}
    assert units[-1].told["selections"] == ["all", "similar:2"]


def test_defaults_make_one_unit(parts):
    (unit,) = planned(parts)
    assert unit.told["num_facts"] == []
    assert unit.labels == {
        **{"part": "questions", "candidate": "tiny", "source": "kb"},
        **{"selection": "all", "kb_scale": None, "entities": None},
    }
    assert unit.baselines_of is None


def test_baselines_are_asked_once_of_the_same_facts(parts):
    units = planned(parts, num_facts=[4, 6], selection=["all", "similar:2"], kb_scale=[1, 2])
    asking = [unit for unit in units if unit.told["baseline"]]
    assert [(unit.told["selection"], unit.kb_scale, unit.told["num_facts"]) for unit in asking] == [
        ("all", 1.0, [4]),
        ("all", 1.0, [6]),
    ]
    first = {tuple(unit.told["num_facts"]): unit.key for unit in asking}
    for unit in units:
        assert unit.baselines_of == (None if unit in asking else first[tuple(unit.told["num_facts"])])


@pytest.mark.parametrize(
    "change",
    [
        {"num_questions": 3},
        {"kinds": ["simple"]},
        {"held_out": 0.5},
        {"prior": False},
        {"grounding": ["cite"]},
        {"baseline": []},
        {"read_facts": 4},
        {"max_new_tokens": 4},
        {"batch_size": 3},
        {"form": "materialized"},
        {"seed": 1},
        {"selection": ["similar:2"]},
        {"kb_scale": [50]},
        {"num_facts": [6]},
        {"device": None},
        {"dtype": "bfloat16"},
        {"own": [OwnQuestion(question="Who?")]},
    ],
    ids=str,
)
def test_what_decides_the_numbers_changes_the_key(parts, change):
    assert keys(parts).isdisjoint(keys(parts, **change))


@pytest.mark.parametrize(
    "change",
    [{"names": ("another",)}, {"sources": ("another",)}, {"num_workers": 3}, {"output": "/elsewhere"}, {"cost": [6]}],
    ids=str,
)
def test_what_does_not_keeps_it(parts, change):
    assert keys(parts) <= keys(parts, **change)


def test_other_contents_make_other_keys_and_other_places_do_not(parts, tmp_path):
    moved = {name: shutil.copytree(place, tmp_path / name) for name, place in parts.items() if name != "kb"}
    moved = {**parts, **{name: str(place) for name, place in moved.items()}}
    Path(moved["base_model"], "README.md").write_text("notes")
    assert keys(moved) == keys(parts)
    adapter = KnowledgeAdapter.from_pretrained(moved["adapter"])
    adapter.configure(question_prior=21.0)
    adapter.save_pretrained(moved["adapter"])
    found = [keys(parts), keys(moved)]
    weights = Path(moved["base_model"], "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found.append(keys(moved))
    kb = KnowledgeBase.open(str(shutil.copytree(parts["kb"], tmp_path / "kb")))
    kb.upsert([{"entity": "Peru", "property": "currency", "value": "sol"}])
    found.append(keys({**parts, "kb": kb.uri}))
    assert len(set.union(*found)) == 4


def test_a_table_made_anew_is_another_one(tmp_path, parts):
    place = str(tmp_path / "kb")
    found = set()
    for value in ("Lima", "Cuzco"):
        shutil.rmtree(place, ignore_errors=True)
        KnowledgeBase.create(place, "hashing:64").upsert([{"entity": "Peru", "property": "capital", "value": value}])
        found |= keys({**parts, "kb": place})
    assert len(found) == 2


def test_sizes_and_adapters_are_looked_at_first(parts, tmp_path):
    for name in ("num_facts", "interference", "cost"):
        settings = small("x", kb=["k"], **{name: [3, 7]})
        check_sizes(settings, "world", 7)
        with pytest.raises(InputError, match=rf"7 facts of 6 that 'world' has \({name}\)"):
            check_sizes(settings, "world", 6)
    base = Base.read(parts["base_model"])
    plain = KnowledgeAdapter.from_pretrained(parts["adapter"])
    plain.configure(question_prior=0.0)
    plain.save_pretrained(str(tmp_path / "plain"))
    candidates = [
        Candidate.read(name, path) for name, path in (("tiny", parts["adapter"]), ("p", str(tmp_path / "plain")))
    ]
    check_candidates(small("x", kb=["k"]), base, candidates)
    with pytest.raises(InputError, match="no question prior"):
        check_candidates(small("x", kb=["k"], prior=True), base, candidates)
    base.config.hidden_size = 48
    with pytest.raises(AdapterMismatchError):
        check_candidates(small("x", kb=["k"]), base, candidates)
