"""Pins, versions asked for by number, two names for one table, tables that are exchanged, and the memory budget."""

from __future__ import annotations

import asyncio
import gc
import shutil

import pytest
from library_samples import PATIENCE_S, Follower, blocked, change, encoder, make, model, run, values

from kblam_ray import KnowledgeBase, load_encoder
from kblam_ray.errors import ConflictError, NotServedError, UnavailableError
from kblam_ray.serving.library.shelf import Shelf
from kblam_ray.serving.wanted import KbSpec


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "kb")


def make_versions(uri: str, num_versions: int, num_facts: int = 5) -> KnowledgeBase:
    """Version n says n."""
    kb = make(uri, num_facts)
    for version in range(1, num_versions):
        assert change(kb, str(version), num_facts) == version
    return kb


def test_rolling_back_by_a_pin_and_following_again(uri):
    kb = make_versions(uri, 4)

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            newest = await it.memory()
            it.follow(kb=KbSpec(uri, version=1))
            await it.until_version(1)
            pinned = await it.memory()
            assert (values(pinned), values(newest)) == ({"1"}, {"3"})
            assert (it.report().pinned, it.report().latest_version, it.report().lag_s) == (1, 3, 0)
            # What is committed meanwhile is seen, and not served.
            change(kb, "4")
            await it.until(lambda: it.report().latest_version == 4)
            assert (await it.memory(min_version=1)).version == 1
            with pytest.raises(ConflictError, match="is pinned at version 1, not 2"):
                await it.memory(min_version=2, wait_s=PATIENCE_S)
            it.follow(kb=KbSpec(uri, version=2, at_least=4))
            await it.until_version(2)
            it.follow(kb=uri)
            assert values(await it.memory(min_version=4)) == {"4"}

    run(test)


def test_a_pin_moves_while_a_version_is_fetched(uri):
    make_versions(uri, 4)

    async def test():
        async with Follower() as it:
            it.follow(kb=KbSpec(uri, version=0))
            await it.memory()
            with blocked(it) as block:
                it.follow(kb=KbSpec(uri, version=1))
                await it.until(lambda: block.is_holding)
                it.follow(kb=KbSpec(uri, version=2))
                block.set()
                await it.until_version(2)
            assert values(await it.memory()) == {"2"}
            assert it.report().status == "ready"

    run(test)


def test_a_pin_at_a_version_that_is_not_there(uri):
    kb = make_versions(uri, 2)

    async def test():
        async with Follower() as it:
            it.follow(kb=KbSpec(uri, version=7), good=uri)
            with pytest.raises(UnavailableError, match="no version 7"):
                await it.memory()
            assert it.report().status == "failed"
            await it.memory("good")
            # With something good to serve, that goes on, and the report says what is wrong.
            it.follow(kb=KbSpec(uri, version=7), good=KbSpec(uri, version=7))
            await it.until_status("unreachable", "good")
            assert "no version 7" in it.report("good").error
            assert (await it.memory("good")).version == 1
            it.follow(kb=uri, good=KbSpec(uri, version=0))
            await it.until_status("ready", "good")
            assert (await it.memory("good")).version == 0
            await it.until_status("ready")  # until then a question is told of the failure before
            assert (await it.memory()).version == 1
            # Vacuumed: the files of version 1 are gone, what was read of them is not.
            change(kb, "2")
            kb.compact()
            kb.vacuum(0, allow_short=True)
            await it.until(lambda: it.report().version >= 3)
            it.follow(kb=KbSpec(uri, version=1))
            await it.until_status("unreachable")
            assert "no longer exists" in it.report().error
            assert values(await it.memory()) == {"2"}
            with pytest.raises(NotServedError, match="no version 1"):
                await it.memory(version=1)

    run(test)


def test_a_version_asked_for_by_number(uri):
    kb = make_versions(uri, 4)

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            assert (await it.memory(version=3)).version == 3
            with blocked(it) as block:
                asked = [asyncio.create_task(it.memory(version=1)) for _ in range(5)]
                block.set()
                memories = await asyncio.gather(*asked)
            assert (block.num_held, {memory.version for memory in memories}) == (1, {1})
            assert values(memories[0]) == {"1"}
            # It stays when the table moves on, and so does the one that was served when it was asked for.
            assert (await it.memory()).version == 3
            change(kb, "4")
            assert values(await it.memory(min_version=4)) == {"4"}
            with blocked(it) as block:
                assert values(await it.memory(version=1)) == {"1"}
                assert values(await it.memory(version=3)) == {"3"}
            assert block.num_held == 0
            assert (await it.memory()).version == 4
            for version in (9, -1):
                with pytest.raises(NotServedError, match=f"no version {version} "):
                    await it.memory(version=version)
            with pytest.raises(ConflictError, match="asks for version 1, not 2"):
                await it.memory(version=1, min_version=2)
            # A pin does not hide other versions from those who ask for them.
            it.follow(kb=KbSpec(uri, version=0))
            await it.until_version(0)
            assert values(await it.memory(version=2)) == {"2"}

    run(test)


