"""Selections through an index against an exact search of the same keys."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import numpy as np
import pyarrow as pa
import pytest
import torch
from model_samples import tiny_adapter, tiny_llama

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.model import nearest
from kblam_ray.model.benchmark import NearestBenchmark, benchmark_nearest
from kblam_ray.model.nearest import index_memory, index_nbytes
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.table.knowledge_base import KnowledgeBase

NUM_FACTS, DIM = 4_000, 64
RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((300, DIM)).astype(np.float32)
KEYS = CENTRES[RNG.integers(0, 300, NUM_FACTS)] + 0.7 * RNG.standard_normal((NUM_FACTS, DIM)).astype(np.float32)
KEYS *= RNG.uniform(0.5, 2.0, (NUM_FACTS, 1)).astype(np.float32)
KEYS[17] = 0
QUESTIONS = [f"question {number}" for number in range(20)]
NEAR = KEYS[RNG.integers(0, NUM_FACTS, 40)] + 0.5 * RNG.standard_normal((40, DIM)).astype(np.float32)
ENTITIES = [f"entity{number % 1_333 + (number == 3_999)}" for number in range(NUM_FACTS)]


class Reader(Encoder):
    """Knows where some questions lie; every other one lies at the first number of its words."""

    spec = EncoderSpec(name="reader", revision="0", dim=DIM)

    def encode_batch(self, texts):
        return EncodedBatch(np.stack([NEAR[int("".join(filter(str.isdigit, text))[:2]) % 40] for text in texts]))


@pytest.fixture(scope="module")
def adapter():
    assert encoder_spec("hashing:64").dim == DIM
    return tiny_adapter(tiny_llama())


def texts(rows) -> pa.Table:
    return pa.table(
        {
            "fact_id": pa.array([10 * row for row in rows], pa.int64()),
            "entity": [ENTITIES[row] for row in rows],
            "property": ["colour"] * len(rows),
            "value": ["red"] * len(rows),
        }
    )


def memory_of(adapter, rows=range(NUM_FACTS), dtype=torch.float16, **settings) -> KnowledgeMemory:
    keys = torch.from_numpy(KEYS[rows]).to(dtype)
    return KnowledgeMemory.from_embeddings(adapter, keys, keys, facts=texts(rows), version=1, **settings)


class Changes:
    """Rows with another key, and rows that are gone."""

    def __init__(self, changed, gone):
        self.from_version, self.to_version = 1, 2
        self.upserts = self
        self.facts = texts(changed)
        self.key_embeddings_MP = self.value_embeddings_MP = KEYS[changed][:, ::-1].astype(np.float16)
        self.deleted_ids = 10 * np.asarray(gone, np.int64)


def is_indexed(memory) -> list[bool]:
    return [view.chunk in nearest._INDEXES for view in memory.views]


def recall(indexed, exact, prior, num) -> float:
    """Share of what an exact search finds; all that is found is where it says, and of the memory."""
    found = []
    for question in QUESTIONS:
        wanted = prior.similar(exact, question, num)
        request = prior.apply(indexed, question, num)
        assert request.num_facts == num
        assert request.is_selection
        assert request.num_total == indexed.num_facts
        found.append(np.isin(wanted, request.fact_ids).mean())
        whole = dict(zip(exact.fact_ids.tolist(), prior.scores(exact, question).tolist(), strict=True))
        expected = [whole[fact_id] for fact_id in request.fact_ids.tolist()]
        kept = torch.cat([prior_M[prior_M > float("-inf")] for prior_M in request.priors])
        np.testing.assert_allclose(kept, expected, atol=1e-4)
        ranked = prior.similar(indexed, question, num)
        assert sorted(ranked) == sorted(request.fact_ids)
        assert (np.diff([whole[fact_id] for fact_id in ranked.tolist()]) <= 1e-4).all()
    return float(np.mean(found))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num", [1, 100])
def test_an_index_finds_nearly_all_that_an_exact_search_finds(adapter, dtype, num):
    indexed, exact = memory_of(adapter, dtype=dtype), memory_of(adapter, dtype=dtype)
    index_memory(indexed, min_rows=NUM_FACTS)
    assert is_indexed(indexed) == [True]
    assert is_indexed(exact) == [False]
    assert recall(indexed, exact, QuestionPrior(Reader(), beta=10.0), num) >= 0.98


def test_half_of_the_lists_are_enough_for_a_few_facts(adapter, monkeypatch):
    monkeypatch.setattr(nearest, "PROBED_ROWS", NUM_FACTS // 2)
    indexed, exact = memory_of(adapter), memory_of(adapter)
    index_memory(indexed, min_rows=1)
    assert recall(indexed, exact, QuestionPrior(Reader(), beta=10.0), 5) >= 0.9


@pytest.mark.parametrize("dim", [7, 33, 300])
def test_keys_of_any_number_of_dimensions(adapter, dim):
    keys = torch.randn(2_000, dim, generator=torch.Generator().manual_seed(1))
    index = nearest.ChunkIndex(keys)
    hits = 0
    for row in range(50):
        question = keys[row] + 0.3 * torch.randn(dim)
        best = int((torch.nn.functional.normalize(keys, dim=1) @ question).argmax())
        hits += best in index.nearest((question / question.norm()).numpy(), 80, None)
    assert hits >= 48


@pytest.mark.parametrize("beta", [0.0, 10.0])
def test_facts_that_the_question_names_are_candidates_wherever_they_lie(adapter, beta):
    indexed, exact = memory_of(adapter), memory_of(adapter)
    index_memory(indexed, min_rows=1)
    prior = QuestionPrior(Reader(), beta=beta, gamma=25.0)
    for number in range(20):
        question = f"{number:02} what colour has entity{number + 100}?"
        wanted = prior.similar(exact, question, 12)
        named = {10 * row for row, entity in enumerate(ENTITIES) if entity == f"entity{number + 100}"}
        assert len(named) == 3
        assert named <= set(prior.apply(indexed, question, 12).fact_ids.tolist())
        assert set(prior.similar(indexed, question, 3)) == named == set(wanted[:3])


def test_changes_are_seen_at_once_and_the_index_stays(adapter):
    changed, gone = list(range(0, 600, 2)), list(range(1, 900, 3))
    gone = [row for row in gone if row not in changed]
    indexed = memory_of(adapter)
    index_memory(indexed, min_rows=NUM_FACTS)
    after = indexed.apply(Changes(changed, gone))
    exact = memory_of(adapter).apply(Changes(changed, gone))
    assert is_indexed(after) == [True, False]
    prior = QuestionPrior(Reader(), beta=10.0)
    assert recall(after, exact, prior, 20) >= 0.95
    # The version before sees what it saw.
    assert recall(indexed, memory_of(adapter), prior, 20) >= 0.95
    selected = after.select(after.fact_ids[: len(after.fact_ids) // 2])
    assert is_indexed(selected)[0]
    for question in QUESTIONS[:5]:
        assert set(prior.similar(selected, question, 20)) <= set(selected.fact_ids)


def test_where_the_lists_looked_through_hold_too_few_facts_all_are_compared(adapter, monkeypatch):
    monkeypatch.setattr(nearest, "PROBED_ROWS", 1)
    monkeypatch.setattr(nearest, "PROBED_SHARE", 0.0)
    indexed, exact = memory_of(adapter), memory_of(adapter)
    index_memory(indexed, min_rows=1)
    prior = QuestionPrior(Reader(), beta=10.0)
    assert nearest.near_rows(indexed.views[0], prior.embed(QUESTIONS[0]), 20) is not None
    farthest = prior.similar(exact, QUESTIONS[0], NUM_FACTS)[::-1][:1_500]
    part = indexed.select(farthest)
    assert nearest.near_rows(part.views[0], prior.embed(QUESTIONS[0]), 20) is None
    expected = prior.similar(exact.select(farthest), QUESTIONS[0], 20)
    assert prior.similar(part, QUESTIONS[0], 20).tolist() == expected.tolist()


@pytest.mark.parametrize("num", [NUM_FACTS // 4, NUM_FACTS - 1])
def test_many_facts_are_found_exactly(adapter, num):
    indexed, exact = memory_of(adapter), memory_of(adapter)
    index_memory(indexed, min_rows=1)
    prior = QuestionPrior(Reader(), beta=10.0)
    assert prior.similar(indexed, QUESTIONS[0], num).tolist() == prior.similar(exact, QUESTIONS[0], num).tolist()


def test_a_prior_that_looks_for_the_farthest_facts_compares_all(adapter):
    indexed, exact = memory_of(adapter), memory_of(adapter)
    index_memory(indexed, min_rows=1)
    for beta, gamma in ((-10.0, 0.0), (10.0, -5.0)):
        prior = QuestionPrior(Reader(), beta=beta, gamma=gamma)
        assert prior.similar(indexed, "00 entity7", 5).tolist() == prior.similar(exact, "00 entity7", 5).tolist()


def test_only_large_chunks_are_indexed(adapter):
    memory = memory_of(adapter, chunk_rows=1_500)
    index_memory(memory, min_rows=1_500)
    assert is_indexed(memory) == [True, True, False]
    prior = QuestionPrior(Reader(), beta=10.0)
    assert recall(memory, memory_of(adapter), prior, 10) >= 0.95
    small = memory_of(adapter, rows=range(999))
    index_memory(small, min_rows=1)
    assert is_indexed(small) == [False]


def test_an_index_goes_with_its_chunk_and_counts_until_then(adapter):
    memory = memory_of(adapter)
    assert index_nbytes(memory) == 0
    held = memory.nbytes
    index_memory(memory, min_rows=1)
    assert memory.nbytes == held
    # Four bits for two numbers, 8 bytes for the id, 16 for the entity's hash and row.
    assert NUM_FACTS * (DIM / 4 + 24) < index_nbytes(memory) < NUM_FACTS * (DIM / 2 + 40) + 20_000
    index = weakref.ref(nearest._INDEXES[memory.views[0].chunk])
    after = memory.apply(Changes([], [5]))
    request = QuestionPrior(Reader(), beta=10.0).apply(after, QUESTIONS[0], 3)
    assert index_nbytes(after) == index_nbytes(memory) + NUM_FACTS // 8
    del memory, after
    gc.collect()
    assert index() is not None
    del request
    gc.collect()
    assert index() is None


def test_a_chunk_is_indexed_once_whoever_asks(adapter, monkeypatch):
    memory = memory_of(adapter)
    built = []
    real = nearest.ChunkIndex

    def counted(keys_MP):
        built.append(threading.get_ident())
        return real(keys_MP)

    monkeypatch.setattr(nearest, "ChunkIndex", counted)
    threads = [threading.Thread(target=index_memory, args=(memory,), kwargs={"min_rows": 1}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert is_indexed(memory) == [True]


def test_many_threads_may_search_one_index(adapter):
    memory = memory_of(adapter).apply(Changes([1], [2]))
    index_memory(memory, min_rows=1)
    prior = QuestionPrior(Reader(), beta=10.0)
    alone = [prior.similar(memory, question, 10).tolist() for question in QUESTIONS]
    found = {}

    def ask(number):
        found[number] = [prior.similar(memory, question, 10).tolist() for question in QUESTIONS]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [alone] * 4


def test_the_librarys_threads_are_left_as_they_were(adapter):
    import faiss

    before, torch_before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(2)
    try:
        # The two may share their runtime.
        torch_now = torch.get_num_threads()
        memory = memory_of(adapter)
        index_memory(memory, min_rows=1)
        QuestionPrior(Reader(), beta=10.0).similar(memory, QUESTIONS[0], 3)
        assert faiss.omp_get_max_threads() == 2
        assert torch.get_num_threads() == torch_now
    finally:
        faiss.omp_set_num_threads(before)
        torch.set_num_threads(torch_before)


def test_what_is_missing_is_said(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    memory = memory_of(adapter)
    with pytest.raises(MissingDependencyError, match="faiss"):
        index_memory(memory, min_rows=1)
    assert is_indexed(memory) == [False]
    index_memory(memory, min_rows=NUM_FACTS + 1)


def test_words_are_looked_for_where_there_are_texts_only(adapter):
    keys = torch.from_numpy(KEYS)
    memory = KnowledgeMemory.from_embeddings(adapter, keys, keys)
    index_memory(memory, min_rows=1)
    assert QuestionPrior(Reader(), beta=10.0).apply(memory, QUESTIONS[0], 3).num_facts == 3
    with pytest.raises(InputError, match="no texts"):
        QuestionPrior(Reader(), beta=10.0, gamma=1.0).apply(memory, QUESTIONS[0], 3)


def test_the_benchmark_measures_both_ways(tmp_path):
    kb = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:64")
    kb.upsert(SyntheticFacts(0).facts(0, 600))
    before = torch.get_num_threads()
    try:
        found = benchmark_nearest(NearestBenchmark(kb=kb.uri, num_facts=[1_500], selected=[5], num_questions=4))
    finally:
        torch.set_num_threads(before)
    (size,) = found["sizes"]
    assert size["num_facts"] == 1_500
    assert size["index_bytes_per_fact"] > 16
    assert size["selected"][5]["recall"] >= 0.9
    assert size["selected"][5]["exact_ms"] > 0
    assert size["selected"][5]["indexed_ms"] > 0
