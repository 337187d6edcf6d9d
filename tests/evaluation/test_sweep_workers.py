"""A sweep's units done by Ray tasks: the same numbers, whichever worker dies, and the unit's own error."""

from __future__ import annotations

import os
import signal

import pytest
from sweep_samples import figures, make_parts, swept

from kblam_ray.errors import EvaluationError, InputError
from kblam_ray.evaluation.sweep import workers

GIVEN = {"num_facts": [4, 5, 6], "kinds": ["simple"], "retrieval_only": True, "prior": True, "baseline": ["cosine"]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def here(parts, tmp_path_factory):
    """The sweep done in this process."""
    return swept(parts, tmp_path_factory.mktemp("here"), **GIVEN)


@pytest.fixture(autouse=True)
def on_ray(ray_session):
    """All tests of this module have Ray."""


def test_workers_find_what_one_process_finds(parts, here, tmp_path):
    told = []
    found = swept(parts, tmp_path, num_workers=2, progress=told.append, **GIVEN)
    assert figures(found) == figures(here)
    assert found.rows == here.rows
    assert sorted(line.partition(":")[0] for line in told) == ["1 of 3 done", "2 of 3 done", "3 of 3 done"]
    again = swept(parts, tmp_path, num_workers=2, **GIVEN)
    assert (again.num_resumed, again.rows) == (3, here.rows)


def test_a_worker_that_dies_is_replaced(parts, here, tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(workers, "_do", dying_once(marks))
    found = swept(parts, tmp_path / "out", num_workers=2, **GIVEN)
    (mark,) = marks.iterdir()
    assert mark.read_text() != str(os.getpid())
    assert figures(found) == figures(here)
    assert found.rows == here.rows


@pytest.mark.slow
def test_workers_that_die_again_and_again(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_do", dying_always())
    monkeypatch.setattr(workers, "MAX_RETRIES", 1)
    with pytest.raises(EvaluationError, match="died 2 times"):
        swept(parts, tmp_path, num_workers=1, **GIVEN)


def test_a_units_error_comes_as_it_is_and_what_was_running_is_kept(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_do", failing_on(5))
    with pytest.raises(InputError, match="a bad day") as failure:
        swept(parts, tmp_path, num_workers=2, **GIVEN)
    assert failure.value.help == "wait for a better one"
    assert type(failure.value) is InputError
    monkeypatch.undo()
    kept = swept(parts, tmp_path, **GIVEN).num_resumed
    # The one before is done; the one after may have been running.
    assert kept in (1, 2)


def test_gpus_that_are_not_there(parts, tmp_path):
    with pytest.raises(InputError, match="Ray finds 0 here"):
        swept(parts, tmp_path, num_workers=1, gpus_per_worker=1, **GIVEN)


def dying_once(marks):
    """In place of doing a unit: the process ends when the one in the middle is done for the first time.

    Each new process takes seconds to load what it needs: one death is enough.
    """
    do = workers._do

    def dying(unit):
        found = do(unit)
        mark = marks / unit.key
        if unit.told["num_facts"] == [5] and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return dying


def dying_always():
    def dying(unit):
        os.kill(os.getpid(), signal.SIGKILL)

    return dying


def failing_on(num_facts):
    do = workers._do

    def failing(unit):
        if unit.told["num_facts"] == [num_facts]:
            raise InputError("a bad day", where=str(unit), help="wait for a better one")
        return do(unit)

    return failing
