"""A registry that is made anew: with a state object it goes by that, without one by what the processes know."""

from __future__ import annotations

import asyncio

import pytest
from registry_samples import LEASE_S, URI, Process, answerer, in_own_time, kb_report, now, settled, started

from kblam_ray.errors import NotServedError, StorageError, UnavailableError
from kblam_ray.serving.registry import Registry, State, StateStore
from kblam_ray.serving.registry.revisions import Revisions
from kblam_ray.serving.wanted import KbSpec, ProcessReport, Wanted

A, B = KbSpec("/tables/a"), KbSpec("/tables/b")


async def told(registry: Registry) -> dict[str, KbSpec]:
    return dict((await registry.wanted()).knowledge_bases)


# With a state object


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> StateStore:
    folder = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")
    return StateStore(f"{folder}/state.json")


@in_own_time
async def test_a_restart_restores_knowledge_bases_and_pins(store):
    registry = await started({"a": A}, store)
    await registry.put("b", B.uri, None)
    await registry.put("a", A.uri, 3)
    await registry.committed("b", 9)
    await registry.put("c", "/tables/c", None)
    await registry.remove("c")
    assert await told(await started({"a": A}, store)) == {"a": KbSpec(A.uri, 3), "b": B}
    assert await told(await started({}, store)) == {"a": KbSpec(A.uri, 3), "b": B}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"a": KbSpec(A.uri, 3)}),
        ({"a": A}, {"a": KbSpec(A.uri, 3)}),
        ({"b": B}, {"a": KbSpec(A.uri, 3), "b": B}),
        ({"a": B}, {"a": B}),
        ({"a": KbSpec(B.uri, 5)}, {"a": KbSpec(B.uri, 5)}),
    ],
)
@in_own_time
async def test_what_the_command_line_gives_is_added(tmp_path, given, expected):
    store = StateStore(str(tmp_path / "state.json"))
    store.write(State({"a": KbSpec(A.uri, 3)}))
    assert await told(await started(given, store)) == expected
    found = store.read()
    assert found is not None
    assert found.knowledge_bases == expected, "added for good"


@in_own_time
async def test_what_is_given_again_unchanged_does_not_undo_later_changes(tmp_path, caplog):
    """As a registry that was killed is given again what the command line gave hours ago."""
    store = StateStore(str(tmp_path / "state.json"))
    registry = await started({"a": A, "b": B}, store)
    await registry.put("a", "/tables/a2", None)
    await registry.remove("b")
    assert await told(await started({"a": A, "b": B}, store)) == {"a": KbSpec("/tables/a2")}
    assert "b was removed" in caplog.text
    assert await told(await started({"a": KbSpec("/tables/a3"), "b": B}, store)) == {"a": KbSpec("/tables/a3")}
    await started({}, store)
    assert await told(await started({"b": B}, store)) == {"a": KbSpec("/tables/a3"), "b": B}


@in_own_time
async def test_with_a_state_object_reports_of_what_was_wanted_count_for_nothing(tmp_path):
    store = StateStore(str(tmp_path / "state.json"))
    old = await started({"a": A}, store)
    before = await old.wanted()
    await old.put("b", B.uri, None)
    registry = await started({"a": A}, store)
    await registry.report(answerer("x", before))
    await registry.report(answerer("y", Wanted((await registry.wanted()).revision + 2**30, {"z": A})))
    assert await told(registry) == {"a": A, "b": B}
    assert await registry.wanted(before.revision) == await registry.wanted(), "known from before: told at once"


@pytest.mark.parametrize("content", [b"", b'{"format": 1', b'{"format": 7}'])
@in_own_time
async def test_a_state_that_cannot_be_read_stops_the_start(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"state object .+state\.json"):
        await started({"a": A}, StateStore(str(path)))
    assert path.read_bytes() == content


