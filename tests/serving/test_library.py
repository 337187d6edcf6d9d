"""The library follows tables: a request gets one whole version, the newest or the one that is wanted."""

from __future__ import annotations

import asyncio
import threading

import pytest
from library_samples import KB, Follower, blocked, change, encoder, make, run, values

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import ConflictError, NotServedError, UnavailableError
from kblam_ray.serving.library import fetcher
from kblam_ray.serving.messages import FactFilter, KbRef
from kblam_ray.serving.wanted import KbSpec


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "kb")


def test_a_knowledge_base_loads_in_the_background_and_follows_its_table(uri):
    kb = make(uri)

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            assert it.report().status == "loading"
            await it.until_status("ready")
            first = await it.memory()
            assert (first.version, first.num_facts, values(first)) == (0, 5, {"0"})
            assert it.report() == it.report().__class__(
                uri=uri,
                pinned=None,
                version=0,
                latest_version=0,
                num_facts=5,
                encoder=encoder().spec.name,
                status="ready",
                nbytes=it.report().nbytes,
            )
            assert it.report().nbytes >= first.nbytes
            changes = it.changes
            kb.upsert([("e0", "p", "1")])
            kb.delete([("e1", "p")])
            await it.until_version(2)
            assert it.changes > changes
            second = await it.memory()
            assert (second.num_facts, values(second), it.report().num_facts) == (4, {"0", "1"}, 4)
            assert it.report().refresh_s > 0
            assert it.report().lag_s == 0
            # Only what changed was fetched, and who has the old version keeps it.
            assert second.views[0].chunk is first.views[0].chunk
            assert (first.version, first.num_facts, values(first)) == (0, 5, {"0"})
            text = it.metrics.text()
            assert 'kblam_kb_version{kb="kb",process="tester"} 2.0' in text
            assert 'kblam_kb_refresh_seconds_count{kb="kb",process="tester"}' in text
            it.follow()
            assert it.library.reports() == {}
            assert 'kb="kb"' not in it.metrics.text()
            with pytest.raises(NotServedError):
                await it.memory()

    run(test)


def test_compactions_move_the_version_on_and_copy_nothing(uri):
    kb = make(uri)
    change(kb, "1")

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            before = await it.memory()
            version = kb.compact()
            kb.vacuum(0, allow_short=True)
            after = await it.memory(min_version=version)
            assert after.version >= version
            assert [view.chunk for view in after.views] == [view.chunk for view in before.views]

    run(test)


def test_a_version_known_to_be_committed_is_fetched_at_once(uri):
    """No poll comes in time: the two ways to say that there is news do it."""
    kb = make(uri)

    async def test():
        async with Follower(poll_s=3600) as it:
            it.follow(kb=uri)
            assert (await it.memory()).version == 0
            await it.until_status("ready")
            it.follow(kb=KbSpec(uri, at_least=change(kb, "1")))
            await it.until_version(1)
            change(kb, "2")
            assert values(await it.memory(min_version=2)) == {"2"}
            # A version that does not come: 409 after the wait, and none at all where it is there.
            with pytest.raises(ConflictError, match="serves version 2, not 3 or newer"):
                await it.memory(min_version=3, wait_s=0.05)
            assert (await it.memory(min_version=2, wait_s=0)).version == 2

    run(test)


def test_lag_is_how_long_a_newer_version_is_known(uri):
    kb = make(uri)

    async def test():
        async with Follower(poll_s=3600) as it:
            it.follow(kb=uri)
            await it.memory()
            await it.until_status("ready")
            it.follow(kb=KbSpec(uri, at_least=7))
            await it.until(lambda: it.report().lag_s == 0)
            change(kb, "1")
            with blocked(it) as block:
                it.follow(kb=KbSpec(uri, at_least=1))
                await it.until(lambda: it.report().lag_s > 0.05)
                assert (it.report().version, it.report().status) == (0, "ready")
                assert 'kblam_kb_lag_seconds{kb="kb",process="tester"} 0.0\n' not in it.metrics.text()
                block.set()
                await it.until_version(1)
            assert it.report().lag_s == 0

    run(test)


def test_many_changes_are_fetched_together(uri):
    kb = make(uri)

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            await it.memory()
            with blocked(it) as block:
                change(kb, "1")
                await it.until(lambda: block.is_holding)
                for value in range(2, 30):
                    it.follow(kb=KbSpec(uri, at_least=change(kb, str(value))))
                block.set()
                assert values(await it.memory(min_version=29)) == {"29"}
            assert block.num_held == 2

    run(test)


def test_thousands_of_requests_during_switches_see_whole_versions(uri):
    """All facts of version n have the value n; whoever gets a memory finds nothing else in it."""
    kb = make(uri, 20)
    last = 12

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            await it.memory()
            seen: dict[int, KnowledgeMemory] = {}
            is_over = False
            num_asked = 0

            async def ask() -> None:
                nonlocal num_asked
                newest = 0
                while not is_over:
                    memory = await it.memory()
                    assert memory.version >= newest
                    newest = memory.version
                    num_asked += 1
                    seen.setdefault(newest, memory)
                    await asyncio.sleep(0.001)  # or the threads that fetch get no turn

            askers = [asyncio.create_task(ask()) for _ in range(50)]
            for value in range(1, last + 1):
                await asyncio.to_thread(change, kb, str(value), 20)
                if value % 3 == 0:
                    await it.until_version(value)
            await it.until_version(last)
            await it.until(lambda: num_asked > 2_000)
            is_over = True
            await asyncio.gather(*askers)
            assert len(seen) >= 5
            for version, memory in seen.items():
                assert (values(memory), memory.num_facts, memory.version) == ({str(version)}, 20, version)

    run(test)


