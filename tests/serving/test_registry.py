"""The registry: what is wanted changes one after the other, and "every replica serves it" is never said too early."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from registry_samples import LEASE_S, URI, Process, answerer, in_own_time, kb_report, now, settled, started

from kblam_ray.errors import InputError, NotServedError, StorageError, UnavailableError
from kblam_ray.serving.registry import Registry, State, StateStore
from kblam_ray.serving.wanted import KbSpec, ProcessReport

KB = {"capitals": KbSpec(URI)}


def waiting(registry: Registry, version: int, timeout_s: float = 30.0) -> asyncio.Task[bool]:
    return asyncio.ensure_future(registry.wait_served("capitals", version, timeout_s))


async def turns(count: int = 20) -> None:
    """Let whatever can run do so; no time passes."""
    for _ in range(count):
        await asyncio.sleep(0)


# What is wanted


@in_own_time
async def test_changes_of_what_is_wanted():
    registry = await started(KB)
    first = await registry.wanted()
    assert dict(first.knowledge_bases) == KB
    second = await registry.put("airports", "/tables/airports", 3)
    assert second == await registry.wanted()
    assert second.revision > first.revision
    assert second.knowledge_bases["airports"] == KbSpec("/tables/airports", 3)
    third = await registry.remove("capitals")
    assert dict(third.knowledge_bases) == {"airports": KbSpec("/tables/airports", 3)}
    assert (await registry.put("airports", "/tables/airports", 3)).revision == third.revision, "nothing has changed"
    assert pickle.loads(pickle.dumps(third)) == third


@in_own_time
async def test_waiting_for_another_revision():
    registry = await started(KB)
    known = (await registry.wanted()).revision
    began = now()
    assert (await registry.wanted(known, 2.5)).revision == known
    assert now() - began == pytest.approx(2.5, abs=0.01)
    assert (await registry.wanted(known)).revision == known
    waiters = [asyncio.ensure_future(registry.wanted(known, 60)) for _ in range(100)]
    await turns()
    changed = await registry.put("airports", "/tables/airports", None)
    assert await asyncio.gather(*waiters) == [changed] * 100
    assert now() - began < 3
    assert await registry.wanted(known, 60) == changed


@in_own_time
async def test_removing_what_is_not_there():
    registry = await settled(KB)
    with pytest.raises(NotServedError, match="no knowledge base 'airports'"):
        await registry.remove("airports")
    await registry.remove("capitals")
    with pytest.raises(NotServedError):
        await registry.remove("capitals")


@pytest.mark.parametrize(
    ("name", "uri", "version"),
    [
        ("", URI, None),
        ("a b", URI, None),
        ("../a", URI, None),
        ("-a", URI, None),
        ("a\n", URI, None),
        ("a" * 65, URI, None),
        (None, URI, None),
        ("a", "", None),
        ("a", "  ", None),
        ("a", "gs://bucket/kb", None),
        ("a", "/with\nline", None),
        ("a", "/\udc80", None),
        ("a", "/" + "x" * 5000, None),
        ("a", None, None),
        ("a", URI, -1),
        ("a", URI, True),
        ("a", URI, 1.0),
        ("a", URI, "1"),
    ],
)
@in_own_time
async def test_names_uris_and_versions_that_are_none(name, uri, version):
    registry = await started(KB)
    before = await registry.wanted()
    with pytest.raises(InputError):
        await registry.put(name, uri, version)
    assert await registry.wanted() == before
    with pytest.raises(InputError):
        Registry(StateStore(None), {name: KbSpec(uri, version)}, LEASE_S)


@in_own_time
async def test_uris_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registry = await started({"a": KbSpec("kb/")})
    assert (await registry.wanted()).knowledge_bases["a"].uri == f"{tmp_path}/kb"
    assert (await registry.put("a", "file:///x/y", None)).knowledge_bases["a"].uri == "/x/y"


def test_before_the_start_nothing_is_said():
    registry = Registry(StateStore(None), KB, LEASE_S)
    for call in (
        registry.wanted(),
        registry.describe(),
        registry.put("a", URI, None),
        registry.remove("capitals"),
        registry.wait_served("capitals", 1, 1),
        registry.report(answerer("a")),
    ):
        with pytest.raises(UnavailableError, match="not read its state yet"):
            asyncio.run(call)


@in_own_time
async def test_what_is_committed_is_told_at_once_and_only_forwards():
    registry = await started({**KB, "pinned": KbSpec("/tables/pinned", 2)})
    known = (await registry.wanted()).revision
    waiter = asyncio.ensure_future(registry.wanted(known, 60))
    await turns()
    await registry.committed("capitals", 7)
    told = await waiter
    assert told.knowledge_bases["capitals"] == KbSpec(URI, None, 7)
    for name, version in (("capitals", 7), ("capitals", 6), ("pinned", 9), ("unknown", 3)):
        await registry.committed(name, version)
        assert await registry.wanted() == told
    assert (await registry.put("capitals", URI, 5)).knowledge_bases["capitals"] == KbSpec(URI, 5)
    assert (await registry.put("capitals", URI, None)).knowledge_bases["capitals"] == KbSpec(URI)


class SlowStore(StateStore):
    """A store whose writes wait for `go`, and fail where told to."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.go, self.fails, self.written = threading.Event(), False, []

    def write(self, state: State) -> None:
        assert self.go.wait(30)
        if self.fails:
            raise StorageError("the store is down", where=self.uri, help="start it")
        super().write(state)
        self.written.append(set(state.knowledge_bases))


