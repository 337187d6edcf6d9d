"""Finding the facts nearest to a question: through an index against comparing all of them, in one run.

Keys are those of a table, again and again with noise until there are enough; questions are about facts of the table.
Times are seconds of the processor, on one thread, so that what else the machine does counts less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.encoders.base import EncodedBatch, Encoder
from kblam_ray.encoders.load import load_encoder
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.job import JobConfig
from kblam_ray.model.nearest import index_memory, index_nbytes
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.table.knowledge_base import KnowledgeBase
from kblam_ray.table.snapshot import Snapshot

BETA, GAMMA = 10.0, 6.0


class NearestBenchmark(JobConfig):
    """Settings of `jobs/benchmark.py nearest`."""

    kb: str = Field(description="the table whose keys and facts are used: a local path or s3://bucket/prefix")
    num_facts: list[int] = Field([100_000, 1_000_000], min_length=1, description="facts in memory")
    selected: list[int] = Field([10, 100, 1_000], min_length=1, description="K of similar:K")
    num_questions: int = Field(100, gt=0, description="questions, each about another fact")
    noise: float = Field(0.4, ge=0, description="length of the noise on a repeated key, which has length 1")
    seed: int = Field(0, ge=0, description="of noise and questions")


class _Known(Encoder):
    """Gives embeddings that were made before: an encoder's own time would hide what is measured."""

    def __init__(self, encoder: Encoder, questions: Sequence[str]) -> None:
        self.spec = encoder.spec
        self._known = dict(zip(questions, encoder.encode(questions), strict=True))

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        return EncodedBatch(np.stack([self._known[text] for text in texts]))


def benchmark_nearest(config: NearestBenchmark) -> dict[str, Any]:
    """For each number of facts, the index's cost, and for each K: milliseconds with and without it, and its recall.

    Recall is the share of the K nearest facts by exact comparison that are found; `first` counts the nearest alone.
    """
    torch.set_num_threads(1)
    kb = KnowledgeBase.open(config.kb)
    snapshot = kb.snapshot()
    encoder = load_encoder(EncoderSettings(name=kb.encoder.name, expected_revision=kb.encoder.revision))
    rng = np.random.default_rng(config.seed)
    asked = rng.choice(snapshot.num_facts, min(config.num_questions, snapshot.num_facts), replace=False)
    rows = snapshot.facts.select(["entity", "property"]).take(pa.array(asked)).to_pylist()
    questions = list(dict.fromkeys(f"What is the {row['property']} of {row['entity']}?" for row in rows))
    known = _Known(encoder, questions)
    sizes = [
        _measure(config, _memory(config, snapshot, num_facts, rng), known, questions) for num_facts in config.num_facts
    ]
    return {"kb": kb.uri, "encoder": kb.encoder.name, "dim": kb.encoder.dim, "noise": config.noise, "sizes": sizes}


def _memory(config: NearestBenchmark, snapshot: Snapshot, num_facts: int, rng: np.random.Generator) -> KnowledgeMemory:
    keys_MP, dim = snapshot.key_embeddings_MP, snapshot.key_embeddings_MP.shape[1]
    repeated_MP = np.empty((num_facts, dim), np.float16)
    for start in range(0, num_facts, len(keys_MP)):
        part_mP = keys_MP[: num_facts - start].astype(np.float32)
        if start:
            noise_mP = rng.standard_normal(part_mP.shape, np.float32)
            part_mP += config.noise / np.sqrt(dim) * noise_mP
        repeated_MP[start : start + len(part_mP)] = part_mP / np.linalg.norm(part_mP, axis=1, keepdims=True)
    times = -(-num_facts // len(keys_MP))
    facts = pa.concat_tables([snapshot.facts.select(["entity", "property", "value"])] * times).slice(0, num_facts)
    shape = BaseShape(model_type="llama", hidden_size=8, num_layers=1, num_heads=1, head_dim=8)
    adapter = KnowledgeAdapter(AdapterConfig(kind="shared", base_shape=shape, dim=dim, kb_layers=[0], slots=1))
    # Values are not looked at.
    return KnowledgeMemory.from_embeddings(
        adapter, repeated_MP, repeated_MP, facts=facts.combine_chunks(), fact_ids=np.arange(num_facts)
    )


def _measure(
    config: NearestBenchmark, memory: KnowledgeMemory, encoder: Encoder, questions: Sequence[str]
) -> dict[str, Any]:
    prior, worded = QuestionPrior(encoder, BETA), QuestionPrior(encoder, BETA, gamma=GAMMA)
    worded.apply(memory, questions[0], 1)  # indexes the words, with or without an index of the keys
    ways: dict[int, dict[str, Any]] = {num: {} for num in config.selected}
    exact: dict[int, list[np.ndarray]] = {}
    words_nbytes = index_nbytes(memory)
    for name in ("exact", "indexed"):
        if name == "indexed":
            started = time.thread_time()
            index_memory(memory, min_rows=1)
            build_s = time.thread_time() - started
        for num, found in ways.items():
            chosen = [prior.similar(memory, question, num) for question in questions]
            found[f"{name}_ms"] = _median_ms(partial(prior.apply, memory, num_facts=num), questions)
            found[f"{name}_with_words_ms"] = _median_ms(partial(worded.apply, memory, num_facts=num), questions)
            if name == "exact":
                exact[num] = chosen
                continue
            pairs = list(zip(chosen, exact[num], strict=True))
            found["recall"] = float(np.mean([np.isin(right, got).mean() for got, right in pairs]))
            found["first"] = float(np.mean([right[0] in got for got, right in pairs]))
    return {
        "num_facts": memory.num_facts,
        "build_s": round(build_s, 2),
        "index_bytes_per_fact": round((index_nbytes(memory) - words_nbytes) / memory.num_facts, 1),
        "words_bytes_per_fact": round(words_nbytes / memory.num_facts, 1),
        "selected": {num: {key: round(value, 4) for key, value in found.items()} for num, found in ways.items()},
    }


def _median_ms(ask: Callable[[str], Any], questions: Sequence[str]) -> float:
    times = []
    for question in questions:
        started = time.thread_time()
        ask(question)
        times.append(time.thread_time() - started)
    return 1_000 * statistics.median(times)
