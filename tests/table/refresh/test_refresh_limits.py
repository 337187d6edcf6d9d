"""Settings and inputs that a refresh refuses before it begins."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from refresh_samples import settings, watcher

from kblam_ray.errors import InputError
from kblam_ray.table.refresh.sources import Sources


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("name", ["stop_s", "poll_s", "settle_s", "list_every_s"])
def test_times_are_a_day_at_most(name, value):
    with pytest.raises(ValidationError, match=name):
        settings("kb", "in", **{name: value})
    settings("kb", "in", **{name: 86_400})


@pytest.mark.parametrize("name", ["vacuum_every_h", "gpus_per_worker"])
def test_other_numbers_have_an_end(name):
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValidationError, match=name):
            settings("kb", "in", **{name: value})


def test_a_retention_has_an_end():
    for value in (0, 1_000_001, 10**15):
        with pytest.raises(ValidationError, match="retention_h"):
            settings("kb", "in", retention_h=value)


@pytest.mark.parametrize(
    ("kb", "given"),
    [
        ("kb", "kb/in"),
        ("kb", "kb"),
        ("kb", "kb/*.jsonl"),
        ("kb", "kb.rejected"),
        ("link/kb", "in/kb/deep"),
        ("in/../kb", "kb/in"),
        ("s3://b", "s3://b/in/"),
        ("s3://b/kb", "s3://b/kb/in/"),
        ("s3://b/kb", "s3://b/kb.rejected"),
    ],
)
def test_inputs_inside_the_table_are_refused(tmp_path, kb, given):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    kb, given = (name if name.startswith("s3:") else str(tmp_path / name) for name in (kb, given))
    with pytest.raises(InputError, match="inside the table"):
        Sources([given], kb, 0)


@pytest.mark.parametrize(("kb", "given"), [("in/kb", "in"), ("in/kb", "in/kb2"), ("s3://b/in/kb", "s3://b/in/")])
def test_a_table_may_lie_inside_its_input(tmp_path, kb, given):
    kb, given = (name if name.startswith("s3:") else str(tmp_path / name) for name in (kb, given))
    Sources([given], kb, 0)


def test_a_queue_without_an_input_on_s3_is_refused(tmp_path):
    url = "https://sqs.us-east-1.amazonaws.com/1/q"
    with pytest.raises(InputError, match="no input on S3"):
        watcher(tmp_path / "kb", tmp_path / "in", sqs_queue_url=url)
    watcher(tmp_path / "kb", tmp_path / "in", "s3://b/in/", sqs_queue_url=url)