def test_changes_at_the_same_time_happen_one_after_the_other(tmp_path):
    """Each builds on the one before: none is lost, and the object holds what memory does."""

    async def test() -> None:
        store = SlowStore(str(tmp_path / "state.json"))
        store.go.set()
        registry = Registry(store, {}, LEASE_S)
        await registry.start()
        store.go.clear()
        changes = [asyncio.ensure_future(registry.put(f"kb{number}", URI, number)) for number in range(5)]
        changes += [asyncio.ensure_future(registry.remove("kb1")), asyncio.ensure_future(registry.put("kb1", URI, 9))]
        changes += [asyncio.ensure_future(registry.remove("kb2"))]
        await turns()
        assert (await registry.wanted()).knowledge_bases == {}, "what is not durable is not told"
        store.go.set()
        told = await asyncio.gather(*changes)
        assert [wanted.revision for wanted in told] == sorted({wanted.revision for wanted in told})
        expected = {name: KbSpec(URI, version) for name, version in {"kb0": 0, "kb1": 9, "kb3": 3, "kb4": 4}.items()}
        assert (await registry.wanted()).knowledge_bases == expected
        found = StateStore(store.uri).read()
        assert found is not None
        assert found.knowledge_bases == expected
        assert len(store.written) == 9

    asyncio.run(test())


def test_a_change_whose_caller_goes_is_carried_out(tmp_path):
    async def test() -> None:
        store = SlowStore(str(tmp_path / "state.json"))
        store.go.set()
        registry = Registry(store, {}, LEASE_S)
        await registry.start()
        store.go.clear()
        change = asyncio.ensure_future(registry.put("capitals", URI, None))
        await turns()
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        known = (await registry.wanted()).revision
        store.go.set()
        assert (await registry.wanted(known, 30)).knowledge_bases == KB

    asyncio.run(test())


def test_a_store_that_goes_down_changes_nothing_and_the_next_change_writes_all(tmp_path):
    async def test() -> None:
        store = SlowStore(str(tmp_path / "state.json"))
        store.go.set()
        registry = Registry(store, KB, LEASE_S)
        await registry.start()
        before = await registry.wanted()
        store.fails = True
        for change in (
            registry.put("airports", URI, None),
            registry.put("capitals", URI, 1),
            registry.remove("capitals"),
        ):
            with pytest.raises(StorageError, match="the store is down"):
                await change
        assert await registry.wanted() == before
        with pytest.raises(NotServedError):
            await asyncio.wait_for(registry.remove("airports"), 30)
        store.fails = False
        StateStore(store.uri).write(State({"landed": KbSpec("/after/all")}))  # a put whose answer was lost
        assert await registry.put("capitals", URI, None) == before
        found = StateStore(store.uri).read()
        assert found is not None
        assert found.knowledge_bases == KB, "the object is what is told, though nothing was to change"

    asyncio.run(test())


def test_two_registries_on_one_object_the_last_write_wins_whole(tmp_path):
    async def test() -> None:
        uri = str(tmp_path / "state.json")
        one, other = (Registry(StateStore(uri), {}, LEASE_S) for _ in range(2))
        await one.start()
        await other.start()
        for number in range(10):
            await asyncio.gather(one.put(f"one{number}", "/one", None), other.put(f"other{number}", "/other", None))
            found = StateStore(uri).read()
            assert found is not None
            assert found.knowledge_bases in (
                (await one.wanted()).knowledge_bases,
                (await other.wanted()).knowledge_bases,
            )

    asyncio.run(test())


# Who serves it


