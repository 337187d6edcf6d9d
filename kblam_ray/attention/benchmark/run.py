"""Run the attention benchmark: one size after the other, its cases in turns, all numbers in one summary.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import numpy as np
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.attention.benchmark import report
from kblam_ray.attention.benchmark.cases import Case, Skipped, case_bytes, cases_of, side_by_side
from kblam_ray.attention.benchmark.machine import FREE_SHARE, Machine, peak_process_bytes
from kblam_ray.attention.benchmark.memory_changes import measure_apply, random_embeddings
from kblam_ray.attention.benchmark.random_model import (
    adapter_config,
    llama_config,
    num_parameters,
    random_adapter,
    random_llama,
)
from kblam_ray.attention.benchmark.refresh import measure_refresh
from kblam_ray.attention.benchmark.settings import AttentionBenchmark, auto_rule
from kblam_ray.attention.benchmark.turns import Prompt, Times, measure_in_turns
from kblam_ray.attention.benchmark.ways import Way, get_ready
from kblam_ray.attention.memory import choose_form
from kblam_ray.errors import InputError

READY_S = 5.0
"""Getting ready is repeated as often as there are rounds, but no more once it took this long altogether."""


def benchmark_attention(settings: AttentionBenchmark) -> dict[str, Any]:
    """Measure, write the files asked for, and return all numbers.

    Raises:
        InputError: no such device, or the base model does not fit into memory.
        MissingDependencyError: files are asked for and matplotlib is not installed.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    config = llama_config(settings.shape)
    configs: dict[str, AdapterConfig] = {
        kind: adapter_config(
            config,
            kind,
            dim=settings.dim,
            kb_layer_frequency=settings.kb_layer_frequency,
            kb_scale=settings.kb_scale,
        )
        for kind in dict.fromkeys(settings.kind)
    }
    summary: dict[str, Any] = {
        "benchmark": "attention",
        "shape": settings.shape,
        "parameters": num_parameters(config),
        "kb_layers": len(configs[settings.kind[0]].layers),
        "settings": settings.model_dump(),
        "auto": auto_rule(),
    }
    if settings.plan:
        return {**summary, **_plan(settings, configs)}
    writer = report.writer(settings.output)
    run = _Run(settings, configs)
    with torch.inference_mode():
        summary |= {**run.machine.describe(), "memory_limit_mb": round(run.limit_bytes / 1e6)}
        report.print_header(summary)
        cases: list[dict[str, Any]] = []
        skipped: list[dict[str, Any]] = []
        for num_facts in settings.sizes:
            measured, left_out = run.size(num_facts)
            cases += measured
            skipped += [{**vars(item.case), "reason": item.reason} for item in left_out]
            # After every size, so that a run that is ended early leaves what it found.
            writer(summary | {"cases": cases, "skipped": skipped})
        summary |= {"no_kb": _no_kb(cases), "cases": cases, "skipped": skipped}
        summary |= {"materialized_over_latent": _materialized_over_latent(cases)}
        summary |= run.changes()
    summary |= {"peak_process_mb": round(peak_process_bytes() / 1e6)}
    return summary | {"files": writer(summary)}


