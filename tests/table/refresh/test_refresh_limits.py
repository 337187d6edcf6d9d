"""Settings and inputs that a refresh refuses before it begins."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from refresh_samples import settings


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