def test_requests_wait_for_the_first_version_and_hear_of_a_failure(uri, tmp_path):
    make(uri)

    async def test():
        async with Follower() as it:
            with blocked(it) as block:
                it.follow(kb=uri, none=str(tmp_path / "nothing"))
                early = [asyncio.create_task(it.memory()) for _ in range(3)]
                with pytest.raises(UnavailableError, match="there is no table"):
                    await it.memory("none")
                assert (it.report("none").status, it.report("none").version) == ("failed", None)
                assert "there is no table" in it.report("none").error
                with pytest.raises(ConflictError, match="serves no version yet, not 0 or newer"):
                    await it.memory(min_version=0, wait_s=0.05)
                await it.until(lambda: block.is_holding)
                assert not any(task.done() for task in early)
                early.pop().cancel()
                block.set()
                assert [memory.version for memory in await asyncio.gather(*early)] == [0, 0]
            # One load for all of them; and the table that comes late is found by the next look.
            assert block.num_held == 1
            make(str(tmp_path / "nothing"), value="late")
            await it.until_status("ready", "none")
            assert values(await it.memory("none")) == {"late"}
            with pytest.raises(NotServedError, match="no knowledge base 'other'"):
                await it.memory("other")

    run(test)


def test_a_name_removed_while_requests_wait(uri):
    make(uri)

    async def test():
        async with Follower() as it:
            with blocked(it) as block:
                it.follow(kb=uri)
                waiting = asyncio.create_task(it.memory())
                by_number = asyncio.create_task(it.memory(version=0))
                await it.until(lambda: block.is_holding)
                it.follow()
                with pytest.raises(NotServedError):
                    await waiting
                with pytest.raises(UnavailableError, match="served no more"):
                    await by_number

    run(test)


def test_a_name_removed_while_the_table_is_looked_at_for_a_version(uri):
    change(make(uri), "1")

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            await it.memory()
            with blocked(it, "look") as block:
                by_number = asyncio.create_task(it.memory(version=0))
                await it.until(lambda: block.num_held == 2)  # the other look is the follower's
                it.follow()
                block.set()
                with pytest.raises(UnavailableError, match="served no more"):
                    await by_number

    run(test)


def test_closing_while_loads_run(uri, tmp_path, monkeypatch):
    make(uri)
    make(str(tmp_path / "other"))
    release, began = threading.Event(), threading.Event()
    warmed = fetcher._warmed

    def slowly(memory):
        began.set()
        release.wait(60)
        return warmed(memory)

    monkeypatch.setattr(fetcher, "_warmed", slowly)

    async def test():
        it, before = Follower(), asyncio.all_tasks()
        async with it:
            it.follow(kb=uri, other=str(tmp_path / "other"))
            waiting = asyncio.create_task(it.memory())
            await it.until(began.is_set)
        assert not release.is_set()
        with pytest.raises(UnavailableError, match="stopping"):
            await waiting
        release.set()
        assert asyncio.all_tasks() == before

    run(test)


def test_an_error_of_our_own_does_not_end_the_following(uri, monkeypatch, caplog):
    kb = make(uri)
    warmed, is_broken = fetcher._warmed, True

    def breaking(memory):
        if is_broken:
            raise ZeroDivisionError("a mistake")
        return warmed(memory)

    async def test():
        nonlocal is_broken
        async with Follower() as it:
            it.follow(kb=uri)
            is_broken = False
            await it.memory()
            is_broken = True
            change(kb, "1")
            await it.until_status("unreachable")
            assert it.report().error == "a mistake"
            assert (await it.memory()).version == 0
            is_broken = False
            await it.until_status("ready")
            assert (await it.memory()).version == 1
            assert it.report().error is None

    is_broken = False
    monkeypatch.setattr(fetcher, "_warmed", breaking)
    run(test)
    assert any(record.exc_info for record in caplog.records if record.levelname == "WARNING")


def test_an_empty_knowledge_base(uri):
    kb = make(uri, 1)
    kb.delete([("e0", "p")])

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            empty = await it.memory()
            assert (empty.num_facts, empty.version, it.report().num_facts) == (0, 1, 0)
            assert (await it.library.find_facts(KB, FactFilter())).data == ()
            change(kb, "1")
            assert (await it.memory(min_version=2)).num_facts == 5
            kb.delete([(f"e{number}", "p") for number in range(5)])
            assert (await it.memory(min_version=3)).num_facts == 0

    run(test)


def test_a_location_that_no_table_can_have():
    async def test():
        async with Follower() as it:
            it.follow(kb="ftp://host/kb")
            assert it.report().status == "failed"
            for version in (None, 3):
                with pytest.raises(UnavailableError):
                    await it.library.memory(KbRef("kb", version))

    run(test)
