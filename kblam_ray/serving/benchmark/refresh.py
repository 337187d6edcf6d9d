"""What a change costs those who ask while it comes, whether any answer contradicts its version, and how soon it shows.

Clients ask all the time; in every other span a fact that they ask about changes each second. An answer names the
version that it was made from, so the value that it must state is known afterwards: another value of the same fact in it
is a contradiction. A second table, large and of the hashing encoder, shows how long 1,000 changed facts take from the
commit to every replica.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import EncoderRef
from kblam_ray.encoders.load import load_encoder
from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.model.base_model import load_base_model
from kblam_ray.serving.benchmark.clients import Ask, Load, closed_loop, of_sorted, over_http, post
from kblam_ray.serving.benchmark.load import KB, MANY
from kblam_ray.serving.benchmark.processes import get, running_server
from kblam_ray.serving.benchmark.settings import RefreshBenchmark
from kblam_ray.storage import is_s3
from kblam_ray.table.knowledge_base import KnowledgeBase

NUM_ASKED = 200
NUM_CHANGING = 20
VISIBLE_S = 60


@dataclass
class Histories:
    """Every value that the facts asked about ever had, by question, with the version that brought it."""

    facts: dict[str, Fact]
    changing: list[str]
    values: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def is_contradicted(self, question: str, text: str, version: int | None) -> bool:
        """Whether an answer states a value that its fact had in another version only."""
        history = self.values[question]
        assert version is not None, "every answer names its version"
        valid = [value for since, value in history if since <= version][-1]
        others = {value for _, value in history} - {valid}
        return any(value in text for value in others) and valid not in text


def benchmark_refresh(settings: RefreshBenchmark) -> dict[str, Any]:
    """Answers, errors (none, or this raises), contradictions, the ratio of p99, and seconds from commit to served."""
    if is_s3(settings.kb):
        raise InputError("the benchmark changes a copy of the table", where=settings.kb, help="give a local table")
    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/table"
        shutil.copytree(settings.kb, table)
        with running_server(*_flags(settings, f"{KB}={table}", settings.adapter)) as address:
            found = asyncio.run(_refresh_under_load(settings, address, table))
        if settings.large_facts:
            found["large_table"] = _large(settings, folder)
    return found


def _flags(settings: RefreshBenchmark, kb: str, adapter: str | None) -> list[str]:
    return [
        *("--kb", kb, "--model-name", "asked", "--limits-max-queued-requests", str(MANY)),
        *("--replicas-min-replicas", str(settings.replicas), "--replicas-max-replicas", str(settings.replicas)),
        *("--base-model", str(settings.base_model), "--adapter", str(adapter)),
    ]


async def _refresh_under_load(settings: RefreshBenchmark, address: str, table: str) -> dict[str, Any]:
    histories = _histories(table, settings.seed)
    questions = list(histories.facts)
    quiet, changing, num_changes = [], [], 0
    said = settings.grounding, settings.max_tokens
    async with over_http(address, f"asked:{KB}", *said) as ask:
        await closed_loop(ask, questions, settings.clients, lambda begun: begun < 2 * settings.clients)
        for number in range(settings.rounds):
            quiet.append(await _span(ask, questions, settings))
            over = asyncio.Event()
            changes = asyncio.create_task(_keep_changing(settings, address, histories, num_changes, over))
            changing.append(await _span(ask, questions, settings))
            over.set()
            num_changes = await changes
            told = f"{quiet[-1].total_s(0.99):.3f} s without, {changing[-1].total_s(0.99):.3f} s with changes"
            print(f"round {number + 1}: p99 {told}", file=sys.stderr)
    answers = [answer for load in (*quiet, *changing) for answer in load.answers]
    wrong = [one for one in answers if histories.is_contradicted(one.question, one.text, one.kb_version)]
    p99 = {name: of_sorted([one.seconds for load in loads for one in load.answers], 0.99) for name, loads in
           (("without", quiet), ("with", changing))}  # fmt: skip
    return {
        "answers": len(answers),
        "errors": 0,
        "contradictions": len(wrong),
        "contradicted": [f"{one.question} {one.text} (version {one.kb_version})" for one in wrong[:3]],
        "refused": sum(one.refused for one in answers),
        "versions": len({one.kb_version for one in answers}),
        "changes": num_changes,
        "seconds_with_changes": round(sum(load.seconds for load in changing), 1),
        "answers_per_s": round(len(answers) / sum(load.seconds for load in (*quiet, *changing)), 1),
        "p99_s": {name: round(time_s, 4) for name, time_s in p99.items()},
        "p99_with_to_without": round(p99["with"] / p99["without"], 3),
        "cores": len(os.sched_getaffinity(0)),
    }


def _histories(table: str, seed: int) -> Histories:
    kb = KnowledgeBase.open(table)
    rows = kb.snapshot().facts.select(["entity", "property", "value"]).to_pylist()
    step = max(1, len(rows) // NUM_ASKED)
    facts = {
        f"What is the {row['property']} of {row['entity']}?": Fact(**row)
        for row in rows[seed % step :: step][:NUM_ASKED]
    }
    version = kb.version or 0
    values = {question: [(version, fact.value)] for question, fact in facts.items()}
    return Histories(facts, list(facts)[:NUM_CHANGING], values)


async def _span(ask: Ask, questions: list[str], settings: RefreshBenchmark) -> Load:
    """Ask for a round's share of the time and of the answers, whichever takes longer."""
    until = time.monotonic() + settings.seconds / settings.rounds
    fewest = settings.answers // (2 * settings.rounds) + 1
    # What changes is asked half of the time.
    often = [question for at, one in enumerate(questions) for question in (one, questions[at % NUM_CHANGING])]
    return await closed_loop(ask, often, settings.clients, lambda begun: begun < fewest or time.monotonic() < until)


