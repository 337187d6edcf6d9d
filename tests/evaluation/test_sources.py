"""Where facts come from: names, and tables made of files and of synthetic facts."""

from __future__ import annotations

import gzip
import json

import pytest
from evaluation_samples import ENCODER

from kblam_ray.attention.adapter.config import EncoderRef
from kblam_ray.encoders import load_encoder
from kblam_ray.errors import BadRowError, EncoderMismatchError, InputError
from kblam_ray.evaluation import sources
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.evaluation.sources import Source, default_name, make_table, named, sources_of
from kblam_ray.facts import expand_inputs, read_facts
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.facts.writing import write_facts
from kblam_ray.table import KnowledgeBase
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.table.pipeline import run as pipeline

HASHING = EncoderRef.of(ENCODER.spec)
CITIES = [Fact("Lima", "country", "Peru"), Fact("Lima", "population", "10 million"), Fact("Ur", "country", "Iraq")]


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    """Embedding in this process, though other tests of the session may have started Ray."""
    if "ray_session" not in request.fixturenames:
        monkeypatch.setattr(sources, "_ray_runs", lambda: False)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/kb/world", "world"),
        ("s3://bucket/prefix/world/", "world"),
        ("s3://bucket", "bucket"),
        ("cities.jsonl.gz", "cities"),
        ("facts/nouns.parquet", "nouns"),
        ("org/adapter-3.2", "adapter-3.2"),
        ("/data/my cities (new).csv", "my-cities-new"),
        ("/data/städte.csv", "städte"),
        ("/data/*", "facts"),
    ],
)
def test_the_name_of_a_place(place, name):
    assert default_name(place) == name


def test_names_are_given_or_taken_from_the_place():
    assert named(["a=/x/y", "/x/z", "/odd=path/w", "./n=1"], "--kb") == {
        "a": "/x/y", "z": "/x/z", "w": "/odd=path/w", "n-1": "./n=1",
    }  # fmt: skip
    for given, error in (
        (["a/w", "b/w"], "two of the name 'w'"),
        (["w=a", "b/w"], "two of the name"),
        (["w="], "--kb w="),
    ):
        with pytest.raises(InputError, match=error):
            named(given, "--kb")


def test_the_sources_of_settings(tmp_path):
    settings = EvaluateSettings(
        kb=["/x/world"], input=["nouns=/x/wordnet.jsonl.gz"], synthetic=7, synthetic_seed=3, output=str(tmp_path)
    )
    assert sources_of(settings) == [
        Source("world", "kb", "/x/world"),
        Source("nouns", "input", "/x/wordnet.jsonl.gz"),
        Source("synthetic", "synthetic", num_facts=7, seed=3),
    ]
    for given in ({"kb": ["/x/a"], "input": ["/y/a.csv"]}, {"input": ["synthetic=/x/a.csv"], "synthetic": 7}):
        with pytest.raises(InputError, match="two sources of facts"):
            sources_of(EvaluateSettings(output=str(tmp_path), **given))


@pytest.mark.parametrize("name", ["cities.csv", "cities.jsonl.gz", "cities.json", "cities.parquet", "cities.tsv"])
def test_a_file_of_any_format_becomes_a_table(tmp_path, name):
    write_facts(CITIES, str(tmp_path / name))
    kb = make_table(Source("cities", "input", str(tmp_path / name)), HASHING, str(tmp_path / "tables"))
    assert kb.uri == str(tmp_path / "tables" / f"cities-{HASHING.revision[:8]}")
    assert set(EmbeddedFacts.of(kb).facts) == set(CITIES)
    assert (kb.info.identity, kb.encoder.revision) == ("entity,property", HASHING.revision)
    assert make_table(Source("cities", "input", str(tmp_path / name)), HASHING, str(tmp_path / "tables")).version == 0


def test_many_values_for_one_property_stay_side_by_side(tmp_path):
    rows = [("Peru", "language", value) for value in ("Spanish", "Quechua", "Aymara", "Quechua")]
    with gzip.open(tmp_path / "graph.jsonl.gz", "wt") as file:
        for head, relation, tail in rows:
            file.write(json.dumps({"head": head, "relation": relation, "tail": tail}) + "\n")
    kb = make_table(Source("graph", "input", str(tmp_path / "graph.jsonl.gz")), HASHING, str(tmp_path))
    assert kb.info.identity == "entity,property,value"
    assert sorted(fact.value for fact in EmbeddedFacts.of(kb).facts) == ["Aymara", "Quechua", "Spanish"]


