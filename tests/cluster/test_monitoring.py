"""Dashboard and alert rules speak of metrics, and of labels, that the server has; their expressions are PromQL."""

from __future__ import annotations

import re
import time
import urllib.request
from datetime import timedelta
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kblam_ray.serving.metrics import FIRST_TOKEN_BUCKETS_S, Metrics
from kblam_ray.serving.settings import ServeSettings
from kblam_ray.table.refresh.metrics import RefreshMetrics
from kblam_ray.table.refresh.report import Report
from kblam_ray.table.refresh.sources import SourceFile
from kblam_ray.table.refresh.taking import Outcome
from tests.cluster.manifests import CLUSTER, dashboard, named, quantity, serve_config

FOREIGN = {"kube_cronjob_status_last_successful_time": {"cronjob"}, "kube_cronjob_created": {"cronjob"}}
"""Metrics of others (kube-state-metrics) and the labels of them that are used."""

CONVERSIONS = {"humanizePercentage", "humanizeDuration", "humanize1024"}


def exported() -> dict[str, set[str]]:
    """The labels of every sample that a server can have, by name."""
    metrics = Metrics("answerer-1", "answerer")
    for family in vars(metrics).values():
        if hasattr(family, "labels") and hasattr(family, "_family"):
            labels = set(family._family._labelnames) - {"process"}
            if labels != {"role"}:
                family.labels(**dict.fromkeys(labels, "x"))
    found: dict[str, set[str]] = {}
    for text in (metrics.text(), refreshs_text()):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def refreshs_text() -> str:
    """What a watcher of sources serves that has done everything once."""
    metrics = RefreshMetrics("kb/world", "127.0.0.1", 0)
    try:
        metrics.looked(at_s=1.0, waiting=1, oldest_at_s=1.0, refused=0, version=3)
        metrics.committed(seconds=1.0, lags_s=[1.0], facts={"added": 1}, texts=2)
        metrics.failed("storage")
        metrics.compacted()
        text = served(metrics)
    finally:
        metrics.close()
    return "".join(f"{line}\n" for line in text.splitlines() if "_created" not in line)


def served(metrics: RefreshMetrics) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics") as answer:
        return str(answer.read().decode())


EXPORTED = exported()
TYPES = {
    family.name: family.type
    for text in (Metrics("answerer-1", "answerer").text(), refreshs_text())
    for family in text_string_to_metric_families(text)
}


def rules() -> list[dict[str, Any]]:
    groups = named("PrometheusRule", "kblam")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def without_variables(expression: str) -> str:
    """An expression of the dashboard, with something in the place of Grafana's variables."""
    known = {"$__rate_interval": "5m", "$kb": ".*"}
    for name, value in known.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def expressions() -> list[Any]:
    found = [(rule["alert"], rule["expr"]) for rule in rules()]
    found += [
        (f"{panel['title']}-{target['refId']}", without_variables(target["expr"]))
        for panel in panels()
        for target in panel["targets"]
    ]
    return [pytest.param(expression, id=name) for name, expression in found]


def nodes(expression: str) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), lambda node: found.append(node))
    return found


def check(expression: str) -> None:
    """Raise ValueError or assert unless an expression is PromQL about what the server exports."""
    known = EXPORTED | FOREIGN
    found = nodes(expression)
    labels: set[str] = set()
    for node in found:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name in known, node.name
            labels |= known[node.name]
            assert {matcher.name for matcher in node.matchers.matchers} <= known[node.name], expression
    for node in found:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= labels, expression
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase"):
            (selector,) = [one for one in nodes(str(node)) if isinstance(one, promql_parser.VectorSelector)]
            assert selector.name.endswith(("_total", "_bucket", "_sum", "_count")), f"{selector.name} only grows?"
        if isinstance(node, promql_parser.Call) and node.func.name == "histogram_quantile":
            assert "_bucket" in str(node.args[1])
            for inner in nodes(str(node.args[1])):
                assert not isinstance(inner, promql_parser.AggregateExpr) or "le" in labels_of(inner), expression


def test_counters_and_histograms_export_what_the_check_takes_them_for():
    assert TYPES["kblam_requests"] == "counter"
    assert EXPORTED["kblam_requests_total"] == {"endpoint", "status", "process"}
    assert EXPORTED["kblam_kb_refresh_seconds_bucket"] == {"kb", "le", "process"}
    assert EXPORTED["kblam_process_memory_bytes"] == {"role", "process"}


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_about_what_the_server_exports(expression):
    check(expression)