async def _keep_changing(
    settings: RefreshBenchmark, address: str, histories: Histories, done: int, over: asyncio.Event
) -> int:
    """Change one fact after the other until it is over; returns how many were changed so far."""
    while not over.is_set():
        question = histories.changing[done % len(histories.changing)]
        await _change(address, histories, question, histories.facts[question], f"Newvalue {done}")
        done += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.every_s):
                await over.wait()
    return done


async def _change(address: str, histories: Histories, question: str, fact: Fact, value: str) -> None:
    body = {"facts": [{"entity": fact.entity, "property": fact.property, "value": value}]}
    written = await post(address, f"/v1/knowledge_bases/{KB}/facts", body)
    assert written["status"] == 200, written
    histories.values[question].append((written["kb_version"], value))


def _large(settings: RefreshBenchmark, folder: str) -> dict[str, Any]:
    """Seconds from commit to served on every replica, for changes that another program commits and for POSTed ones."""
    table, adapter = f"{folder}/large", f"{folder}/adapter"
    encoder = load_encoder("hashing")
    kb = KnowledgeBase.create(table, encoder)
    facts = list(SyntheticFacts(settings.seed).facts(0, settings.large_facts))
    kb.upsert(facts)
    base_model, _ = load_base_model(settings.base_model or "", torch.device("cpu"), None)
    spec = encoder.spec
    ref = EncoderRef(name=spec.name, revision=spec.revision, dim=spec.dim)
    KnowledgeAdapter.for_model(base_model, encoder=ref).save_pretrained(adapter)
    flags = [*_flags(settings, f"{KB}={table}", adapter), "--limits-max-facts", str(settings.large_changes)]
    seconds: dict[str, list[float]] = {"committed_elsewhere": [], "posted": []}
    with running_server(*flags) as address:
        for number in range(settings.rounds):
            for way, times in seconds.items():
                changed = [
                    Fact(fact.entity, fact.property, f"{fact.value} {way} {number}")
                    for fact in facts[number :: settings.large_facts // settings.large_changes][
                        : settings.large_changes
                    ]
                ]
                times.append(_until_served(way, address, kb, changed, Path(table)))
    return {
        "facts": settings.large_facts,
        "changed": settings.large_changes,
        "commit_to_served_s": {way: [round(time_s, 3) for time_s in times] for way, times in seconds.items()},
    }


def _until_served(way: str, address: str, kb: KnowledgeBase, changed: list[Fact], table: Path) -> float:
    described = f"{address}/v1/knowledge_bases/{KB}"
    if way == "posted":
        rows = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in changed]
        written = asyncio.run(post(address, f"/v1/knowledge_bases/{KB}/facts?wait=true", {"facts": rows}))
        served = time.time()
        assert written["status"] == 200, written
        version = written["kb_version"]
    else:
        version = kb.upsert(changed)
        deadline = time.monotonic() + VISIBLE_S
        while (get(described)["version"] or 0) < version and time.monotonic() < deadline:
            time.sleep(0.01)
        served = time.time()
    committed = (table / "_delta_log" / f"{version:020}.json").stat().st_mtime
    return served - committed