@in_own_time
async def test_a_young_registry_cannot_say_that_everybody_serves():
    registry = await started(KB)
    process = Process(registry, "a", capitals=kb_report(5))
    life = asyncio.ensure_future(process.live())
    await turns()
    assert not await registry.wait_served("capitals", 5, 0)
    assert not (await registry.describe()).is_settled
    began = now()
    assert await registry.wait_served("capitals", 5, 30)
    assert now() - began == pytest.approx(LEASE_S, abs=0.01)
    assert (await registry.describe()).is_settled
    assert await registry.wait_served("capitals", 5, 0)
    life.cancel()


@in_own_time
async def test_nobody_serves_where_nobody_lives():
    registry = await settled(KB)
    await registry.report(ProcessReport("g", "gateway"))
    began = now()
    assert not await registry.wait_served("capitals", 5, 4)
    assert now() - began == pytest.approx(4, abs=0.01)


@in_own_time
async def test_every_answerer_counts_and_no_other_process():
    registry = await settled(KB)
    wanted = await registry.wanted()
    await registry.report(ProcessReport("w", "writer", {}, wanted))
    await registry.report(answerer("a", wanted, capitals=kb_report(5)))
    await registry.report(answerer("b", wanted, capitals=kb_report(4)))
    assert not await registry.wait_served("capitals", 5, 0)
    assert await registry.wait_served("capitals", 4, 0), "a newer one is as good"
    waiter = waiting(registry, 5, 1)
    await turns()
    assert not waiter.done()
    await registry.report(answerer("b", await registry.wanted(), capitals=kb_report(5)))
    assert await waiter


@pytest.mark.parametrize(
    "report",
    [
        kb_report(None),
        kb_report(None, status="failed", error="gone"),
        kb_report(9, status="failed"),
        kb_report(9, uri="/tables/another"),
        kb_report(9, pinned=9),
        kb_report(4, status="unreachable"),
        None,
    ],
)
@in_own_time
async def test_a_replica_that_does_not_serve_it(report):
    registry = await settled(KB)
    wanted = await registry.wanted()
    await registry.report(answerer("a", wanted, capitals=kb_report(9)))
    await registry.report(answerer("b", wanted, **({} if report is None else {"capitals": report})))
    assert not await registry.wait_served("capitals", 5, 0.5)
    await registry.report(answerer("b", wanted, capitals=kb_report(5, status="unreachable")))
    assert await registry.wait_served("capitals", 5, 0), "a table that cannot be read is served still"


@in_own_time
async def test_a_replica_that_leaves_or_dies_is_waited_for_no_more():
    registry = await settled(KB)
    good = Process(registry, "good", capitals=kb_report(5))
    life = asyncio.ensure_future(good.live())
    await registry.report(answerer("leaving", capitals=kb_report(4)))
    waiter = waiting(registry, 5)
    await turns()
    assert not waiter.done()
    await registry.leave("leaving")
    assert await waiter
    await registry.leave("leaving")
    await registry.report(answerer("dying", capitals=kb_report(4)))
    began = now()
    assert await registry.wait_served("capitals", 5, 30)
    assert now() - began == pytest.approx(LEASE_S, abs=0.01)
    assert set((await registry.describe()).processes) == {"good"}
    life.cancel()


@in_own_time
async def test_a_replica_that_joins_meanwhile_is_waited_for():
    registry = await settled(KB)
    good = asyncio.ensure_future(Process(registry, "good", capitals=kb_report(4)).live())
    waiter = waiting(registry, 5)
    await turns()
    joining = Process(registry, "joining")
    await joining.report()
    good.cancel()
    await registry.report(answerer("good", await registry.wanted(), capitals=kb_report(5)))
    await turns()
    assert not waiter.done()
    joining.serves["capitals"] = kb_report(None)
    await joining.follow()
    await turns()
    assert not waiter.done()
    joining.serves["capitals"] = kb_report(6)
    await joining.follow()
    assert await waiter


@in_own_time
async def test_what_is_unloaded_counts_once_it_would_be_loaded_new():
    registry = await settled(KB)
    unloaded = Process(registry, "a", capitals=kb_report(None, status="unloaded"))
    await unloaded.follow()
    waiter = waiting(registry, 5)
    await turns()
    assert not waiter.done(), "it may be loading an older version, and has not said so yet"
    assert (await registry.wanted()).knowledge_bases["capitals"].at_least == 5
    await unloaded.report()
    await turns()
    assert not waiter.done()
    await unloaded.follow()
    assert await waiter
    unloaded.serves["capitals"] = kb_report(None, status="unloaded", pinned=3)
    await registry.put("capitals", URI, 3)
    await unloaded.follow()
    assert await registry.wait_served("capitals", 3, 0)