@pytest.mark.parametrize(
    "wrong",
    [
        "rate(kblam_requests_total)",
        "sum(rate(kblam_requests[5m]))",
        'sum(rate(kblam_requests_total{code="429"}[5m]))',
        "sum by (model) (kblam_kb_facts)",
        "rate(kblam_kb_facts[5m])",
        "histogram_quantile(0.9, sum(rate(kblam_request_seconds_bucket[5m])))",
        "max(kblam_kb_lag_seconds",
    ],
)
def test_the_check_finds_what_is_wrong(wrong):
    with pytest.raises((AssertionError, ValueError)):
        check(wrong)


def test_every_metric_is_shown():
    shown = {
        node.name
        for param in expressions()
        for node in nodes(str(param.values[0]))
        if isinstance(node, promql_parser.VectorSelector)
    }
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown if name not in FOREIGN}
    assert families == set(TYPES)


def test_alerts_say_what_they_saw():
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        templates = re.findall(r"{{(.*?)}}", rule["annotations"]["description"])
        grouped = {name for node in nodes(rule["expr"]) for name in labels_of(node)}
        for template in templates:
            words = template.split()
            assert words[0] == "$value" or words[0].removeprefix("$labels.") in grouped, (rule["alert"], template)
            assert set(words[2:]) <= CONVERSIONS


def test_alerts_compare_what_is_too_much_with_what_can_be_reached():
    """A quantile is never more than the last bucket."""
    for rule in rules():
        for node in nodes(rule["expr"]):
            if isinstance(node, promql_parser.BinaryExpr) and str(node.op) in ("<", "<=", ">", ">=", "==", "!="):
                assert str(node.op) == ">", rule["alert"]
                if str(node.lhs).startswith("histogram_quantile("):
                    assert float(str(node.rhs)) < max(FIRST_TOKEN_BUCKETS_S), rule["alert"]


def labels_of(node: Any) -> set[str]:
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        return set(node.modifier.labels)
    return set(EXPORTED.get(node.name, ())) if isinstance(node, promql_parser.VectorSelector) else set()


def test_there_is_an_alert_for_what_an_operator_must_know():
    assert {rule["alert"] for rule in rules()} >= {
        *("KblamDown", "KblamNoReplica", "KblamFailures", "KblamOverloaded", "KblamLag", "KblamRefreshFailures"),
        *("KblamKnowledgeMemory", "KblamProcessMemory", "KblamSourcesLate", "KblamScheduleLate"),
        *("KblamWatcherDown", "KblamWatcherStuck"),
    }


def test_a_watcher_without_a_series_is_noticed():
    """A comparison of what is scraped now cannot fire when nothing is: the past is asked, and when it was."""
    (rule,) = [rule for rule in rules() if rule["alert"] == "KblamWatcherDown"]
    (past,) = [node for node in nodes(rule["expr"]) if isinstance(node, promql_parser.SubqueryExpr)]
    assert past.range >= timedelta(days=1)
    assert str(past.expr) == "timestamp(kblam_refresh_last_look_timestamp_seconds{})"
    (target,) = named("PodMonitor", "kblam-refresh")["spec"]["podMetricsEndpoints"]
    allowed_s = float(rule["expr"].rpartition(">")[2])
    # A step between two questions and a few scrapes that went wrong are no death.
    assert allowed_s >= 60 + 5 * float(target["interval"].removesuffix("s"))


def test_a_schedule_that_never_ended_well_is_noticed():
    """It has no last success to be compared: its own age is taken then."""
    (rule,) = [rule for rule in rules() if rule["alert"] == "KblamScheduleLate"]
    either = [
        node for node in nodes(rule["expr"]) if isinstance(node, promql_parser.BinaryExpr) and str(node.op) == "or"
    ]
    assert [(name_of(node.lhs), name_of(node.rhs)) for node in either] == [tuple(FOREIGN)]


def name_of(expression: Any) -> str:
    (found,) = [node.name for node in nodes(str(expression)) if isinstance(node, promql_parser.VectorSelector)]
    return str(found)