class _Run:
    """A base model with random weights, its adapters, and what they are measured with."""

    def __init__(self, settings: AttentionBenchmark, configs: dict[str, AdapterConfig]) -> None:
        self.settings, self._configs = settings, configs
        self.machine = Machine(settings.device)
        config, dtype = llama_config(settings.shape), settings.torch_dtype
        size_bytes, free_bytes = num_parameters(config) * dtype.itemsize, self.machine.free_bytes()
        if size_bytes > free_bytes:
            raise InputError(
                f"the base model takes {size_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free",
                where="--shape",
                help="choose a smaller shape or dtype, or a larger machine",
            )
        base_model = random_llama(config, self.machine.device, dtype, settings.seed)
        self._adapters: dict[str, KnowledgeAdapter] = {
            kind: random_adapter(adapter, self.machine.device, settings.torch_adapter_dtype, settings.seed)
            for kind, adapter in configs.items()
        }
        self._prompt = Prompt(
            base_model,
            self.machine,
            num_tokens=settings.prompt_tokens,
            decode_steps=settings.decode_steps,
            seed=settings.seed,
        )
        for kind in configs:
            # What is derived once per adapter, whatever facts it gets, is no part of getting facts ready.
            one_fact = Case(kind, "latent", 1)  # type: ignore[arg-type]
            self._ready(one_fact, *random_embeddings(1, settings.dim, settings.seed))
        if settings.max_memory_gb is not None:
            self.limit_bytes = int(settings.max_memory_gb * 1e9)
        else:
            self.limit_bytes = int(FREE_SHARE * self.machine.free_bytes())

    def size(self, num_facts: int) -> tuple[list[dict[str, Any]], list[Skipped]]:
        """Measure every case of one size that fits; the numbers of each, and what was left out."""
        sized = _sized(self.settings, self._configs, num_facts)
        # The embeddings that everything is made from are in host memory.
        source_bytes = 2 * 2 * num_facts * self.settings.dim if self.settings.device == "cpu" else 0
        groups, skipped = side_by_side(sized, self.limit_bytes - source_bytes)
        measured: list[dict[str, Any]] = []
        embeddings = random_embeddings(num_facts if groups else 0, self.settings.dim, self.settings.seed)
        while groups:
            group = groups.pop(0)
            try:
                measured += self._group(group, *embeddings)
            except torch.OutOfMemoryError:
                # Only CUDA says so. The cases are tried one by one before any is given up.
                if len(group) == 1:
                    skipped.append(Skipped(group[0], "the device ran out of memory"))
                else:
                    groups = [[case] for case in group] + groups
        _compare_with_published(measured)
        for row in measured:
            report.print_case(row)
        for item in skipped:
            report.print_skipped(item)
        return measured, skipped

    def changes(self) -> dict[str, Any]:
        """What changes of the facts cost, as far as that is asked for."""
        settings = self.settings
        found: dict[str, Any] = {}
        if settings.apply_changes:
            num_facts = settings.sizes[-1]
            # Measured on the CPU, with at most two loads of the facts side by side.
            needed = (
                2 * case_bytes(Case("paper", "latent", num_facts), next(iter(self._configs.values())), settings).held
            )
            if needed > self._host_limit_bytes():
                found["apply"] = {"num_facts": num_facts, "skipped": f"needs about {needed / 1e9:.1f} GB of memory"}
            else:
                num_changes = min(settings.apply_changes, num_facts)
                apply = measure_apply(num_facts, num_changes, settings.dim, rounds=settings.rounds)
                found["apply"] = {"device": "cpu", **apply}
            report.print_note("apply", found["apply"])
        if settings.refresh:
            found["refresh"] = [
                measure_refresh(
                    adapter,
                    self._prompt,
                    self.machine,
                    settings.torch_dtype,
                    settings.torch_memory_dtype,
                    num_facts=settings.refresh_facts,
                    num_applies=settings.refresh_applies,
                    rounds=settings.rounds,
                    seed=settings.seed,
                )
                for adapter in self._adapters.values()
            ]
            for row in found["refresh"]:
                report.print_note("refresh", row)
        return found

    def _host_limit_bytes(self) -> int:
        if self.settings.device == "cpu":
            return self.limit_bytes
        return int(FREE_SHARE * Machine("cpu").free_bytes())

    def _group(self, group: list[Case], keys_MP: np.ndarray, values_MP: np.ndarray) -> list[dict[str, Any]]:
        readied = [self._ready(case, keys_MP, values_MP) for case in group]
        times = measure_in_turns(self._prompt, [way for way, _ in readied], self.settings.rounds, self.machine)
        return [
            self._row(case, way, ready_s, taken)
            for case, (way, ready_s), taken in zip(group, readied, times, strict=True)
        ]

    def _ready(self, case: Case, keys_MP: np.ndarray, values_MP: np.ndarray) -> tuple[Way, list[float]]:
        adapter = self._adapters[case.kind]
        dtypes = self.settings.torch_dtype, self.settings.torch_memory_dtype
        way: Way | None = None
        taken_s: list[float] = []
        while len(taken_s) < self.settings.rounds and sum(taken_s) < READY_S:
            way = None  # two of them at once may not fit
            seconds, way = self.machine.seconds(lambda: get_ready(case, adapter, keys_MP, values_MP, *dtypes))
            taken_s.append(seconds)
        assert way is not None
        return way, taken_s

    def _row(self, case: Case, way: Way, ready_s: list[float], taken: Times) -> dict[str, Any]:
        auto = choose_form(self._adapters[case.kind], case.num_facts)
        return {
            **vars(case),
            "is_auto": case.form == auto,
            "nbytes": way.nbytes,
            "ready_s": round(statistics.median(ready_s), 6),
            **taken.summary(),
        }


