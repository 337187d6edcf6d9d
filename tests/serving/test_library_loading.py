"""Whole tables are loaded a few at a time, what was asked for last first, whoever gives up waiting."""

from __future__ import annotations

import asyncio

from library_samples import Follower, blocked, make, run, values

from kblam_ray.serving.library.load_queue import LOADS_AT_A_TIME, LoadQueue


def test_turns_go_to_the_most_urgent():
    async def test():
        queue, order, urgency = LoadQueue(1), [], {"first": 0, "a": 1, "b": 1, "late": 0, "gone": 9}
        go_on = asyncio.Event()

        async def work(name: str) -> None:
            async with queue.turn(lambda: urgency[name]):
                order.append(name)
                await go_on.wait()

        tasks = {}
        for name in urgency:
            tasks[name] = asyncio.create_task(work(name))
            await asyncio.sleep(0)
        tasks["gone"].cancel()
        urgency["late"] = 5  # while it waits
        go_on.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert order == ["first", "late", "a", "b"]

    run(test)


def test_a_turn_given_to_somebody_who_was_cancelled_just_then_is_passed_on():
    async def test():
        queue, order = LoadQueue(1), []

        async def work(name: str) -> None:
            async with queue.turn(lambda: 0):
                order.append(name)

        async with queue.turn(lambda: 0):
            tasks = [asyncio.create_task(work(name)) for name in ("a", "b")]
            await asyncio.sleep(0)
        tasks[0].cancel()  # it has the turn, and has not run since
        await asyncio.gather(*tasks, return_exceptions=True)
        await work("c")
        assert order == ["b", "c"]

    run(test)


def test_a_table_that_is_asked_for_goes_before_those_that_nobody_needs_yet(tmp_path):
    uris = {f"kb{number}": str(tmp_path / f"kb{number}") for number in range(6)}
    for name, uri in uris.items():
        make(uri, value=name)

    async def test():
        async with Follower() as it:
            started: list[str] = []
            with blocked(it, "load") as block:
                held = it.library._fetcher.load

                async def load(log):
                    started.append(log.uri.rpartition("/")[2])
                    return await held(log)

                it.library._fetcher.load = load
                it.follow(**uris)
                await it.until(lambda: block.num_held == LOADS_AT_A_TIME)
                wanted = next(name for name in reversed(uris) if name not in started)
                asked = asyncio.create_task(it.memory(wanted))
                await it.until(lambda: all(served.latest_version == 0 for served in it.library._served.values()))
                assert len(started) == LOADS_AT_A_TIME
                block.set()
                assert values(await asked) == {wanted}
                for name in uris:
                    assert values(await it.memory(name)) == {name}
            assert started[LOADS_AT_A_TIME] == wanted
            assert sorted(started) == sorted(uris)

    run(test)