def test_two_names_for_one_table_share_what_they_serve(uri):
    kb = make_versions(uri, 3, 50)

    async def test():
        async with Follower() as it:
            with blocked(it) as block:
                block.set()
                it.follow(a=uri, b=uri, old=KbSpec(uri, version=0))
                a, b, old = [await it.memory(name) for name in ("a", "b", "old")]
            assert a is b
            assert (a.version, values(old)) == (2, {"0"})
            assert block.num_held == 2
            it.follow(b=uri, old=KbSpec(uri, version=0))
            change(kb, "3", 50)
            assert (await it.memory("b", min_version=3)).version == 3
            assert (await it.memory("old")).version == 0
            it.follow(b=KbSpec(uri, version=0), old=KbSpec(uri, version=0))
            await it.until_version(0, "b")
            assert await it.memory("b") is old

    run(test)


def test_a_version_is_shared_though_others_switched_in_the_moment_when_it_was_made(uri, monkeypatch):
    make_versions(uri, 3)
    keep = Shelf.keep

    async def test():
        async with Follower() as it:

            def keep_while_others_switch(shelf, kept):
                keep(shelf, kept)
                it.library._tidy(shelf)

            monkeypatch.setattr(Shelf, "keep", keep_while_others_switch)
            it.follow(old=KbSpec(uri, version=0))
            old = await it.memory("old")
            it.follow(old=KbSpec(uri, version=0), b=KbSpec(uri, version=0))
            assert await it.memory("b") is old

    run(test)


def test_a_name_for_another_table(uri, tmp_path):
    """Version 2 of the old table is no version of the new one, however briefly."""
    make_versions(uri, 3)
    make(str(tmp_path / "other"), value="other")

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            old = await it.memory()
            with blocked(it) as block:
                it.follow(kb=str(tmp_path / "other"))
                assert (it.report().version, it.report().status) == (None, "loading")
                waiting = asyncio.create_task(it.memory())
                await it.until(lambda: block.is_holding)
                assert not waiting.done()
                block.set()
                assert values(await waiting) == {"other"}
            assert (await it.memory()).version == 0
            assert values(old) == {"2"}

    run(test)


@pytest.mark.parametrize("num_versions", [1, 3, 5])
def test_a_table_made_anew_is_loaded_anew(uri, tmp_path, num_versions):
    make_versions(uri, 3)
    other = str(tmp_path / "other")
    kb = KnowledgeBase.create(other, encoder())
    for version in range(num_versions):
        kb.upsert([("e1", "p", f"new {version}"), (f"n{version}", "p", "new")])

    async def test():
        async with Follower() as it:
            it.follow(kb=uri)
            old = await it.memory()
            assert values(await it.memory(version=1)) == {"1"}
            shutil.rmtree(uri)
            await it.until_status("unreachable")
            assert await it.memory() is old
            shutil.move(other, uri)
            await it.until_status("ready")
            new = await it.memory()
            assert (new.version, values(new)) == (num_versions - 1, {f"new {num_versions - 1}", "new"})
            assert new.source != old.source
            if num_versions > 1:
                assert values(await it.memory(version=0)) == {"new 0", "new"}
            assert values(old) == {"2"}

    run(test)


def test_a_table_of_another_encoder_is_never_served(uri, tmp_path):
    make(uri)
    other = KnowledgeBase.create(str(tmp_path / "other"), load_encoder("hashing:32"))
    other.upsert([("e0", "p", "other")])

    async def test():
        async with Follower() as it:
            it.follow(kb=uri, other=other.uri)
            with pytest.raises(UnavailableError, match="the adapter reads encoder"):
                await it.memory("other")
            await it.memory()
            shutil.rmtree(uri)
            shutil.move(other.uri, uri)
            await it.until_status("failed")
            assert (it.report().version, it.report().nbytes) == (None, 0)
            with pytest.raises(UnavailableError, match="the adapter reads encoder"):
                await it.memory()
            shutil.rmtree(uri)
            make(uri, value="again")
            await it.until_status("ready")
            assert values(await it.memory()) == {"again"}

    run(test)


def budget_of(*uris: str) -> int:
    """Room for these tables and not much more."""
    return round(1.1 * sum(model().load(uri).nbytes for uri in uris)) + 4_000


@pytest.fixture
def uris(tmp_path) -> list[str]:
    names = [str(tmp_path / f"kb{number}") for number in range(4)]
    for number, name in enumerate(names):
        make(name, 200, str(number))
    return names


