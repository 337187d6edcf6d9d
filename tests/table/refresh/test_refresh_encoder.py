"""The encoder of what a refresh commits is the table's, whoever makes the table, and whenever."""

from __future__ import annotations

import os

import pytest
from refresh_samples import contents, once, put, watcher

from kblam_ray import KnowledgeBase
from kblam_ray.errors import EncoderMismatchError, EncoderNotFoundError, TableError
from kblam_ray.table.refresh import run as run_module
from kblam_ray.table.refresh import taking
from kblam_ray.table.refresh.run import Refresher


@pytest.fixture(autouse=True)
def default_encoder(monkeypatch):
    monkeypatch.setattr(taking, "DEFAULT_ENCODER", "hashing:32")


def warm(kb, folder, **others) -> Refresher:
    refresher = watcher(kb, folder, **others)
    refresher._history.look()
    refresher._resident.encoder()
    return refresher


def assert_made_with(kb, dim: int) -> None:
    snapshot = KnowledgeBase.open(str(kb)).snapshot()
    assert snapshot.key_embeddings_MP.shape == (snapshot.facts.num_rows, dim)


def test_a_table_that_another_program_makes_under_a_watcher(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    refresher = warm(kb, folder, encoder=None)
    assert refresher._resident.encoder().spec.dim == 32
    KnowledgeBase.create(str(kb), "hashing:16").upsert([("x", "p", "1")])
    put(folder / "a.jsonl", ("a", "p", "1"))
    refresher._pass()
    assert contents(kb) == {("x", "p"): "1", ("a", "p"): "1"}
    assert_made_with(kb, 16)


def test_embeddings_that_are_kept_are_of_the_table_too(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    refresher = warm(kb, folder, encoder=None)
    refresher._pass()
    assert_made_with(kb, 32)
    os.rename(kb, tmp_path / "old")
    KnowledgeBase.create(str(kb), "hashing:16").upsert([("x", "p", "1")])
    refresher._pass()
    assert contents(kb) == {("x", "p"): "1", ("a", "p"): "1"}
    assert_made_with(kb, 16)


@pytest.mark.parametrize("when", ["while it embeds", "before it commits"])
def test_a_table_that_is_made_in_the_middle_of_a_refresh(tmp_path, monkeypatch, when):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    refresher = warm(kb, folder, encoder=None)
    step = "texts_of" if when == "while it embeds" else "commit"
    real, calls = getattr(taking, step), []

    def late(*arguments):
        calls.append(step)
        if len(calls) == 1:
            KnowledgeBase.create(str(kb), "hashing:16", identity="entity,property,value").upsert([("x", "p", "1")])
        return real(*arguments)

    monkeypatch.setattr(taking, step, late)
    refresher._pass()
    refresher._pass()
    assert contents(kb) == {("x", "p"): "1", ("a", "p"): "1"}
    assert_made_with(kb, 16)


def test_a_table_that_is_made_in_the_middle_of_a_backlog(tmp_path, monkeypatch):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    put(folder / "a.jsonl", ("a", "p", "1"))
    refresher = watcher(kb, folder, encoder=None, small_texts=0)

    def late(*_, **__):
        KnowledgeBase.create(str(kb), "hashing:16").upsert([("x", "p", "1")])
        raise EncoderMismatchError("the table was made with another encoder", help="use it")

    monkeypatch.setattr(run_module, "take_up_backlog", late)
    pending, has_progressed = refresher._pass()
    assert (len(pending.files), has_progressed) == (1, False)
    # The same table as at the look: nothing would ever come of trying again.
    monkeypatch.setattr(KnowledgeBase, "create", lambda *_: KnowledgeBase.open(str(kb)))
    with pytest.raises(EncoderMismatchError):
        refresher._pass()


def test_an_encoder_that_was_asked_for_is_not_given_up(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    refresher = warm(kb, folder, encoder="hashing:32")
    KnowledgeBase.create(str(kb), "hashing:16").upsert([("x", "p", "1")])
    put(folder / "a.jsonl", ("a", "p", "1"))
    with pytest.raises(EncoderMismatchError, match="16 numbers"):
        refresher._pass()
    assert contents(kb) == {("x", "p"): "1"}


def test_once_refuses_what_does_not_fit_though_nothing_is_to_do(tmp_path):
    kb, folder = tmp_path / "kb", tmp_path / "in"
    with pytest.raises(EncoderNotFoundError):
        once(kb, folder, encoder="nonsense:16")
    put(folder / "a.jsonl", ("a", "p", "1"))
    once(kb, folder)
    for wrong, error in (
        ({"encoder": "nonsense:16"}, EncoderNotFoundError),
        ({"encoder": "hashing:32"}, EncoderMismatchError),
        ({"identity": "entity,property,value"}, TableError),
    ):
        with pytest.raises(error):
            once(kb, folder, **wrong)
    assert once(kb, folder, encoder=None)["version"] == 0
