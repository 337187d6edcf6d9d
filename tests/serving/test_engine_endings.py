"""However a request ends, its slot and memory are free; however the engine ends, its requests are told."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine_samples import question, running, streamed, until, with_engine
from serving_samples import ANSWER, QUESTION, demo_model, make_kb
from transformers.generation.continuous_batching.requests import RequestState

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import GenerationError, UnavailableError
from kblam_ray.model.generation import stop_ids
from kblam_ray.serving.engine import Engine
from kblam_ray.serving.engine.request import Preparing
from kblam_ray.serving.engine.sampling import HIDDEN, Sampler
from kblam_ray.serving.messages import Piece, Started

LONG = {"temperature": 2.0, "max_tokens": 1_000}
"""Does not end by itself, see `goes_on`."""


@pytest.fixture(autouse=True)
def goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However hot it is sampled, one answer in eight would end within ten tokens."""
    sample, ends = Sampler.__call__, stop_ids(demo_model())

    def without_end(self: Sampler, logits_RV: torch.Tensor, requests: Sequence[RequestState]) -> torch.Tensor:
        found = [self._choices.get(request.request_id) for request in requests]
        rows = [row for row, choice in enumerate(found) if choice is not None and choice.temperature == 2.0]
        logits_RV = logits_RV.clone()
        for end in ends:
            logits_RV[rows, end] = HIDDEN
        return sample(self, logits_RV, requests)

    monkeypatch.setattr(Sampler, "__call__", without_end)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeMemory:
    return demo_model().load(make_kb(tmp_path_factory.mktemp("endings")))


def batching(engine: Engine) -> Any:
    return engine._batching


def scheduler(engine: Engine) -> Any:
    return batching(engine).manager.batch_processor.scheduler


async def until_gone(what: weakref.ref[Any]) -> None:
    """A thread that has given its result lets go of what it was given a moment later."""

    def is_gone() -> bool:
        gc.collect()
        return what() is None

    await until(is_gone)


async def is_free(engine: Engine, memory: KnowledgeMemory) -> None:
    """Nothing of any request is left, and the next one is answered."""
    assert engine.num_running == 0
    await until(lambda: not scheduler(engine).has_pending_requests())
    assert not batching(engine).manager.output_router.result_handlers
    assert not engine._sampler._choices
    last = await engine.complete(question(QUESTION, "verbatim"), memory, "all")
    assert last.choices[0].text == ANSWER
    assert engine._metrics.text().count('kblam_running_requests{process="test"} 0.0') == 1
    assert engine._metrics.text().count('kblam_waiting_requests{process="test"} 0.0') == 1


