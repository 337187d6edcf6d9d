"""Requests per second and time to first token: over HTTP, against the same engine in this process, and one at a time.

All three answer the same questions, in turns, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import threading
import time
from typing import Any

import numpy as np

from kblam_ray.errors import InputError
from kblam_ray.model import KnowledgeModel
from kblam_ray.serving.benchmark.clients import Ask, Load, closed_loop, in_process, over_http
from kblam_ray.serving.benchmark.processes import running_server
from kblam_ray.serving.benchmark.settings import ServeBenchmark
from kblam_ray.serving.local import LocalBackend
from kblam_ray.serving.replica import load_model, one_thread_per_core
from kblam_ray.serving.settings import LimitSettings, ServeSettings
from kblam_ray.serving.wanted import KbSpec
from kblam_ray.table.knowledge_base import KnowledgeBase

KB = "asked"
MANY = 1_000_000


def benchmark_load(settings: ServeBenchmark) -> dict[str, Any]:
    """One row per number of clients; ratios are medians over the rounds of what was measured beside each other."""
    questions = plain_questions(settings.kb, settings.requests, settings.seed)
    served = ServeSettings(
        base_model=settings.base_model,
        adapter=settings.adapter,
        model_name="asked",
        limits=LimitSettings(max_ongoing_requests=max(settings.clients), max_queued_requests=MANY),
    )
    one_thread_per_core(served)
    model = load_model(served)
    alone = _one_at_a_time(model, settings, questions[: max(10, settings.requests // 5)])
    flags = [
        *("--kb", f"{KB}={settings.kb}", "--model-name", "asked"),
        *("--limits-max-ongoing-requests", str(max(settings.clients)), "--limits-max-queued-requests", str(MANY)),
        *("--replicas-min-replicas", str(settings.replicas), "--replicas-max-replicas", str(settings.replicas)),
        *("--base-model", str(settings.base_model), "--adapter", str(settings.adapter)),
    ]
    if settings.one_core and len(os.sched_getaffinity(0)) < 2:
        raise InputError("one core for the engine, and none for the rest", where="one_core", help="leave it out")
    with running_server(*flags, one_core=settings.one_core) as address:
        rounds = asyncio.run(_measure(settings, served, model, address, questions))
    return {
        "questions": len(questions),
        "grounding": settings.grounding,
        "one_core": settings.one_core,
        "one_at_a_time": {"requests_per_s": round(alone, 2)},
        "rows": [_row(clients, rounds[clients], alone) for clients in settings.clients],
    }


def plain_questions(kb: str, num: int, seed: int) -> list[str]:
    """Questions about facts of a table drawn at random, entity and property named."""
    facts = KnowledgeBase.open(kb).snapshot().facts
    rows = np.random.default_rng(seed).permutation(facts.num_rows)[:num]
    chosen = facts.select(["entity", "property"]).take(rows).to_pylist()
    return [f"What is the {fact['property']} of {fact['entity']}?" for fact in chosen]


async def _measure(
    settings: ServeBenchmark, served: ServeSettings, model: KnowledgeModel, address: str, questions: list[str]
) -> dict[int, list[tuple[Load, Load]]]:
    found: dict[int, list[tuple[Load, Load]]] = {clients: [] for clients in settings.clients}
    backend = LocalBackend(served, {KB: KbSpec(settings.kb)}, model)
    said = settings.grounding, settings.max_tokens
    cores = sorted(os.sched_getaffinity(0))
    async with backend, over_http(address, f"asked:{KB}", *said, stream=settings.stream) as over_wire:
        local = in_process(backend, KB, *said, stream=settings.stream)
        for ask in (local, over_wire):  # what is loaded and compiled at first use is not what is measured
            await closed_loop(ask, questions, max(settings.clients), lambda begun: begun < max(settings.clients))
        for number in range(settings.rounds):
            for clients in settings.clients:
                pair = [
                    await _some(local, questions, clients, cores[:1] if settings.one_core else cores),
                    await _some(over_wire, questions, clients, cores[1:] if settings.one_core else cores),
                ]
                found[clients].append((pair[0], pair[1]))
                told = " and ".join(f"{load.per_second:.1f}" for load in pair)
                print(f"round {number + 1}: {clients} clients: {told} per second", file=sys.stderr)
    return found


async def _some(ask: Ask, questions: list[str], clients: int, cores: list[int]) -> Load:
    for thread in threading.enumerate():
        if thread.native_id is not None:
            os.sched_setaffinity(thread.native_id, cores)
    # One client needs no more than a part of the requests for a rate as steady as many clients give.
    num = len(questions) if clients > 4 else max(clients, len(questions) // 2)
    return await closed_loop(ask, questions, clients, lambda begun: begun < num)


def _one_at_a_time(model: KnowledgeModel, settings: ServeBenchmark, questions: list[str]) -> float:
    """Answers per second of `KnowledgeModel.ask`, which generates for one question at a time."""
    memory = model.load(settings.kb)
    model.ask(questions[0], memory, settings.grounding, max_new_tokens=settings.max_tokens)
    started = time.perf_counter()
    for question in questions:
        model.ask(question, memory, settings.grounding, max_new_tokens=settings.max_tokens)
    return len(questions) / (time.perf_counter() - started)


def _row(clients: int, rounds: list[tuple[Load, Load]], alone: float) -> dict[str, Any]:
    def median(of: Any) -> float:
        return round(statistics.median(of(*pair) for pair in rounds), 4)

    return {
        "clients": clients,
        "in_process_per_s": median(lambda local, http: local.per_second),
        "http_per_s": median(lambda local, http: http.per_second),
        "http_to_in_process": median(lambda local, http: http.per_second / local.per_second),
        "http_to_one_at_a_time": median(lambda local, http: http.per_second / alone),
        "in_process_first_token_s": median(lambda local, http: local.first_token_s(0.5)),
        "http_first_token_s": median(lambda local, http: http.first_token_s(0.5)),
        "first_token_ratio": median(lambda local, http: http.first_token_s(0.5) / local.first_token_s(0.5)),
    }