def loaded(it: Follower) -> set[str]:
    return {name for name, report in it.library.reports().items() if report.version is not None}


def test_the_budget_keeps_what_was_asked_for_last(uris):
    async def test():
        async with Follower(budget_bytes=budget_of(*uris[:2])) as it:
            it.follow(**{f"kb{number}": uri for number, uri in enumerate(uris)})
            await it.until(lambda: all(report.status != "loading" for report in it.library.reports().values()))
            # Nobody asked yet: the first to come fill the room, and the others do not throw them out.
            assert len(loaded(it)) == 2
            for number in (0, 1, 2, 3, 2, 0, 3):
                memory = await it.memory(f"kb{number}")
                assert values(memory) == {str(number)}
                del memory
                assert f"kb{number}" in loaded(it)
                assert len(loaded(it)) <= 2
            assert loaded(it) == {"kb0", "kb3"}
            unloaded = it.report("kb1")
            assert (unloaded.status, unloaded.nbytes, unloaded.error, unloaded.lag_s) == ("unloaded", 0, None, 0)
            assert unloaded.num_facts == 200
            # What happens to the table of one that is unloaded is seen when it is asked for.
            KnowledgeBase.open(uris[1], encoder=encoder()).upsert([("e0", "p", "news")])
            it.follow(**{f"kb{number}": KbSpec(uri, at_least=number == 1) for number, uri in enumerate(uris)})
            assert (it.report("kb1").status, it.report("kb1").lag_s) == ("unloaded", 0)
            assert values(await it.memory("kb1")) == {"1", "news"}

    run(test)


def test_what_requests_hold_is_not_unloaded(uris):
    async def test():
        async with Follower(budget_bytes=budget_of(uris[0])) as it:
            it.follow(**{f"kb{number}": uri for number, uri in enumerate(uris)})
            held = [await it.memory("kb0"), await it.memory("kb1")]
            assert {"kb0", "kb1"} <= loaded(it)
            assert await it.memory("kb0") is held[0]
            await it.memory("kb2")
            del held[0]
            gc.collect()
            await it.memory("kb3")
            await it.until(lambda: loaded(it) == {"kb1", "kb3"})
            held.clear()
            gc.collect()
            # With nobody holding it, the next look gets back into the budget.
            await it.until(lambda: loaded(it) == {"kb3"})

    run(test)


def test_what_is_unloaded_while_its_table_is_looked_at_stays_so(uris):
    async def test():
        async with Follower() as it:
            it.follow(kb0=uris[0])
            await it.memory("kb0")
            served = it.library._served["kb0"]
            with blocked(it, "look") as block:
                await it.until(lambda: block.is_holding)
                it.library._unload(served.kept)
                num_tries = block.num_held
                block.set()
                await asyncio.sleep(0.2)  # time enough to load it, were that begun
                assert block.num_held == num_tries
            assert loaded(it) == set()
            assert values(await it.memory("kb0")) == {"0"}

    run(test)


def test_a_knowledge_base_larger_than_the_budget_is_kept_alone(uris):
    async def test():
        async with Follower(budget_bytes=1) as it:
            it.follow(kb0=uris[0])
            assert values(await it.memory("kb0")) == {"0"}
            KnowledgeBase.open(uris[0], encoder=encoder()).upsert([("e0", "p", "news")])
            await it.until_version(1, "kb0")
            it.follow(kb0=uris[0], kb1=uris[1])
            await it.until_version(0, "kb1")  # put while the server runs: somebody wants it now
            gc.collect()
            await it.until(lambda: loaded(it) == {"kb1"})
            assert values(await it.memory("kb0")) == {"0", "news"}

    run(test)


def test_versions_asked_for_by_number_go_when_memory_is_short(uris, tmp_path):
    """Versions that have no fact in common: nothing is shared between them."""
    uri = str(tmp_path / "other")
    kb = make(uri, 200)
    for version in range(1, 4):
        kb.upsert([(f"e{version} {number}", "p", str(version)) for number in range(200)])
        kb.delete([(f"e{version - 1} {number}" if version > 1 else f"e{number}", "p") for number in range(200)])

    async def test():
        async with Follower(budget_bytes=2 * budget_of(uri)) as it:
            it.follow(kb=uri)
            await it.memory()
            shelf = next(iter(it.library._shelves.values()))
            for version in (0, 2, 4, 0, 2):
                assert (await it.memory(version=version)).num_facts == 200
                assert version in shelf.kept
                assert 6 in shelf.kept or it.report().status == "unloaded"
                assert len(shelf.kept) <= 2
            assert values(await it.memory()) == {"3"}
            assert it.report().status == "ready"

    run(test)