def held(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """From now on the pass before an answer says that it has begun, and waits."""
    begun, go_on = threading.Event(), threading.Event()
    prepare = Preparing.prepare

    def wait(self: Preparing, *args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return prepare(self, *args)

    monkeypatch.setattr(Preparing, "prepare", wait)
    return begun, go_on


def test_cancelled_while_it_is_made_ready_and_while_it_waits_for_that(memory, monkeypatch):
    async def ask(engine: Engine) -> None:
        begun, go_on = held(monkeypatch)
        tasks = [asyncio.create_task(engine.complete(question(), memory, "all")) for _ in range(3)]
        await until(begun.is_set)
        assert engine.num_running == 3
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(error, asyncio.CancelledError) for error in await asyncio.gather(*tasks, return_exceptions=True)
        )
        assert engine.num_running == 0
        go_on.set()
        await is_free(engine, memory)

    with_engine(ask)


@pytest.mark.parametrize("grounding", ["cite", "verbatim"])
def test_cancelled_while_it_waits_in_the_engine(memory, grounding: str):
    async def ask(engine: Engine) -> None:
        with batching(engine).manager.pause():
            task = asyncio.create_task(engine.complete(question(QUESTION, grounding, **LONG), memory, "all"))
            await until(lambda: bool(batching(engine)._requests))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert all(request.memory is None for request in batching(engine)._requests.values())
        await is_free(engine, memory)

    with_engine(ask)


def test_cancelled_while_its_prompt_is_read(memory):
    async def ask(engine: Engine) -> None:
        asked = question("7" * 1_500, "off", max_tokens=4)
        task = asyncio.create_task(engine.complete(asked, None, "all"))
        await until(lambda: bool(scheduler(engine).active_requests))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await is_free(engine, memory)

    with_engine(ask, max_batch_tokens=16)


def test_a_stream_that_is_closed_frees_its_slot_and_its_memory(memory):
    async def ask(engine: Engine) -> None:
        own = memory.select(memory.fact_ids[:5].tolist())
        gone = weakref.ref(own)
        stream: Any = engine.stream(question(QUESTION, "cite", num_choices=2, **LONG), own, "all")
        assert isinstance(await anext(stream), Started)
        assert isinstance(await anext(stream), Piece)
        assert engine.num_running == 1
        await stream.aclose()
        await until(lambda: not scheduler(engine).has_pending_requests())
        await is_free(engine, memory)
        del own, stream
        await until_gone(gone)

    with_engine(ask)


def test_an_answer_that_is_over_leaves_nothing(memory):
    async def ask(engine: Engine) -> None:
        own = memory.select(memory.fact_ids[:5].tolist())
        gone = weakref.ref(own)
        for grounding in ("off", "cite", "verbatim"):
            await streamed(engine, question(QUESTION, grounding, max_tokens=3), own)
            await engine.complete(question(QUESTION, grounding, max_tokens=3, temperature=1.0), own, "all")
        await until(lambda: not scheduler(engine).has_pending_requests())
        del own
        await until_gone(gone)
        assert not {name for name, request in batching(engine)._requests.items() if not request.is_cancelled}
        await is_free(engine, memory)
        text = engine._metrics.text()
        assert 'kblam_first_token_seconds_count{grounding="cite",process="test"} 1.0' in text
        assert 'kblam_answer_tokens_total{process="test"} 0.0' not in text

    with_engine(ask)


def fails() -> None:
    raise ValueError("a broken step")


def exits() -> None:
    raise SystemExit(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("dies", [fails, exits])
def test_an_engine_that_dies_fails_its_requests_and_says_so(memory, dies: Callable[[], None]):
    async def ask(engine: Engine) -> None:
        stream: Any = engine.stream(question(QUESTION, "cite", **LONG), memory, "all")
        await anext(stream)
        await anext(stream)
        waiting = asyncio.create_task(engine.complete(question(QUESTION, "off", **LONG), memory, "all"))
        await until(lambda: len(batching(engine)._requests) == 2)
        batching(engine).segments = lambda inputs: dies()
        with pytest.raises(GenerationError):
            async for _ in stream:
                pass
        with pytest.raises(GenerationError):
            await waiting
        await until(lambda: not engine.is_alive)
        assert engine.num_running == 0
        with pytest.raises(GenerationError, match="stopped after an error"):
            engine.check()
        with pytest.raises(GenerationError):
            await engine.complete(question(), memory, "all")

    with_engine(ask)


def test_an_engine_that_dies_while_a_request_is_made_ready(memory, monkeypatch):
    async def ask(engine: Engine) -> None:
        begun, go_on = held(monkeypatch)
        task = asyncio.create_task(engine.complete(question(), memory, "all"))
        await until(begun.is_set)
        batching(engine).manager.stop(hard_stop=True)
        with pytest.raises(GenerationError):
            await task
        go_on.set()

    with_engine(ask)


def test_closing_ends_what_runs_at_once(memory, monkeypatch):
    async def ask() -> None:
        async with running() as engine:
            stream: Any = engine.stream(question(QUESTION, "cite", **LONG), memory, "all")
            await anext(stream)
            await anext(stream)
            waiting = asyncio.create_task(engine.complete(question(QUESTION, "off", **LONG), memory, "all"))
            await until(lambda: len(batching(engine)._requests) == 2)
            begun, go_on = held(monkeypatch)
            ready = asyncio.create_task(engine.complete(question(), memory, "all"))
            await until(begun.is_set)
            closing = asyncio.create_task(engine.close())
            for task in (waiting, ready):
                with pytest.raises(UnavailableError):
                    await task
            go_on.set()
            await closing
            # Whoever looks only now is told, too.
            with pytest.raises(UnavailableError):
                async for _ in stream:
                    pass
            assert (engine.num_running, engine.is_alive) == (0, False)
            with pytest.raises(UnavailableError):
                await engine.complete(question(), memory, "all")
            with pytest.raises(UnavailableError):
                engine.check()
        demo_model().attachment.check(memory)

    asyncio.run(ask())