def test_a_file_that_changed_changes_its_table(tmp_path):
    source = Source("cities", "input", str(tmp_path / "cities.jsonl"))
    write_facts(CITIES, source.place)
    make_table(source, HASHING, str(tmp_path))
    later = [CITIES[0], Fact("Lima", "population", "11 million"), Fact("Cuzco", "country", "Peru")]
    write_facts(later, source.place)
    kb = make_table(source, HASHING, str(tmp_path))
    assert set(EmbeddedFacts.of(kb).facts) == set(later)
    assert kb.version > 0


def test_a_half_written_table_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FACTS_PER_WRITE", 10)
    source = Source("synthetic", "synthetic", num_facts=35, seed=4)
    upsert = KnowledgeBase.upsert
    written = []

    def failing(kb, facts):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(list(facts))
        return upsert(kb, written[-1])

    monkeypatch.setattr(KnowledgeBase, "upsert", failing)
    with pytest.raises(KeyboardInterrupt):
        make_table(source, HASHING, str(tmp_path))
    monkeypatch.setattr(KnowledgeBase, "upsert", upsert)
    told = []
    kb = make_table(source, HASHING, str(tmp_path), tell=told.append)
    assert [line.rpartition(": ")[2] for line in told] == ["20 of 35 facts", "30 of 35 facts"]
    assert set(EmbeddedFacts.of(kb).facts) == set(SyntheticFacts(4).facts(0, 35))
    # The same table as of one that was never stopped, and never made again.
    other = make_table(source, HASHING, str(tmp_path / "other"))
    assert (EmbeddedFacts.of(other).keys_MP == EmbeddedFacts.of(kb).keys_MP).all()
    assert other.version == kb.version == 3
    monkeypatch.setattr(KnowledgeBase, "upsert", None)
    assert make_table(source, HASHING, str(tmp_path)).version == 3


def test_a_table_for_each_encoder(tmp_path):
    source = Source("cities", "input", str(tmp_path / "cities.jsonl"))
    write_facts(CITIES, source.place)
    wide = EncoderRef.of(load_encoder("hashing:96").spec)
    found = [make_table(source, encoder, str(tmp_path / "tables")) for encoder in (HASHING, wide)]
    assert [kb.encoder.dim for kb in found] == [64, 96]
    assert found[0].uri != found[1].uri


def test_on_a_running_ray_its_workers_embed(tmp_path, ray_session):
    rows = [Fact("Peru", "language", value) for value in ("Spanish", "Quechua")]
    write_facts([*CITIES, *rows], str(tmp_path / "cities.csv"))
    kb = make_table(Source("cities", "input", str(tmp_path / "cities.csv")), HASHING, str(tmp_path / "tables"))
    assert set(EmbeddedFacts.of(kb).facts) == {*CITIES, *rows}
    assert kb.info.identity == "entity,property,value"
    with pytest.raises(EncoderMismatchError):
        make_table(
            Source("s", "synthetic", num_facts=5), HASHING.model_copy(update={"revision": "0" * 32}), str(tmp_path)
        )


def test_synthetic_facts_reach_the_workers_in_a_file(tmp_path, monkeypatch):
    handed = []

    def embed(settings):
        handed.extend(row.fact for file in expand_inputs(settings.input) for row in read_facts(file))
        KnowledgeBase.create(settings.kb, settings.encoder, identity=settings.identity).upsert(handed)

    monkeypatch.setattr(sources, "_ray_runs", lambda: True)
    monkeypatch.setattr(pipeline, "embed", embed)
    kb = make_table(Source("synthetic", "synthetic", num_facts=40, seed=2), HASHING, str(tmp_path / "tables"))
    assert handed == list(SyntheticFacts(2).facts(0, 40))
    assert set(EmbeddedFacts.of(kb).facts) == set(handed)


def test_what_cannot_be_a_table(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"entity": "Lima", "property": "country", "value": "Peru"}\n{"entity": 3}\n')
    with pytest.raises(BadRowError, match=r"bad\.jsonl"):
        make_table(Source("bad", "input", str(tmp_path / "bad.jsonl")), HASHING, str(tmp_path / "tables"))
    with pytest.raises(InputError, match="no such file"):
        make_table(Source("none", "input", str(tmp_path / "none.jsonl")), HASHING, str(tmp_path / "tables"))
    with pytest.raises(InputError, match="does not say which encoder"):
        make_table(Source("s", "synthetic", num_facts=5), None, str(tmp_path / "tables"))
    with pytest.raises(EncoderMismatchError):
        make_table(
            Source("s", "synthetic", num_facts=5), HASHING.model_copy(update={"revision": "0" * 32}), str(tmp_path)
        )
    assert not (tmp_path / "tables").exists()
