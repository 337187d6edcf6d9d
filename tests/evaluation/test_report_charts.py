"""Which charts a sweep gets, what they show, and the numbers at the top."""

from __future__ import annotations

import pytest
from report_samples import calibrated, cost_unit, interference_unit, questions_unit, summary, whole

from kblam_ray.evaluation.report.chart import BarPanel, Chart, LinePanel
from kblam_ray.evaluation.report.charts import charts_of
from kblam_ray.evaluation.report.headline import tiles_of
from kblam_ray.evaluation.report.naming import INKS

RANKED = (("attention", True, None), ("attention", False, None), ("cosine", None, None))


def charts(*units) -> dict[str, Chart]:
    found = charts_of(summary(*units))
    assert len({chart.name for chart in found}) == len(found)
    return {chart.name: chart for chart in found}


def line(panel, name: str):
    (found,) = [one for one in panel.series if one.name == name]
    return found


def test_lines_where_the_number_of_facts_varies():
    found = charts(questions_unit(1_000, value=0.7), questions_unit(10, value=0.9))
    assert {"retrieval-over-facts", "answers-over-facts", "refusal-over-facts"} <= set(found)
    assert not [name for name in found if name.endswith(("-bars", "-compared"))]
    first, first_five = found["retrieval-over-facts"].panels
    assert (first.title, first_five.title) == ("first", "among the first five")
    ours = line(first, "attention + prior")
    assert [(point.x, pytest.approx(point.value)) for point in ours.points] == [(10, 90), (1_000, 70)]
    assert (ours.points[0].low, ours.points[0].high) == (pytest.approx(85), pytest.approx(95))
    assert "10 facts: 90.0 % (85.0 to 95.0), 40 questions" in ours.points[0].tip
    assert first.log_x
    assert [panel.title for panel in found["answers-over-facts"].panels] == [
        "exactly right", "words, F1", "ROUGE-L", "BERTScore",
    ]  # fmt: skip
    # Of refusals, those of the answers stand for the score that decides them.
    refused = [one.name for one in found["refusal-over-facts"].panels[0].series]
    assert "attention + prior, verbatim" in refused
    assert "attention + prior" not in refused


def test_small_multiples_and_a_heat_map_by_kind():
    found = charts(questions_unit(1_000), questions_unit(10))
    assert [panel.title for panel in found["first-by-kind"].panels] == ["simple", "paraphrase", "two entity"]
    (heat,) = found["first-heat"].panels
    assert heat.title == "1,000 facts"
    assert heat.columns == ("simple", "paraphrase", "two entity")
    assert heat.rows == ("attention + prior", "attention", "cosine", "BM25")
    assert heat.cells[0] == (pytest.approx(78), pytest.approx(76), pytest.approx(74))
    assert not [name for name in charts(questions_unit(10, kinds=["simple"])) if "kind" in name or "heat" in name]


def test_bars_where_there_is_one_size():
    found = charts(questions_unit(10))
    assert not [name for name in found if name.endswith("over-facts")]
    panel = found["retrieval-bars"].panels[0]
    assert isinstance(panel, BarPanel)
    ((name, bars),) = panel.groups
    assert name == ""
    assert [(bar.name, pytest.approx(bar.value)) for bar in bars] == [
        ("attention + prior", 80), ("attention", 71), ("cosine", 62), ("BM25", 56),
    ]  # fmt: skip


def test_a_panel_for_each_knowledge_base():
    found = charts(*(questions_unit(size, source=source) for source in ("world", "nouns") for size in (10, 1_000)))
    assert [panel.title for panel in found["first-over-facts"].panels] == ["world", "nouns"]
    assert [name for name, _ in found["first-compared"].panels[0].groups] == ["world", "nouns"]
    # The lines have shown it.
    assert found["first-compared"].is_detail
    assert not found["first-over-facts"].is_detail


