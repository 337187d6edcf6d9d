"""What stands behind the HTTP interface: the replicas of a Ray Serve application, or one replica in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from kblam_ray.serving.messages import Event, FactFilter, FactsPage, Finished, KbRef, Question, Written
from kblam_ray.serving.wanted import KbDescription, Overview


class Backend(Protocol):
    """Every method raises the errors of `kblam_ray.errors`; `http.errors` makes statuses of them."""

    @property
    def model_name(self) -> str:
        """What clients call the base model."""

    def stream(self, question: Question) -> AsyncIterator[Event]:
        """Answer, event by event. The first event comes only when nothing can be wrong with the request any more;
        closing the iterator cancels the request."""

    async def complete(self, question: Question) -> Finished:
        """Answer as a whole; cancelling the task cancels the request."""

    async def find_facts(self, kb: KbRef, which: FactFilter) -> FactsPage:
        """Facts of the version that is served."""

    async def write_facts(
        self, name: str, facts: Sequence[Mapping[str, Any]], *, wait: bool = False, timeout_s: float = 30
    ) -> Written:
        """Embed and commit facts; with `wait` return when every replica serves them, or `is_served` False."""

    async def delete_facts(
        self,
        name: str,
        *,
        identities: Sequence[Mapping[str, str]] = (),
        fact_ids: Sequence[int] = (),
        wait: bool = False,
        timeout_s: float = 30,
    ) -> Written:
        """Delete facts named by entity and property (and value where that tells them apart), or by id.

        Raises:
            NotServedError: a fact id that is not live.
        """

    async def put_knowledge_base(
        self, name: str, uri: str, version: int | None, *, wait: bool = False, timeout_s: float = 30
    ) -> KbDescription:
        """Serve a table from now on, or at another version; checked before anything changes.

        Raises:
            NotServedInTimeError: `wait`, and not every replica serves it by then; the change stands.
        """

    async def remove_knowledge_base(self, name: str) -> None:
        """Stop serving it; the table stays."""

    async def overview(self) -> Overview:
        """Knowledge bases and processes."""

    async def metrics(self) -> str:
        """Prometheus text of all processes."""
