"""The backend of a gateway: answerers, writer and registry in other processes, any of which may die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from kblam_ray.errors import OverloadedError, UnavailableError
from kblam_ray.serving.administration import Administration
from kblam_ray.serving.deployments.admission import Admission
from kblam_ray.serving.deployments.calls import LostError, Pauses, asked, repeated, streamed
from kblam_ray.serving.deployments.registry import PATIENCE_S, RegistryClient
from kblam_ray.serving.deployments.writer import WriterClient
from kblam_ray.serving.messages import Event, FactFilter, FactsPage, Finished, KbRef, Question, Started, Written
from kblam_ray.serving.metrics import Metrics, merged
from kblam_ray.serving.settings import LimitSettings
from kblam_ray.serving.wanted import Overview, TableFound

WHAT = "the replica that had the request"

OVERVIEW_S = 2.0
"""How long a look at the whole waits for a registry that is being replaced; then the last one is given."""


class ServeBackend(Administration):
    """A `Backend` over handles of Serve's deployments.

    A request whose replica dies goes to another, or to the one that takes its place, as long as no text of its answer
    has been given and `request_timeout_s` is not over.

    Args:
        answerers: handle of the answerers.
        metrics, process_id: of this process.
        admission: lets requests for answers in.
    """

    def __init__(
        self,
        model_name: str,
        limits: LimitSettings,
        answerers: Any,
        writer: WriterClient,
        registry: RegistryClient,
        metrics: Metrics,
        process_id: str,
        admission: Admission,
    ) -> None:
        super().__init__(registry, writer, self._inspect_elsewhere)
        self.model_name = model_name
        self._limits, self._answerers, self._admission = limits, answerers, admission
        self._streaming = answerers.options(stream=True)
        self._metrics, self._process_id = metrics, process_id
        self._num_writing = 0
        self._last_overview: tuple[float, Overview] | None = None

    async def stream(self, question: Question) -> AsyncGenerator[Event, None]:
        """See `Backend`. `Started` comes with the first text: until then the answer may begin anew elsewhere."""
        with self._admission.admitted():
            pauses = Pauses(time.monotonic() + self._limits.request_timeout_s, WHAT)
            is_said = False
            while True:
                batches = streamed(lambda: self._streaming.stream.remote(question), _is_last)
                try:
                    async with aclosing(batches):
                        held: list[Event] = []
                        async for batch in batches:
                            for event in batch:
                                if isinstance(event, Started):
                                    held.append(event)
                                    continue
                                is_said = True
                                while held:
                                    yield held.pop(0)
                                yield event
                    return
                except LostError as error:
                    if is_said:
                        raise UnavailableError(
                            "the replica that wrote this answer is gone", where="server", help="ask again"
                        ) from error
                    await pauses.after(error)

    async def complete(self, question: Question) -> Finished:
        """See `Backend`."""
        with self._admission.admitted():
            return await self._ask_any("complete", question)

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage:
        """See `Backend`."""
        with self._admission.admitted():
            return await self._ask_any("find_facts", kb, which)

    async def write_facts(
        self, name: str, facts: Sequence[Mapping[str, Any]], *, wait: bool = False, timeout_s: float = 30
    ) -> Written:
        """See `Backend`."""
        with self._writing():
            return await super().write_facts(name, facts, wait=wait, timeout_s=timeout_s)

    async def delete_facts(self, name: str, **which: Any) -> Written:
        """See `Backend`."""
        with self._writing():
            return await super().delete_facts(name, **which)

    async def remove_knowledge_base(self, name: str) -> None:
        """See `Backend`."""
        await super().remove_knowledge_base(name)
        if self._last_overview is not None:
            seen_at, last = self._last_overview
            others = {other: kb for other, kb in last.knowledge_bases.items() if other != name}
            self._last_overview = seen_at, replace(last, knowledge_bases=others)

    async def overview(self) -> Overview:
        """See `Backend`. While the registry is replaced and fills again, what it knew before is given, not settled.

        Raises:
            UnavailableError: there has been no registry for long.
        """
        now = time.monotonic()
        seen_at, last = self._last_overview or (now, None)
        try:
            async with asyncio.timeout(OVERVIEW_S if last is not None else PATIENCE_S):
                found = await self._registry.describe()
        except (TimeoutError, UnavailableError):
            if last is None or now - seen_at > PATIENCE_S:
                raise UnavailableError(
                    "the registry does not answer", where="server", help="ask again in a moment"
                ) from None
            return replace(last, is_settled=False)
        if last is not None and not found.is_settled and now - seen_at <= PATIENCE_S:
            return replace(
                found,
                knowledge_bases={**last.knowledge_bases, **found.knowledge_bases},
                processes={**last.processes, **found.processes},
            )
        self._last_overview = now, found
        return found

    async def metrics(self) -> str:
        """See `Backend`."""
        others = {name: text for name, text in (await self.overview()).metrics.items() if name != self._process_id}
        return merged([self._metrics.text(), *others.values()])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._num_writing >= self._limits.max_queued_requests:
            raise OverloadedError(
                f"{self._num_writing} writes wait, and no more may",
                where="max_queued_requests",
                help="write again in a moment, and many facts at a time",
            )
        self._num_writing += 1
        try:
            yield
        finally:
            self._num_writing -= 1

    async def _inspect_elsewhere(self, uri: str, version: int | None) -> TableFound:
        return await self._ask_any("inspect", uri, version)

    async def _ask_any(self, method: str, *arguments: Any) -> Any:
        return await repeated(
            lambda _: asked(lambda: getattr(self._answerers, method).remote(*arguments)),
            deadline=time.monotonic() + self._limits.request_timeout_s,
            what=WHAT,
        )


def _is_last(batch: list[Event]) -> bool:
    return isinstance(batch[-1], Finished)
