"""Sentences per second of our local encoder against `SentenceTransformer.encode`, on one core.

The baseline is called as microsoft/KBLaM's script calls it: chunks of 100 texts, first the key texts of all
facts, then their values. Both run in one process, pinned to one core with one thread each, in turns, so that
what else the machine does strikes both; the ratio is the median over the rounds. On a busy machine the ratio of
the processor time used (`cpu_ratio`) says more than that of the time passed.
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from kblam_ray.encoders.load import load_encoder
from kblam_ray.encoders.model_files import locate, require_local
from kblam_ray.encoders.sentence_transformer import INT8_SUFFIX
from kblam_ray.encoders.settings import Backend
from kblam_ray.errors import InputError
from kblam_ray.facts import Fact, RejectedRow, expand_inputs, key_text, read_facts
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.job import JobConfig

if TYPE_CHECKING:
    from kblam_ray.encoders.base import Encoder

logger = logging.getLogger(__name__)


class EncodeBenchmark(JobConfig):
    """Settings of `jobs/benchmark.py encode`."""

    input: list[str] = Field(default_factory=list, description="facts to take texts from; synthetic ones unless given")
    encoder: str = Field("all-MiniLM-L6-v2", description="a local encoder")
    backend: Backend = Field("auto", description="how our encoder runs")
    num_facts: int = Field(1_000, gt=0, description="facts drawn from the input: twice as many texts")
    rounds: int = Field(5, gt=0, description="measurements of each, in turns")
    chunk_texts: int = Field(100, gt=0, description="texts in one call of the baseline")
    batch_texts: int = Field(1_024, gt=0, description="texts in one call of ours, as the pipeline makes them")
    core: int | None = Field(None, ge=0, description="the core to run on: the last one that the process may use")
    seed: int = Field(0, description="which facts are drawn")


def benchmark_encode(config: EncodeBenchmark) -> dict[str, Any]:
    """Measure, and return rates in sentences per second, their ratio and the smallest cosine."""
    require_local()
    core = _pin(config.core)
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    facts = _draw_facts(config)
    texts = [[key_text(fact.entity, fact.property) for fact in facts], [fact.value for fact in facts]]
    num_texts = sum(map(len, texts))
    encoder = load_encoder(config.encoder, backend=config.backend, device="cpu", num_threads=1)
    model = SentenceTransformer(str(locate(config.encoder.removesuffix(INT8_SUFFIX))), device="cpu")

    def baseline(part: Sequence[str]) -> list[np.ndarray]:
        chunks = (part[start : start + config.chunk_texts] for start in range(0, len(part), config.chunk_texts))
        return [model.encode(list(chunk), convert_to_numpy=True, show_progress_bar=False) for chunk in chunks]

    def ours(part: Sequence[str]) -> list[np.ndarray]:
        return [encoder.encode(part[at : at + config.batch_texts]) for at in range(0, len(part), config.batch_texts)]

    for warm_up in (baseline, ours):
        warm_up(texts[0][: config.chunk_texts])
    rates: dict[str, list[float]] = {"baseline": [], "ours": []}
    cpu_ratios = []
    min_cosine = 1.0
    for number in range(config.rounds):
        expected_BP, baseline_s, baseline_cpu_s = _timed(baseline, texts)
        vectors_BP, ours_s, ours_cpu_s = _timed(ours, texts)
        cpu_ratios.append(baseline_cpu_s / ours_cpu_s)
        rates["baseline"].append(num_texts / baseline_s)
        rates["ours"].append(num_texts / ours_s)
        min_cosine = min(min_cosine, float(_cosines(expected_BP, vectors_BP).min()))
        logger.warning(
            "round %d of %d: baseline %.0f, ours %.0f sentences/s",
            number + 1, config.rounds, rates["baseline"][-1], rates["ours"][-1],
        )  # fmt: skip
    ratios = [b / a for a, b in zip(rates["baseline"], rates["ours"], strict=True)]
    return {
        "benchmark": "encode",
        "encoder": encoder.spec.model_dump(),
        "num_texts": num_texts,
        "mean_tokens": round(_mean_tokens(encoder, texts), 2),
        "core": core,
        "baseline_sentences_per_s": round(statistics.median(rates["baseline"]), 1),
        "sentences_per_s": round(statistics.median(rates["ours"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "min_cosine": round(min_cosine, 7),
    }


def _pin(core: int | None) -> int | None:
    """Keep the process on one core, before any library starts threads; None where the system cannot."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    if core is not None and core not in allowed:
        raise InputError(f"core {core} is not one of {sorted(allowed)}", where="--core", help="choose one of them")
    chosen = max(allowed) if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def _draw_facts(config: EncodeBenchmark) -> list[Fact]:
    if not config.input:
        return list(SyntheticFacts(config.seed).facts(0, config.num_facts))
    facts = []
    for file in expand_inputs(config.input):
        for row in read_facts(file):
            if isinstance(row, RejectedRow):
                raise row.to_error()
            facts.append(row.fact)
    return random.Random(config.seed).sample(facts, min(config.num_facts, len(facts)))


def _timed(
    encode: Callable[[Sequence[str]], list[np.ndarray]], texts: list[list[str]]
) -> tuple[np.ndarray, float, float]:
    """The embeddings, the seconds that passed, and the seconds of processor time."""
    started, started_cpu = time.perf_counter(), time.process_time()
    parts = [vectors for part in texts for vectors in encode(part)]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return np.concatenate(parts), seconds, cpu_seconds


def _cosines(a_BP: np.ndarray, b_BP: np.ndarray) -> np.ndarray:
    return (a_BP * b_BP).sum(1) / (np.linalg.norm(a_BP, axis=1) * np.linalg.norm(b_BP, axis=1))


def _mean_tokens(encoder: Encoder, texts: list[list[str]]) -> float:
    sample = [text for part in texts for text in part[:200]]
    return encoder.encode_batch(sample).tokens / len(sample)
