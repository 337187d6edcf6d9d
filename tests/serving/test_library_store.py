"""An object store that goes down for a while: what was read goes on being served, and what is new is fetched after."""

from __future__ import annotations

import asyncio

import pytest
from library_samples import Follower, change, make, run, values

from kblam_ray.errors import UnavailableError
from kblam_ray.serving.library import keeper
from kblam_ray.serving.wanted import KbSpec

NOWHERE = "http://127.0.0.1:9"


def test_the_store_is_down_and_comes_back(s3_uri, s3_endpoint, monkeypatch):
    kb = make(f"{s3_uri}/kb")
    make(f"{s3_uri}/late", value="late")
    monkeypatch.setattr(keeper, "SLOW_LOOK_S", 60)  # so that it is the store's own error that is reported

    async def test():
        async with Follower() as it:
            it.follow(kb=kb.uri)
            first = await it.memory()
            change(kb, "1")
            await it.until_version(1)
            monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
            changes = it.changes
            it.follow(kb=kb.uri, late=f"{s3_uri}/late")
            await it.until_status("unreachable")
            assert it.changes > changes
            assert "AWS_ENDPOINT_URL" in it.report().error
            assert (await it.memory()).version == 1
            assert values(first) == {"0"}
            with pytest.raises(UnavailableError, match="cannot be loaded"):
                await it.memory("late")
            with pytest.raises(UnavailableError, match="version 0 of the knowledge base"):
                await it.memory(version=0)
            assert 'kblam_kb_refresh_failures_total{kb="kb",process="tester"}' in it.metrics.text()
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
            await asyncio.to_thread(change, kb, "2")
            assert values(await it.memory(min_version=2, wait_s=60)) == {"2"}
            await it.until_status("ready")
            assert it.report().error is None
            await it.until_status("ready", "late")
            assert values(await it.memory("late")) == {"late"}

    run(test)


def test_a_store_that_does_not_answer_is_said_to_be_unreachable(tmp_path, monkeypatch):
    """The question stands meanwhile, and its answer ends it."""
    kb = make(str(tmp_path / "kb"))

    async def test():
        answers = asyncio.Event()
        async with Follower() as it:
            it.follow(kb=kb.uri)
            await it.memory()
            shelf = next(iter(it.library._shelves.values()))
            look = shelf.look

            async def slow_look():
                await answers.wait()
                return await look()

            monkeypatch.setattr(shelf, "look", slow_look)
            monkeypatch.setattr(keeper, "SLOW_LOOK_S", 0.05)  # not before: a first look may take longer
            await it.until_status("unreachable")
            assert "has not answered" in it.report().error
            it.follow(kb=KbSpec(kb.uri, at_least=change(kb, "1")))
            assert (await it.memory()).version == 0
            answers.set()
            await it.until_version(1)
            await it.until_status("ready")

    run(test)
