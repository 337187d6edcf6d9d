"""Changes of what is served and of what it says: checked, written, announced, and waited for where asked.

The same for a server of many processes and for one in this process: registry, writer and inspection are given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kblam_ray.errors import ConflictError, InputError, NotServedError, NotServedInTimeError
from kblam_ray.serving.messages import Written
from kblam_ray.serving.settings import KB_NAME
from kblam_ray.serving.wanted import KbDescription, KbSpec, Overview, RegistryLike, TableFound

SETTLE_S = 0.2
"""Pause before a registry that was made anew is asked again."""


class WriterLike(Protocol):
    """What embeds and commits facts, here or in another process."""

    async def write(self, name: str, uri: str, facts: Sequence[Mapping[str, Any]]) -> Written: ...

    async def delete(
        self, name: str, uri: str, identities: Sequence[Mapping[str, str]], fact_ids: Sequence[int]
    ) -> Written: ...


class Administration:
    """Writes facts, and changes which knowledge bases are served.

    Args:
        registry: says what is wanted, and whether it is served.
        writer: embeds and commits.
        inspect: looks at a table before it is served: whether it is there, has the version, and fits the adapter.
    """

    def __init__(
        self,
        registry: RegistryLike,
        writer: WriterLike,
        inspect: Callable[[str, int | None], Awaitable[TableFound]],
    ) -> None:
        self._registry, self._writer, self._inspect = registry, writer, inspect

    async def write_facts(
        self, name: str, facts: Sequence[Mapping[str, Any]], *, wait: bool = False, timeout_s: float = 30
    ) -> Written:
        """See `Backend`."""
        spec = await self._writable(name)
        return await self._announced(name, await self._writer.write(name, spec.uri, facts), wait, timeout_s)

    async def delete_facts(
        self,
        name: str,
        *,
        identities: Sequence[Mapping[str, str]] = (),
        fact_ids: Sequence[int] = (),
        wait: bool = False,
        timeout_s: float = 30,
    ) -> Written:
        """See `Backend`."""
        spec = await self._writable(name)
        written = await self._writer.delete(name, spec.uri, identities, fact_ids)
        return await self._announced(name, written, wait, timeout_s)

    async def put_knowledge_base(
        self, name: str, uri: str, version: int | None, *, wait: bool = False, timeout_s: float = 30
    ) -> KbDescription:
        """See `Backend`."""
        if not KB_NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot name a knowledge base",
                where="name",
                help="use letters, digits, dots, dashes and underscores, 64 at most, a letter or digit first",
            )
        found = await self._inspect(uri, version)
        wanted = await self._registry.put(name, found.uri, version)
        if wait and not await self._registry.wait_served(name, found.version, timeout_s):
            raise NotServedInTimeError(found.version, timeout_s)
        known = (await self._registry.describe()).knowledge_bases.get(name)
        is_current = known is not None and known.uri == found.uri and known.pinned == (version is not None)
        if known is not None and is_current:
            newest = max(found.newest, known.latest_version or 0)
            return replace(known, latest_version=newest, encoder=known.encoder or found.encoder)
        # No replica has reported yet.
        spec = wanted.knowledge_bases[name]
        return KbDescription(
            name, spec.uri, None, found.newest, version is not None, None, found.encoder, "loading", 0.0
        )

    async def remove_knowledge_base(self, name: str) -> None:
        """See `Backend`."""
        await self._registry.remove(name)

    async def overview(self) -> Overview:
        """See `Backend`."""
        return await self._registry.describe()

    async def _writable(self, name: str) -> KbSpec:
        spec = (await self._registry.wanted()).knowledge_bases.get(name)
        if spec is None:
            spec = (await self._settled()).wanted.knowledge_bases.get(name)
        if spec is None:
            raise NotServedError(
                f"there is no knowledge base {name!r}", where="name", help="GET /v1/knowledge_bases lists them"
            )
        if spec.version is not None:
            raise ConflictError(
                f"the knowledge base {name!r} is pinned at version {spec.version}",
                where=spec.uri,
                help="PUT it with version null to follow the newest again, then write",
            )
        return spec

    async def _settled(self) -> Overview:
        """What the registry knows once it can know all: one that was killed learns from its processes' reports."""
        while not (overview := await self._registry.describe()).is_settled:
            await asyncio.sleep(SETTLE_S)
        return overview

    async def _announced(self, name: str, written: Written, wait: bool, timeout_s: float) -> Written:
        # The commit stands whatever becomes of the caller, so replicas hear of it even if he goes.
        await asyncio.shield(asyncio.ensure_future(self._registry.committed(name, written.kb_version)))
        if not wait:
            return written
        served = await self._registry.wait_served(name, written.kb_version, timeout_s)
        return written.waited(served)