@in_own_time
async def test_a_pin_is_served_by_that_version_alone():
    registry = await settled(KB)
    await registry.report(answerer("a", await registry.wanted(), capitals=kb_report(9)))
    await registry.put("capitals", URI, 4)
    process = Process(registry, "a", capitals=kb_report(9, pinned=4))
    await process.follow()
    assert not await registry.wait_served("capitals", 4, 0), "the pin is known, and the switch still to come"
    process.serves["capitals"] = kb_report(4, pinned=4, latest_version=9)
    await process.follow()
    assert await registry.wait_served("capitals", 4, 0)
    began = now()
    for version in (3, 5, 9):
        assert not await registry.wait_served("capitals", version, 30)
    assert now() == began, "it cannot become true, so nobody waits"


@in_own_time
async def test_a_report_from_before_a_rollback_says_nothing_about_after_it():
    registry = await settled(KB)
    process = Process(registry, "a", capitals=kb_report(7))
    await process.follow()
    await registry.put("capitals", URI, 3)
    await registry.put("capitals", URI, None)
    # The replica is at version 3 by now, perhaps; what it said last is 7, without a pin.
    assert not await registry.wait_served("capitals", 7, 0)
    process.serves["capitals"] = kb_report(3)
    await process.follow()
    assert not await registry.wait_served("capitals", 7, 0)
    process.serves["capitals"] = kb_report(7)
    await process.follow()
    assert await registry.wait_served("capitals", 7, 0)


@pytest.mark.parametrize("change", ["remove", "pin", "move"])
@in_own_time
async def test_what_is_waited_for_may_become_impossible(change):
    registry = await settled(KB)
    life = asyncio.ensure_future(Process(registry, "a", capitals=kb_report(4)).live())
    waiter = waiting(registry, 5, 2)
    await turns()
    began = now()
    if change == "remove":
        await registry.remove("capitals")
    elif change == "pin":
        await registry.put("capitals", URI, 4)
    else:
        await registry.put("capitals", "/tables/another", None)
    assert not await waiter
    assert now() - began == pytest.approx(2 if change == "move" else 0, abs=0.01)
    assert not await registry.wait_served("no such", 5, 0 if change == "move" else 30)
    life.cancel()


@in_own_time
async def test_pinned_at_the_very_version_that_is_waited_for():
    registry = await settled(KB)
    process = Process(registry, "a", capitals=kb_report(4))
    await process.follow()
    waiter = waiting(registry, 5)
    await turns()
    await registry.put("capitals", URI, 5)
    process.serves["capitals"] = kb_report(5, pinned=5)
    await process.follow()
    assert await waiter


@in_own_time
async def test_many_wait_for_many_versions():
    registry = await settled(KB)
    processes = [Process(registry, str(number), capitals=kb_report(0)) for number in range(4)]
    for process in processes:
        await process.follow()
    waiters = [waiting(registry, 1 + number % 10, 2) for number in range(150)]
    hopeless = waiting(registry, 11, 2)
    for version in range(1, 11):
        for process in processes:
            assert not waiters[version - 1].done()
            process.serves["capitals"] = kb_report(version)
            await process.follow()
            await turns(3)
        assert all(waiter.done() == (number % 10 < version) for number, waiter in enumerate(waiters))
    assert all(await asyncio.gather(*waiters))
    assert not await hopeless


@in_own_time
async def test_a_report_without_news_renews_the_lease():
    registry = await settled(KB)
    process = Process(registry, "a", capitals=kb_report(4))
    life = asyncio.ensure_future(process.live())
    waiter = waiting(registry, 5, 10 * LEASE_S)
    await asyncio.sleep(5 * LEASE_S)
    assert set((await registry.describe()).processes) == {"a"}
    process.serves["capitals"] = kb_report(5)
    assert await waiter
    life.cancel()


@in_own_time
async def test_a_report_is_taken_as_it_was_when_it_was_given():
    registry = await settled(KB)
    serves = {"capitals": kb_report(4)}
    await registry.report(answerer("a", await registry.wanted(), **serves))
    report = ProcessReport("b", "answerer", serves)
    await registry.report(report)
    serves["capitals"] = kb_report(9)
    assert not await registry.wait_served("capitals", 9, 0)


def test_it_works_with_the_clock_on_the_wall_too():
    async def test() -> None:
        registry = Registry(StateStore(None), KB, 0.05)
        await registry.start()
        life = asyncio.ensure_future(_live(registry))
        assert await registry.wait_served("capitals", 5, 30)
        life.cancel()

    async def _live(registry: Registry) -> None:
        while True:
            await registry.report(answerer("a", await registry.wanted(), capitals=kb_report(5)))
            await asyncio.sleep(0.01)

    asyncio.run(test())