@pytest.mark.timeout(120)
@in_own_time
async def test_a_store_that_does_not_answer_stops_the_start(s3_uri, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot read or write.*state\.json.*AWS_ENDPOINT_URL"):
        await started({"a": A}, StateStore(f"{s3_uri}/state.json"))


@pytest.mark.timeout(120)
@in_own_time
async def test_a_store_that_goes_down_later_changes_nothing(s3_uri, monkeypatch):
    store = StateStore(f"{s3_uri}/state.json")
    registry = await started({"a": A}, store)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError, match="cannot read or write"):
            await registry.put("b", B.uri, None)
        assert await told(registry) == {"a": A}
        await registry.report(answerer("x", a=kb_report(4, uri=A.uri)))
        assert (await registry.describe()).knowledge_bases["a"].version == 4
    await registry.put("b", B.uri, None)
    assert await told(await started({}, store)) == {"a": A, "b": B}


@in_own_time
async def test_a_waiting_write_survives_the_registry(tmp_path):
    """Killed while somebody waits: its successor, asked for the rest of the time, finds every replica again."""
    store = StateStore(str(tmp_path / "state.json"))
    registry = await settled({"capitals": KbSpec(URI)}, store)
    processes = [Process(registry, str(number), capitals=kb_report(4)) for number in range(2)]
    for process in processes:
        await process.follow()
    waiter = asyncio.ensure_future(registry.wait_served("capitals", 5, 30))
    await asyncio.sleep(0.5)
    waiter.cancel()
    successor = await started({"capitals": KbSpec(URI)}, store)
    for process in processes:
        process.registry = successor
    processes[0].serves["capitals"] = kb_report(5)
    lives = [asyncio.ensure_future(processes[0].live())]
    waiter = asyncio.ensure_future(successor.wait_served("capitals", 5, 30))
    await asyncio.sleep(LEASE_S / 2)
    assert not waiter.done(), "the other replica may not have found it yet"
    lives.append(asyncio.ensure_future(processes[1].live()))
    await asyncio.sleep(LEASE_S)
    assert not waiter.done()
    processes[1].serves["capitals"] = kb_report(5)
    assert await waiter
    for life in lives:
        life.cancel()


@in_own_time
async def test_what_a_replica_heard_from_a_predecessor_is_not_enough(tmp_path):
    """It may have an answer of the dead registry on its way to it: only one that heard ours has taken up ours."""
    store = StateStore(str(tmp_path / "state.json"))
    old = await settled({"capitals": KbSpec(URI)}, store)
    process = Process(old, "a", capitals=kb_report(5))
    await process.follow()
    process.registry = registry = await settled({"capitals": KbSpec(URI)}, store)
    await process.report()
    assert not await registry.wait_served("capitals", 5, 0)
    await process.follow()
    assert await registry.wait_served("capitals", 5, 0)


# Without one


@in_own_time
async def test_without_a_state_object_the_processes_say_what_was_wanted():
    old = await settled({"a": A, "gone": A})
    await old.put("b", B.uri, 2)
    earlier = await old.wanted()
    await old.remove("gone")
    await old.committed("a", 8)
    latest = await old.wanted()
    registry = await started({"a": A, "gone": A})
    await registry.report(ProcessReport("g", "gateway", wanted=earlier))
    assert await told(registry) == {"a": A, "b": KbSpec(B.uri, 2), "gone": A}
    await registry.report(answerer("x", latest))
    expected = {"a": KbSpec(A.uri, None, 8), "b": KbSpec(B.uri, 2)}
    assert await told(registry) == expected
    await registry.report(ProcessReport("g", "gateway", wanted=earlier))
    await registry.report(ProcessReport("w", "writer", wanted=None))
    await registry.report(answerer("y", Wanted()))
    assert await told(registry) == expected
    assert (await registry.wanted()).revision > latest.revision


@in_own_time
async def test_changes_made_before_the_processes_report_stay():
    old = await settled({"a": A})
    await old.put("b", B.uri, 2)
    await old.put("c", B.uri, None)
    before = await old.wanted()
    registry = await started({"a": A})
    await registry.put("b", B.uri, None)
    await registry.put("d", B.uri, None)
    await registry.remove("a")
    await registry.committed("c", 5)
    assert await told(registry) == {"b": B, "d": B}
    await registry.report(answerer("x", before))
    assert await told(registry) == {"b": B, "c": KbSpec(B.uri, None, 5), "d": B}


