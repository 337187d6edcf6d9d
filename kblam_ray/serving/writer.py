"""Embeds facts and commits them to tables: one write at a time, in a thread, with encoders that stay loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kblam_ray.encoders.base import Encoder, EncoderSpec
from kblam_ray.encoders.load import load_encoder
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import NotServedError
from kblam_ray.serving.messages import Written
from kblam_ray.serving.metrics import Metrics
from kblam_ray.table.knowledge_base import KnowledgeBase, WriteOutcome


class Writer:
    """Writes to any number of tables. A write that was begun is finished, whatever becomes of who asked for it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._encoders: dict[EncoderSpec, Encoder] = {}
        # One thread: an encoder serves one at a time, and writes of one process need not race for a table's log.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")

    async def write(self, name: str, uri: str, facts: Sequence[Mapping[str, Any]]) -> Written:
        """Embed what is new or changed and commit it at once, all or nothing.

        Raises:
            BadRowError: an item is not a fact.
            FactIdCollisionError, EncoderError, StorageError, TableError: see `KnowledgeBase.upsert`.
        """
        return await self._run(name, lambda: self._open(uri).write(facts))

    async def delete(
        self, name: str, uri: str, identities: Sequence[Mapping[str, str]], fact_ids: Sequence[int]
    ) -> Written:
        """Delete facts; those named by entity and property that are not there are passed over.

        Raises:
            BadRowError: an item does not name a fact.
            NotServedError: only ids were given, and none of these facts is live.
        """

        def work() -> WriteOutcome:
            outcome = KnowledgeBase.open(uri).remove(identities, fact_ids=fact_ids)
            if fact_ids and not identities and not outcome.deleted:
                raise NotServedError(
                    "there is no such fact", where=f"fact {fact_ids[0]}", help="look it up: GET .../facts?q="
                )
            return outcome

        return await self._run(name, work)

    def close(self) -> None:
        """Finish the write that runs."""
        self._thread.shutdown()

    async def _run(self, name: str, work: Callable[[], WriteOutcome]) -> Written:
        outcome = await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))
        for what in ("added", "changed", "unchanged", "deleted"):
            if count := getattr(outcome, what):
                self._metrics.facts_written.labels(kb=name, what=what).inc(count)
        return Written(outcome.version, outcome.added, outcome.changed, outcome.unchanged, outcome.deleted)

    def _open(self, uri: str) -> KnowledgeBase:
        spec = KnowledgeBase.open(uri).encoder
        encoder = self._encoders.get(spec)
        if encoder is None:
            encoder = load_encoder(EncoderSettings(name=spec.name, expected_revision=spec.revision))
            self._encoders[spec] = encoder
        return KnowledgeBase.open(uri, encoder=encoder)
