"""What depends on how many facts a knowledge base has: the selection of requests that name none, and the index."""

from __future__ import annotations

import pytest
from library_samples import Follower, encoder, make, model, run

from kblam_ray import KnowledgeBase
from kblam_ray.model.nearest import index_nbytes


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "kb")


def test_the_selection_follows_the_size(uri):
    make(uri, 5)

    async def test():
        for select_above, expected in ((5, "all"), (4, "similar:3")):
            async with Follower(select_above=select_above, selected_facts=3) as it:
                it.follow(kb=uri)
                assert it.library.selection_for(await it.memory()) == expected

    run(test)


def test_large_knowledge_bases_are_indexed_in_the_background(uri):
    kb = KnowledgeBase.create(uri, encoder())
    kb.upsert([(f"e{number}", "p", "0") for number in range(1_200)])

    async def test():
        async with Follower(index_above=1_000) as it:
            it.follow(kb=uri)
            memory = await it.memory()
            plain = it.report().nbytes
            # A look may come between two of the indexes; one after the last sees them all.
            await it.until(lambda: index_nbytes(memory) > 0 and it.report().nbytes > plain)
            await it.until(lambda: it.report().nbytes >= memory.nbytes + index_nbytes(memory))
            kb.upsert([("e0", "p", "1")])
            after = await it.memory(min_version=1)
            assert index_nbytes(after) > 0  # of the chunk that both share
            near = model().prepare(after, "what is the p of e0?", "similar:3")
            assert near.num_facts == 3

    run(test)
