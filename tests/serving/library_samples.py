"""A library over small real tables and a tiny random model, and waiting for what it will report."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache

from model_samples import ENCODER, llama_tokenizer, tiny_adapter, tiny_llama

from kblam_ray import KnowledgeBase, load_encoder
from kblam_ray.encoders.base import Encoder
from kblam_ray.model import KnowledgeModel
from kblam_ray.serving.library import Library
from kblam_ray.serving.messages import KbRef
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import KnowledgeSettings
from kblam_ray.serving.wanted import KbSpec, Wanted

PATIENCE_S = 60
"""Longest wait for anything; reached only where something is wrong."""

KB = KbRef("kb")


@lru_cache(maxsize=1)
def encoder() -> Encoder:
    return load_encoder(ENCODER)


@lru_cache(maxsize=1)
def model() -> KnowledgeModel:
    base = tiny_llama()
    return KnowledgeModel(base, tiny_adapter(base), llama_tokenizer(), encoder())


def make(uri: str, num_facts: int = 5, value: str = "0") -> KnowledgeBase:
    """Version 0: `num_facts` facts, all of the same value, which `values` finds again."""
    kb = KnowledgeBase.create(uri, encoder())
    kb.upsert([(f"e{number}", "p", value) for number in range(num_facts)])
    return kb


def change(kb: KnowledgeBase, value: str, num_facts: int = 5) -> int:
    """All facts to another value, in one version."""
    return kb.upsert([(f"e{number}", "p", value) for number in range(num_facts)])


def values(memory) -> set[str]:
    return {row["value"] for row in memory.lookup(memory.fact_ids)}


class Follower:
    """A running library; `async with` it. `changes` counts calls of `on_change`."""

    def __init__(self, **settings) -> None:
        self.changes = 0
        self.metrics = Metrics("tester", "answerer")
        given = KnowledgeSettings(**{"poll_s": 0.02, **settings})
        self.library = Library(model(), given, self.metrics, self._changed)
        self.revision = 0

    def _changed(self) -> None:
        asyncio.get_running_loop()  # raises in any thread but the event loop's
        self.changes += 1

    async def __aenter__(self) -> Follower:
        await self.library.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.library.close()

    def follow(self, **specs: str | KbSpec) -> None:
        self.revision += 1
        wanted = {name: KbSpec(spec) if isinstance(spec, str) else spec for name, spec in specs.items()}
        self.library.follow(Wanted(self.revision, wanted))

    def report(self, name: str = "kb"):
        return self.library.reports()[name]

    async def memory(self, name: str = "kb", version: int | None = None, **options):
        options = {"wait_s": PATIENCE_S, **options}
        return await asyncio.wait_for(self.library.memory(KbRef(name, version), **options), PATIENCE_S)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await asyncio.sleep(0.005)

    async def until_status(self, status: str, name: str = "kb") -> None:
        await self.until(lambda: self.report(name).status == status)

    async def until_version(self, version: int | None, name: str = "kb") -> None:
        await self.until(lambda: self.report(name).version == version)


class blocked:
    """While inside, what is fetched waits until the event is set."""

    def __init__(self, it: Follower, *names: str) -> None:
        self._fetcher, self._names = it.library._fetcher, names or ("load", "refresh")
        self._event = asyncio.Event()
        self.num_held = 0

    @property
    def is_holding(self) -> bool:
        return self.num_held > 0

    def set(self) -> None:
        self._event.set()

    def __enter__(self) -> blocked:
        for name in self._names:
            setattr(self._fetcher, name, self._held(getattr(self._fetcher, name)))
        return self

    def __exit__(self, *_) -> None:
        for name in self._names:
            delattr(self._fetcher, name)

    def _held(self, method):
        async def held(*given):
            self.num_held += 1
            await self._event.wait()
            return await method(*given)

        return held


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 2 * PATIENCE_S))
