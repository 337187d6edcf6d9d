"""Metrics: what Prometheus' own parser reads from one process and from many joined."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kblam_ray.serving.metrics import Metrics, merged


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by name and labels; a family or a sample that stands twice fails."""
    names, found = [], {}
    for family in text_string_to_metric_families(text):
        names.append(family.name)
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    assert len(names) == len(set(names)), names
    return found


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, tuple(sorted(labels.items()))]


def used(process_id: str, role="answerer") -> Metrics:
    """Metrics with something in every family."""
    metrics = Metrics(process_id, role)
    metrics.requests.labels(endpoint="/v1/models", status=200).inc()
    metrics.request_seconds.labels(endpoint="/v1/models").observe(0.2)
    metrics.first_token_seconds.labels(grounding="cite").observe(0.03)
    metrics.answer_tokens.inc(7)
    metrics.prompt_tokens.inc(11)
    metrics.tokens_per_second.observe(42)
    metrics.running_requests.inc()
    metrics.waiting_requests.set(3)
    for gauge in (
        metrics.kb_version,
        metrics.kb_latest_version,
        metrics.kb_lag_seconds,
        metrics.kb_facts,
        metrics.kb_memory_bytes,
    ):
        gauge.labels(kb="capitals").set(5)
    metrics.refresh_seconds.labels(kb="capitals").observe(0.5)
    metrics.refresh_failures.labels(kb="capitals").inc()
    metrics.facts_written.labels(kb="capitals", what="added").inc(9)
    return metrics


def test_every_family_is_there_with_its_process():
    text = used("p1").text()
    found = samples(text)
    assert {name for name, _ in found if not name.endswith(("_bucket", "_sum", "_count"))} == {
        "kblam_requests_total",
        "kblam_answer_tokens_total",
        "kblam_prompt_tokens_total",
        "kblam_running_requests",
        "kblam_waiting_requests",
        "kblam_kb_version",
        "kblam_kb_latest_version",
        "kblam_kb_lag_seconds",
        "kblam_kb_facts",
        "kblam_kb_memory_bytes",
        "kblam_kb_refresh_failures_total",
        "kblam_kb_facts_written_total",
        "kblam_process_memory_bytes",
    }
    assert {name for name, _ in found if name.endswith("_count")} == {
        "kblam_request_seconds_count",
        "kblam_first_token_seconds_count",
        "kblam_tokens_per_second_count",
        "kblam_kb_refresh_seconds_count",
    }
    assert all(dict(labels)["process"] == "p1" for _, labels in found)
    assert value(text, "kblam_requests_total", process="p1", endpoint="/v1/models", status="200") == 1
    assert value(text, "kblam_answer_tokens_total", process="p1") == 7
    assert value(text, "kblam_kb_version", process="p1", kb="capitals") == 5
    assert value(text, "kblam_kb_facts_written_total", process="p1", kb="capitals", what="added") == 9
    assert value(text, "kblam_process_memory_bytes", process="p1", role="answerer") > 1_000_000


def test_what_has_no_labels_of_its_own_is_there_before_it_is_used():
    text = Metrics("p1", "gateway").text()
    assert value(text, "kblam_answer_tokens_total", process="p1") == 0
    assert value(text, "kblam_running_requests", process="p1") == 0


def test_another_label_than_the_familys_is_an_error():
    metrics = Metrics("p1", "gateway")
    with pytest.raises(ValueError, match="label"):
        metrics.requests.labels(endpoint="/x")
    with pytest.raises(ValueError, match="label"):
        metrics.kb_version.labels(name="capitals")


def test_a_knowledge_base_that_is_forgotten_leaves_nothing():
    metrics = used("p1")
    metrics.kb_version.labels(kb="capitals2").set(8)
    metrics.forget_kb("capitals")
    found = samples(metrics.text())
    assert [labels for _, labels in found if ("kb", "capitals") in labels] == []
    assert value(metrics.text(), "kblam_kb_version", process="p1", kb="capitals2") == 8
    assert value(metrics.text(), "kblam_answer_tokens_total", process="p1") == 7
    metrics.forget_kb("never there")
    metrics.kb_version.labels(kb="capitals").set(6)
    assert value(metrics.text(), "kblam_kb_version", process="p1", kb="capitals") == 6


def test_joining_keeps_every_sample_and_says_each_header_once():
    texts = [used(f"p{number}").text() for number in range(3)] + [Metrics("g", "gateway").text()]
    whole = merged(texts)
    expected = {}
    for text in texts:
        expected |= samples(text)
    assert samples(whole) == expected
    headers = [line for line in whole.splitlines() if line.startswith("#")]
    assert len(headers) == len(set(headers)) == len([line for line in texts[0].splitlines() if line.startswith("#")])
    assert whole.endswith("\n")


def test_the_order_of_joining_changes_nothing():
    texts = [used(name).text() for name in ("b", "a", "c")]
    assert len({merged(order) for order in itertools.permutations(texts)}) == 1
    families = [line.split()[2] for line in merged(texts).splitlines() if line.startswith("# TYPE")]
    assert families == sorted(families)
    assert merged([merged(texts[:2]), texts[2]]) == merged(texts)


def test_of_a_process_that_is_told_twice_the_first_is_taken():
    metrics = used("p1")
    before = metrics.text()
    metrics.answer_tokens.inc()
    now = metrics.text()
    assert value(merged([now, before]), "kblam_answer_tokens_total", process="p1") == 8
    assert value(merged([before, now]), "kblam_answer_tokens_total", process="p1") == 7
    assert samples(merged([now, before])) == samples(now)


def test_nothing_joined_is_nothing():
    assert merged([]) == ""
    assert merged(["", used("p1").text()]) == merged([used("p1").text()])


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True))
def test_any_label_value_survives(names):
    texts = []
    for name in names:
        metrics = Metrics(name, "answerer")
        metrics.kb_version.labels(kb=name).set(1)
        texts.append(metrics.text())
    found = [dict(labels) for metric, labels in samples(merged(texts)) if metric == "kblam_kb_version"]
    assert sorted(labels["kb"] for labels in found) == sorted(names)
    assert all(labels["kb"] == labels["process"] for labels in found)


def test_threads_count_and_read_at_the_same_time():
    metrics, failures = Metrics("p1", "answerer"), []

    def work() -> None:
        try:
            for number in range(300):
                metrics.answer_tokens.inc()
                metrics.kb_version.labels(kb=f"kb{number % 7}").set(number)
                metrics.forget_kb(f"kb{(number + 3) % 7}")
                if number % 30 == 0:
                    samples(metrics.text())
        except Exception as error:  # noqa: BLE001 - a thread's failure fails the test below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert value(metrics.text(), "kblam_answer_tokens_total", process="p1") == 1200


def test_neither_metrics_nor_logs_nor_registry_load_the_models_libraries():
    check = (
        "import sys\nimport kblam_ray.serving.metrics, kblam_ray.serving.logs, kblam_ray.serving.registry\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'deltalake') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
