"""A knowledge base over all replicas: what a client must know of it."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from registry_samples import LEASE_S, URI, answerer, in_own_time, kb_report, settled, started

from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.registry.reading import describe
from kblam_ray.serving.wanted import KbDescription, KbSpec, ProcessReport, Wanted


def over(*reports, spec: KbSpec | None = None) -> KbDescription:
    """The description of replicas that report so; the order in which they do makes no difference."""
    found = {
        describe(
            "capitals",
            spec or KbSpec(URI),
            {f"p{i}": answerer(f"p{i}", **({} if reports[i] is None else {"capitals": reports[i]})) for i in order},
        )
        for order in itertools.permutations(range(len(reports)))
    }
    assert len(found) == 1
    return found.pop()


def test_one_replica_is_described_as_it_reports():
    report = kb_report(3, latest_version=5, num_facts=30, lag_s=1.5, status="unreachable", error="no route")
    assert over(report) == KbDescription("capitals", URI, 3, 5, False, 30, "minilm", "unreachable", 1.5, "no route")


def test_of_many_the_oldest_version_the_newest_seen_and_the_largest_lag():
    found = over(kb_report(7), kb_report(5, latest_version=6, lag_s=0.5), kb_report(6, latest_version=9, lag_s=0.25))
    assert (found.version, found.latest_version, found.num_facts, found.lag_s) == (5, 9, 50, 0.5)
    assert found.status == "ready"


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        (["ready", "ready"], "ready"),
        (["ready", "loading"], "loading"),
        (["ready", "unloaded"], "ready"),
        (["unloaded", "unloaded"], "unloaded"),
        (["unloaded", "loading"], "loading"),
        (["loading", "unreachable"], "unreachable"),
        (["ready", "unreachable", "unloaded"], "unreachable"),
        (["ready", "unreachable", "failed", "loading"], "failed"),
    ],
)
def test_the_worst_status_with_its_error(statuses, worst):
    reports = [
        kb_report(4 if status in ("ready", "unreachable") else None, status=status, error=f"of {status}")
        for status in statuses
    ]
    found = over(*reports)
    assert found.status == worst
    assert found.error == f"of {worst}"


def test_replicas_that_serve_nothing_yet_hide_no_version():
    found = over(kb_report(4), kb_report(None), kb_report(None, status="failed", error="x"), None)
    assert (found.version, found.num_facts, found.status) == (4, 40, "failed")
    assert over(kb_report(None), kb_report(None)).version is None


def test_what_is_unloaded_is_described_where_nobody_serves():
    unloaded = kb_report(4, status="unloaded", latest_version=5)
    assert (over(unloaded).version, over(unloaded).num_facts, over(unloaded).latest_version) == (4, 40, 5)
    assert over(unloaded, kb_report(6)).version == 6


def test_a_replica_that_has_not_taken_up_the_uri_is_loading():
    found = over(kb_report(9, uri="/tables/before", lag_s=9, error="x", status="failed"), kb_report(2))
    assert (found.version, found.latest_version, found.status, found.lag_s, found.error) == (2, 2, "loading", 0, None)


def test_nobody_is_there():
    found = over(spec=KbSpec(URI, None, 6))
    assert found == KbDescription("capitals", URI, None, 6, False, None, None, "loading", 0.0)


def test_a_committed_version_is_the_latest_before_any_replica_has_seen_it():
    assert over(kb_report(4), spec=KbSpec(URI, None, 6)).latest_version == 6
    assert over(kb_report(8), spec=KbSpec(URI, None, 6)).latest_version == 8


def test_a_pin():
    found = over(kb_report(4, pinned=4, latest_version=9), spec=KbSpec(URI, 4))
    assert (found.pinned, found.version, found.latest_version) == (True, 4, 9)


@in_own_time
async def test_all_that_is_known():
    registry = await started({"b": KbSpec("/b"), "a": KbSpec("/a", 2)})
    wanted = await registry.wanted()
    metrics = Metrics("x", "answerer").text()
    await registry.report(ProcessReport("x", "answerer", {"a": kb_report(2, uri="/a", pinned=2)}, wanted, metrics))
    await registry.report(ProcessReport("g", "gateway", {}, wanted, "gateway's"))
    await registry.report(ProcessReport("w", "writer", {"b": kb_report(1, uri="/b")}, wanted))
    found = await registry.describe()
    assert found.wanted == wanted
    assert list(found.knowledge_bases) == ["a", "b"]
    assert (found.knowledge_bases["a"].version, found.knowledge_bases["a"].pinned) == (2, True)
    assert (found.knowledge_bases["b"].version, found.knowledge_bases["b"].status) == (None, "loading")
    assert found.processes == {"x": "answerer", "g": "gateway", "w": "writer"}
    assert found.metrics == {"x": metrics, "g": "gateway's", "w": ""}
    assert not found.is_settled


@in_own_time
async def test_processes_that_are_gone_are_not_described():
    registry = await settled({"capitals": KbSpec(URI)})
    await registry.report(answerer("x", Wanted(), capitals=kb_report(4)))
    await registry.report(answerer("y", Wanted(), capitals=kb_report(3)))
    assert (await registry.describe()).knowledge_bases["capitals"].version == 3
    await registry.leave("y")
    assert (await registry.describe()).knowledge_bases["capitals"].version == 4
    await asyncio.sleep(LEASE_S)
    found = await registry.describe()
    assert (found.knowledge_bases["capitals"].version, dict(found.processes), found.is_settled) == (None, {}, True)


def test_a_table_that_was_made_anew_has_the_versions_that_it_has():
    spec = KbSpec(URI, at_least=29)
    told, untold = Wanted(2, {"capitals": spec}), Wanted(1, {"capitals": KbSpec(URI)})

    def latest(wanted: Wanted, **fields) -> int | None:
        report = kb_report(0, latest_version=0, **fields)
        return describe("capitals", spec, {"p": answerer("p", wanted, capitals=report)}).latest_version

    assert latest(told) == 0
    # Whoever has not looked since he was told does not know.
    assert latest(untold) == 29
    assert latest(told, lag_s=0.1) == 29
    assert latest(told, status="unreachable") == 29