def test_a_long_batch_is_told_from_a_watcher_that_hangs():
    """Nobody looks during either; during a batch files wait, and the alert leaves those knowledge bases out."""
    (rule,) = [rule for rule in rules() if rule["alert"] == "KblamWatcherStuck"]
    top = promql_parser.parse(rule["expr"])
    assert str(top.op) == "unless"
    assert str(top.rhs) == "max by (kb)(kblam_refresh_waiting_files{}) > 0"

    an_hour_ago = SourceFile("facts.jsonl", "tag", int((time.time() - 3600) * 1e6), 1)
    report = Report("kb/world", RefreshMetrics("kb/world", "127.0.0.1", 0))
    assert report.metrics

    def now(name: str) -> float:
        assert report.metrics
        (found,) = re.findall(rf'^kblam_refresh_{name}{{kb="kb/world"}} (\S+)$', served(report.metrics), re.MULTILINE)
        return float(found)

    try:
        assert (now("waiting_files"), now("oldest_waiting_seconds")) == (0, 0)
        report.looked([an_hour_ago], 3)
        before_s = now("oldest_waiting_seconds")
        assert now("waiting_files") == 1
        # It grows without another look: a batch that does not end is seen by KblamSourcesLate.
        assert 3600 <= before_s < now("oldest_waiting_seconds") < 3660
        # It ended, whether or not there was something to commit: a watcher that hangs now is stuck.
        report.took_up(Outcome(taken=[an_hour_ago]), {}, 1.0)
        assert (now("waiting_files"), now("oldest_waiting_seconds")) == (0, 0)
    finally:
        report.metrics.close()


def test_the_guide_says_what_to_do_about_every_alert():
    guide = (CLUSTER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(Kblam\w+)`", guide, re.MULTILINE)) == {rule["alert"] for rule in rules()}


def test_thresholds_are_those_of_the_server():
    by_name = {rule["alert"]: rule["expr"] for rule in rules()}
    (app,) = serve_config()["applications"]
    settings = ServeSettings.model_validate(app["args"])
    assert f"0.9 * {settings.knowledge.budget_bytes / 1e9:g}e9" in by_name["KblamKnowledgeMemory"]
    (group,) = named("RayService", "kblam-server")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    memory = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
    assert f"0.9 * {memory / 2**30:g} * 2 ^ 30" in by_name["KblamProcessMemory"]
    # An hour without a good run is four missed ones.
    assert named("CronJob", "kblam-refresh")["spec"]["schedule"].startswith("*/15 ")
    assert by_name["KblamScheduleLate"].endswith("> 3600")


def test_the_server_is_asked_at_one_place():
    """Each process tells of all: with more targets everything would be counted more than once."""
    monitor = named("PodMonitor", "kblam-server")["spec"]
    service = named("RayService", "kblam-server")["spec"]["rayClusterConfig"]
    (target,) = monitor["podMetricsEndpoints"]
    head = service["headGroupSpec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= head["metadata"]["labels"].items()
    for group in service["workerGroupSpecs"]:
        assert not monitor["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    assert target["port"] in {port["name"] for port in head["spec"]["containers"][0]["ports"]}
    # Else the operator's own label would take the place of the route.
    assert target["honorLabels"] is True
    assert serve_config()["proxy_location"] == "EveryNode"


def test_the_watcher_is_asked_where_it_runs():
    (target,) = named("PodMonitor", "kblam-refresh")["spec"]["podMetricsEndpoints"]
    head = named("RayCluster", "kblam-jobs")["spec"]["headGroupSpec"]["template"]
    selected = named("PodMonitor", "kblam-refresh")["spec"]["selector"]["matchLabels"]
    assert selected.items() <= head["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    (container,) = named("Deployment", "kblam-watch")["spec"]["template"]["spec"]["containers"]
    assert f"--metrics-host 0.0.0.0 --metrics-port {ports[target['port']]}\n" in container["args"][0]


def test_the_dashboard_is_one_that_grafana_shows():
    board = dashboard()
    assert board["schemaVersion"] >= 39
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "kb"}
    (kb,) = [variable for variable in board["templating"]["list"] if variable["name"] == "kb"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", kb["query"]["query"]).groups()
    assert label in EXPORTED[metric]
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"] == unit_of(panel), panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        for target in panel["targets"]:
            expression = without_variables(target["expr"])
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in {name for node in nodes(expression) for name in labels_of(node)}


def unit_of(panel: dict[str, Any]) -> str:
    """What the expressions of a panel are in, by the names of their metrics."""
    expressions = [without_variables(target["expr"]) for target in panel["targets"]]
    names = [
        node.name for each in expressions for node in nodes(each) if isinstance(node, promql_parser.VectorSelector)
    ]
    if panel["title"] in ("Failed", "Turned away"):
        return "percentunit"
    if all(name == "kblam_requests_total" for name in names):
        return "reqps"
    if all(name.removesuffix("_bucket").endswith("_seconds") for name in names):
        return "s"
    is_size = all(name.endswith("_bytes") for name in names) and not any("count(" in each for each in expressions)
    return "bytes" if is_size else "none"
