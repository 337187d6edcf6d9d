"""Changes of what is served: waiting that runs out is told, whichever version was wanted."""

from __future__ import annotations

import asyncio

import pytest

from kblam_ray.errors import NotServedInTimeError
from kblam_ray.serving.administration import Administration
from kblam_ray.serving.registry import Registry, StateStore
from kblam_ray.serving.wanted import TableFound

URI = "/tables/capitals"


async def inspect(uri: str, version: int | None) -> TableFound:
    return TableFound(uri, "hashing:64", 4 if version is None else version, 4)


@pytest.mark.parametrize("version", [2, None])
def test_a_table_that_is_not_served_in_time_says_so_and_stays_wanted(version):
    async def put() -> None:
        registry = Registry(StateStore(None), {}, lease_s=0.01)
        await registry.start()
        administration = Administration(registry, writer=None, inspect=inspect)
        with pytest.raises(NotServedInTimeError) as raised:
            await administration.put_knowledge_base("capitals", URI, version, wait=True, timeout_s=0)
        assert raised.value.kb_version == (4 if version is None else version)
        assert (await registry.wanted()).knowledge_bases["capitals"].version == version
        assert (await administration.put_knowledge_base("capitals", URI, version)).status == "loading"

    asyncio.run(put())