@pytest.mark.parametrize(
    ("setting", "values", "groups", "by"),
    [
        ("candidate", ["every 1", "every 3"], ["every 1", "every 3"], "adapter"),
        ("selection", ["all", "similar:64"], ["all facts", "nearest 64"], "selection"),
        ("kb_scale", [None, 100.0], ["the adapter's C", "C = 100"], "C"),
        ("entities", ["held_out", "trained"], ["entities held out", "entities trained on"], "entities"),
    ],
)
def test_bars_where_a_setting_varies(setting, values, groups, by):
    found = charts(*(questions_unit(100, **{setting: value}) for value in values))
    chart = found["exact-compared"]
    assert [name for name, _ in chart.panels[0].groups] == groups
    assert chart.title == f"Answer exactly right, by {by}"
    assert "At 100 facts." in chart.about


def test_bars_of_several_knowledge_bases_and_settings_are_a_panel_for_each_knowledge_base():
    units = [
        questions_unit(size, source=source, selection=selection)
        for source, size in (("world", 10), ("nouns", 20))
        for selection in ("all", "similar:8")
    ]
    panels = charts(*units)["first-compared"].panels
    assert [panel.title for panel in panels] == ["world", "nouns"]
    assert [name for name, _ in panels[0].groups] == ["all facts, 10 facts", "nearest 8, 10 facts"]


def test_contexts_are_compared_at_the_largest_size_that_all_have():
    units = [questions_unit(size, source="world") for size in (10, 100, 1_000)]
    units += [questions_unit(size, source="nouns") for size in (10, 100)]
    assert "At 100 facts." in charts(*units)["first-compared"].about


def test_lines_over_c_where_it_was_tried_at_three_places():
    found = charts(
        *(questions_unit(100, kb_scale=scale, value=value) for scale, value in ((100, 0.8), (1, 0.6), (10, 0.7)))
    )
    (panel,) = found["first-over-scale"].panels
    assert [(point.x, pytest.approx(point.value)) for point in line(panel, "attention + prior").points] == [
        (1, 60), (10, 70), (100, 80),
    ]  # fmt: skip
    assert "first-over-scale" not in charts(*(questions_unit(100, kb_scale=scale) for scale in (1.0, 10.0)))


def test_no_chart_of_what_was_not_measured():
    found = charts(questions_unit(10, ways=RANKED), questions_unit(100, ways=RANKED))
    assert not [
        name for name in found if name.startswith(("answers", "exact", "rouge", "bert", "time", "interference"))
    ]
    assert "retrieval-over-facts" in found
    assert charts_of(summary()) == []


def test_each_system_has_one_colour_and_it_is_nobody_elses():
    inks: dict[str, set[str]] = {}
    for chart in charts_of(whole()):
        for panel in chart.panels:
            drawn = [(one.name, one.role) for one in panel.series] if isinstance(panel, LinePanel) else []
            if isinstance(panel, BarPanel):
                drawn = [(bar.name, bar.role) for _, bars in panel.groups for bar in bars]
            for name, role in drawn:
                if not chart.name.startswith(("time", "memory", "thresholds")):
                    inks.setdefault(role, set()).add(name.partition(",")[0])
    assert inks == {
        "prior": {"attention + prior"}, "attention": {"attention"}, "cosine": {"cosine"}, "dense": {"dense"},
        "bm25": {"BM25"}, "zero_shot": {"no facts"}, "in_context": {"all in the prompt"},
    }  # fmt: skip
    assert len({ink.light for ink in INKS.values()}) == len({ink.marker for ink in INKS.values()}) == len(INKS)


def test_refusal_charts_mark_the_stored_threshold():
    unit = questions_unit(10)
    unit["size"]["results"][6]["calibration"] = calibrated(None, is_probability=False)
    found = charts(unit)
    receiver, reliability = found["refusal-curves"].panels
    assert [one.name for one in receiver.series] == ["attention + prior", "attention", "cosine"]
    assert [(point.x, point.value) for point in receiver.series[0].points][1] == (6.25, 25)
    assert [(point.x, point.value) for point in reliability.series[0].points] == [(5, 10), (95, 90)]
    thresholds = found["thresholds"].panels
    assert [panel.title for panel in thresholds] == ["attention + prior", "attention"]
    assert [(mark.x, mark.name) for mark in thresholds[0].marks] == [(0.5, "stored")]
    # Where nothing is refused there is no precision.
    assert [len(line(thresholds[0], name).points) for name in ("F1", "precision", "recall")] == [5, 4, 5]
    (legend,) = [one for one in found["refusal-curves"].legend if one.name == "attention"]
    assert legend.has_markers


