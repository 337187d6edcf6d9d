"""Published figures beside ours: what is told, where from, and what was not run here."""

from __future__ import annotations

import pytest

from kblam_ray.evaluation.reproduce.published import NOT_RUN, published_figures, published_table

LLAMA_31 = "meta-llama/Llama-3.1-8B-Instruct"


def figure(value):
    return {"value": value, "low": value, "high": value, "count": 10}


def asked(system, num_facts, at_1, *, prior=None, grounding=None, candidate="ours", selection="all"):
    groups = {"all": {"@1": figure(0.1), "@5": figure(0.2)}, "simple": {"@1": figure(at_1), "@5": figure(1.0)}}
    result = {"system": system, "prior": prior, "grounding": grounding, "retrieval": groups}
    return {
        "part": "questions",
        "candidate": candidate,
        "source": "synthetic",
        "selection": selection,
        "kb_scale": None,
        "size": {"num_facts": num_facts, "results": [result]},
    }


def summary(*units):
    return {"units": list(units)}


def rows_of(table, what):
    return [dict(zip(table.head, row, strict=True)) for row in table.rows if row[0].startswith(what)]


def test_every_figure_has_a_source_and_is_a_share():
    known = published_figures()
    assert known.figures
    assert known.statements
    assert known.unread
    for one in known.figures:
        for values in one.values.values():
            assert all(0 <= value <= 100 for value in values.values()), one
        assert set(one.values) == {"@1", "@5"}
        for size, at_1 in one.values["@1"].items():
            assert one.values["@5"][size] >= at_1


def test_published_retrieval_stands_beside_ours_by_size():
    found = summary(
        asked("attention", 100, 0.5, prior=False),
        asked("attention", 5_000, 0.25, prior=False),
        asked("attention", 100, 0.75, prior=True),
        asked("attention", 100, 0.9, prior=True, grounding="verbatim"),
        asked("bm25", 100, 0.625),
        asked("cosine", 100, 0.4),
    )
    table = published_table("retrieval", base_model="", label="the demo model", summary=found)
    published = rows_of(table, "KBLaM, 20,000 steps")[0]
    assert (published["Facts of"], published["Metric"], published["Source"]) == ("Enron", "@1", "AtlasKV, Table 3")
    assert [published[size] for size in ("10", "100", "1,000", "10,000")] == ["90.0", "50.9", "25.5", "7.3"]
    assert (published["5,000"], published["Here"]) == ("–", NOT_RUN)
    assert "200" not in table.head
    other = rows_of(table, "BM25")[0]
    assert (other["100"], other["Other sizes"].split(", ")[:2]) == ("99.9", ["50: 99.2", "200: 99.4"])
    alone = rows_of(table, "ours: attention alone")
    assert [(row["Metric"], row["100"], row["5,000"], row["10"]) for row in alone] == [
        ("@1", "50.0", "25.0", "–"),
        ("@5", "100.0", "100.0", "–"),
    ]
    assert {row["Model"] for row in alone} == {"the demo model"}
    assert [row["100"] for row in rows_of(table, "ours: attention with prior")] == ["75.0", "100.0"]
    (bm25, _) = [row for row in rows_of(table, "BM25") if row["Source"] == "this run"]
    assert (bm25["100"], bm25["Here"]) == ("62.5", "run here")
    assert rows_of(table, "BM25")[0]["Here"] == "–"
    assert not rows_of(table, "ours: cosine")
    assert "arxiv.org/abs/2510.17934" in table.note


def test_a_model_that_could_not_be_had_is_marked():
    for name in ("retrieval", "cost", "refusal", "scale"):
        table = published_table(name, base_model=LLAMA_31, label="Llama", summary=None)
        assert NOT_RUN in table.rows[-1]
        assert all(NOT_RUN in row for row in table.rows), name
        assert len({len(table.head), *map(len, table.rows)}) == 1


def test_a_model_that_ran_is_not_marked():
    table = published_table(
        "retrieval", base_model=LLAMA_31, label="Llama-3.1", summary=summary(asked("attention", 10, 1.0, prior=False))
    )
    assert {row["Here"] for row in rows_of(table, "KBLaM")} == {"run here"}


def test_statements_stand_beside_what_was_measured():
    points = [
        {"way": "attention", "selection": "all", "num_facts": size, "fits": True, "knowledge_bytes": size * 1024}
        for size in (10, 10_240)
    ]
    points += [{"way": "in_context", "selection": None, "num_facts": size, "fits": size < 50} for size in (10, 50, 100)]
    unit = {"part": "cost", "candidate": "ours", "source": "synthetic", "cost": {"points": points}}
    table = published_table("cost", base_model="", label="the demo model", summary=summary(unit))
    ours = {row[0]: row[-1] for row in table.rows}
    assert ours["Facts on one A100 of 80 GB"] == "10,240 measured"
    assert ours["GPU memory of KBLaM with 100,000 facts"] == "10.0 MiB of knowledge at 10,240 facts"
    assert ours["GPU memory of in-context learning with more than 100 facts"] == "context full at 50 facts"


@pytest.mark.parametrize("name", ["kinds", "entities", "interference", "nothing"])
def test_where_nothing_is_published_there_is_no_table(name):
    assert published_table(name, base_model="", label="", summary=None) is None
