"""Engines over the model that ships, and questions to them, for tests of the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from serving_samples import QUESTION, demo_model

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.model import KnowledgeModel
from kblam_ray.serving.engine import Engine
from kblam_ray.serving.messages import Finished, KbRef, Piece, Question, Sampling, Started
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import EngineSettings

DEADLINE_S = 60
SMALL = {"num_blocks": 16, "max_batch_tokens": 128}
_numbers = itertools.count()


def question(text: str = QUESTION, grounding: str = "cite", *, max_citations: int = 5, **sampling: Any) -> Question:
    sampling.setdefault("max_tokens", 24)
    return Question(
        f"r{next(_numbers)}",
        ({"role": "user", "content": text},),
        KbRef("capitals"),
        grounding=grounding,
        max_citations=max_citations,
        sampling=Sampling(**sampling),
    )


@asynccontextmanager
async def running(model: KnowledgeModel | None = None, **settings: Any) -> AsyncIterator[Engine]:
    engine = Engine(model or demo_model(), EngineSettings(**(SMALL | settings)), Metrics("test", "answerer"))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def with_engine(call: Callable[[Engine], Awaitable[Any]], model: KnowledgeModel | None = None, **settings: Any) -> Any:
    """Run a coroutine that is given an engine, with a deadline."""

    async def run() -> Any:
        async with running(model, **settings) as engine:
            return await asyncio.wait_for(call(engine), DEADLINE_S)

    return asyncio.run(run())


async def streamed(
    engine: Engine, asked: Question, memory: KnowledgeMemory | None, selection: str = "all"
) -> tuple[Started, list[Piece], Finished]:
    """All events of one answer; the pieces make the texts."""
    events = [event async for event in engine.stream(asked, memory, selection)]
    first, *pieces, last = events
    assert isinstance(first, Started)
    assert isinstance(last, Finished)
    assert all(isinstance(piece, Piece) for piece in pieces)
    for number, choice in enumerate(last.choices):
        assert "".join(piece.text for piece in pieces if piece.choice == number) == choice.text
    return first, pieces, last


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():
            await asyncio.sleep(0.005)