def _sized(settings: AttentionBenchmark, configs: dict[str, AdapterConfig], num_facts: int):
    return [(case, case_bytes(case, configs[case.kind], settings)) for case in cases_of(settings, num_facts)]


def _plan(settings: AttentionBenchmark, configs: dict[str, AdapterConfig]) -> dict[str, Any]:
    """What would be measured: the memory of each case, and of what is left out under `--max-memory-gb`."""
    limit = None if settings.max_memory_gb is None else int(settings.max_memory_gb * 1e9)
    planned, skipped = [], []
    for num_facts in settings.sizes:
        sized = _sized(settings, configs, num_facts)
        groups, left_out = side_by_side(sized, limit)
        kept = [case for group in groups for case in group]
        planned += [
            {**vars(case), "held_mb": round(size.held / 1e6, 1), "working_mb": round(size.working / 1e6, 1)}
            for case, size in sized
            if case in kept
        ]
        skipped += [{**vars(item.case), "reason": item.reason} for item in left_out]
    for row in planned:
        print("would measure", row, file=sys.stderr)
    return {"planned": planned, "skipped": skipped}


def _no_kb(cases: list[dict[str, Any]]) -> dict[str, float] | None:
    """Medians over all cases' turns without facts."""
    if not cases:
        return None
    parts = ("prefill_ms", "decode_ms")
    return {part: round(statistics.median(row[f"no_kb_{part}"] for row in cases), 3) for part in parts}


def _compare_with_published(rows: list[dict[str, Any]]) -> None:
    """How many times as much the published computation takes, added to each of our cases of one size.

    Of prefill and decode the ratios to no facts are divided, so that it does not matter whether the two were measured
    side by side.
    """
    published = next((row for row in rows if row["form"] == "published"), None)
    if published is None:
        return
    for row in rows:
        if row is not published:
            row["published_over_ours"] = {
                part: round(published[column] / row[column], 3)
                for part, column in (
                    ("bytes", "nbytes"),
                    ("ready", "ready_s"),
                    ("prefill", "prefill_ratio"),
                    ("decode", "decode_ratio"),
                )
            }


def _materialized_over_latent(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where both forms were measured: what the materialized one takes over the latent one; below 1 it wins."""
    latent = {(row["kind"], row["num_facts"]): row for row in cases if row["form"] == "latent"}
    found = []
    for row in cases:
        other = latent.get((row["kind"], row["num_facts"]))
        if row["form"] == "materialized" and other is not None:
            found.append(
                {
                    "kind": row["kind"],
                    "num_facts": row["num_facts"],
                    "prefill": round(row["prefill_ratio"] / other["prefill_ratio"], 3),
                    "decode": round(row["decode_ratio"] / other["decode_ratio"], 3),
                    "bytes": round(row["nbytes"] / other["nbytes"], 3),
                    "auto": "materialized" if row["is_auto"] else "latent",
                }
            )
    return found