def test_a_statistic_that_is_no_probability_has_no_reliability():
    unit = questions_unit(10, ways=RANKED)
    for result in unit["size"]["results"]:
        if "calibration" in result:
            result["calibration"] = calibrated(None, is_probability=False)
    found = charts(unit)
    assert [panel.title for panel in found["refusal-curves"].panels] == ["receiver curve"]
    assert found["thresholds"].panels[0].marks == ()


def test_interference_over_facts():
    found = charts(interference_unit())
    panels = {panel.title: panel for panel in found["interference"].panels}
    ratio = panels["perplexity, times that without facts"]
    assert ratio.reference == 1
    assert [(point.x, pytest.approx(point.value)) for point in line(ratio, "attention").points] == [
        (0, 1), (100, 1.001), (10_000, 1.1),
    ]  # fmt: skip
    assert [point.value for point in line(panels["attention given to facts, %"], "attention + prior").points][2] == 1
    assert charts(interference_unit([100])) == {}


def test_cost_over_facts_marks_where_the_prompt_is_full():
    found = charts(cost_unit(fits_up_to=10))
    first = found["time"].panels[0]
    assert [one.name for one in first.series] == ["attention", "attention, nearest 64", "all in the prompt", "no facts"]
    assert [(mark.x, mark.name) for mark in first.marks] == [(100, "the prompt is full (512 tokens)")]
    assert [point.x for point in line(first, "all in the prompt").points] == [10]
    assert line(first, "attention").points[1].value == pytest.approx(40)
    memory = found["memory"].panels[0]
    assert [point.value for point in line(memory, "attention").points] == pytest.approx([0.095, 0.23, 1.58])
    assert charts(cost_unit(fits_up_to=1_000))["time"].panels[0].marks == ()


def test_the_numbers_at_the_top_are_of_the_largest_knowledge_base_and_not_the_best_found():
    small = questions_unit(10, value=0.95)
    large = questions_unit(1_000, value=0.5)
    # Alone does better here: what stands at the top does not depend on it.
    for result in large["size"]["results"]:
        if (result["prior"], result["grounding"]) == (False, None):
            result["retrieval"]["all"]["@1"]["value"] = 0.99
    tiles = {tile.title: tile for tile in tiles_of(summary(small, large, interference_unit(), cost_unit()))}
    first = tiles["Right fact first"]
    assert (first.value, first.about) == ("50.0 %", "attention + prior; world, 1,000 facts")
    assert first.beside == "best of the others: 32.0 % (cosine)"
    assert tiles["Answer exactly right"].about == "attention + prior, verbatim; world, 1,000 facts"
    assert tiles["Perplexity of text that needs no fact"].value == "× 1.100"
    time = tiles["Time to the first token, beside no facts"]
    assert (time.value, time.about) == ("× 11.00", "attention; 1,000 facts")
    assert time.beside == "all in the prompt: × 1.10 at 10 facts, then the prompt is full"
    assert tiles_of(summary()) == []


def test_the_other_knowledge_bases_stand_beside_the_largest_one():
    units = [questions_unit(size, source=source, value=value, selection=selection)
             for source, size, value in (("world", 10, 0.9), ("nouns", 100, 0.7), ("cities", 50, 0.6))
             for selection in ("all", "similar:8")]  # fmt: skip
    first = tiles_of(summary(*units))[0]
    assert (first.value, first.about) == ("70.0 %", "attention + prior; nouns, 100 facts")
    assert first.also == "world: 90.0 %, cities: 60.0 %"