@in_own_time
async def test_a_replica_is_not_told_less_than_it_knows_before_it_could_report():
    old = await settled({"a": A})
    await old.put("b", B.uri, None)
    before = await old.wanted()
    registry = await started({"a": A})
    with pytest.raises(UnavailableError, match="being told what was wanted"):
        await registry.wanted(before.revision)
    began = now()
    with pytest.raises(UnavailableError):
        await registry.wanted(before.revision, 0.5)
    assert now() - began == pytest.approx(0.5, abs=0.01)
    waiter = asyncio.ensure_future(registry.wanted(before.revision, 30))
    await asyncio.sleep(0.1)
    await registry.report(answerer("x", before))
    assert (await waiter).knowledge_bases == before.knowledge_bases
    assert (await registry.wanted(before.revision)).knowledge_bases == before.knowledge_bases


@in_own_time
async def test_where_nobody_remembers_the_command_line_is_all_there_is():
    old = await settled({"a": A})
    await old.put("b", B.uri, None)
    known = (await old.wanted()).revision
    registry = await started({"a": A})
    began = now()
    assert (await registry.wanted(known, 30)).knowledge_bases == {"a": A}
    assert now() - began == pytest.approx(LEASE_S, abs=0.01)
    with pytest.raises(NotServedError):
        await registry.remove("b")


@in_own_time
async def test_removing_and_waiting_for_what_is_not_remembered_yet():
    old = await settled({})
    await old.put("b", B.uri, None)
    before = await old.wanted()
    registry = await started({})
    removing = asyncio.ensure_future(registry.remove("b"))
    serving = asyncio.ensure_future(registry.wait_served("b", 5, 30))
    await asyncio.sleep(0.5)
    assert not removing.done()
    assert not serving.done()
    await registry.report(answerer("x", before))
    assert (await removing).knowledge_bases == {}
    assert not await serving


@in_own_time
async def test_a_waiting_write_goes_on_where_only_the_processes_remember():
    old = await settled({})
    await old.put("b", B.uri, None)
    process = Process(old, "x", b=kb_report(5, uri=B.uri))
    await process.follow()
    process.registry = registry = await started({})
    serving = asyncio.ensure_future(registry.wait_served("b", 5, 30))
    await registry.committed("b", 5)
    await asyncio.sleep(0.5)
    await process.report()
    life = asyncio.ensure_future(process.live())
    assert await serving
    assert (await registry.wanted()).knowledge_bases["b"].at_least == 5
    life.cancel()


@in_own_time
async def test_who_comes_late_with_something_older_or_newer_changes_nothing_any_more():
    old = await settled({})
    one = await old.put("b", B.uri, None)
    two = await old.put("c", B.uri, None)
    registry = await started({})
    await registry.report(answerer("x", one))
    await asyncio.sleep(LEASE_S)
    await registry.report(answerer("late", two))
    assert await told(registry) == {"b": B}
    alone = await settled({})
    await alone.report(answerer("late", two))
    assert await told(alone) == {"b": B, "c": B}, "the first to report at all"


@in_own_time
async def test_a_third_registry_takes_over_from_the_second(monkeypatch):
    """Even where the clock on the wall was set back between them."""
    first = await settled({})
    before = await first.put("b", B.uri, None)
    monkeypatch.setattr("time.time_ns", lambda: 10**18)
    second = await started({})
    await second.report(answerer("x", before))
    after = await second.put("c", B.uri, None)
    assert after.revision > before.revision
    third = await started({})
    await third.report(answerer("old", before))
    await third.report(answerer("new", after))
    assert await told(third) == {"b": B, "c": B}


def test_revisions_grow_and_show_who_gave_them():
    one, other = Revisions(), Revisions()
    numbers = [one.next() for _ in range(1_000)]
    assert numbers == sorted(set(numbers))
    assert all(one.is_own(number) and not other.is_own(number) for number in numbers)
    other.pass_by(numbers[-1])
    assert other.next() > numbers[-1]
    assert not one.is_own(0)
