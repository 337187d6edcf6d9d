"""Run the benchmark of training steps: all cases in turns over one base model, all numbers in one summary.

On a CPU the seconds are core-seconds, those that the process's threads computed; on a GPU those of its clock.

Shape legend: B batch, T tokens, M facts, P encoder dim.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.benchmark.machine import FREE_SHARE, Machine, peak_process_bytes
from kblam_ray.attention.benchmark.random_model import adapter_config, num_parameters, random_adapter, random_llama
from kblam_ray.errors import InputError
from kblam_ray.training.benchmark.our_step import ALL_LOSSES, NEXT_TOKEN, OurStep
from kblam_ray.training.benchmark.published_step import PublishedStep
from kblam_ray.training.benchmark.settings import TrainingStepBenchmark
from kblam_ray.training.mix.batches import TrainingBatch

COMPARED_IN_FLOAT32 = 100_000_000
"""Up to so many parameters the losses are compared in float32, on a copy of the base model."""


@dataclass
class Case:
    """One way to make a training step, and the seconds its measurements took."""

    way: str
    kind: str
    kb_per: str
    step: PublishedStep | OurStep
    batch: TrainingBatch
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def row(self, num_tokens: int) -> dict[str, Any]:
        """Its numbers: tokens are those of the padded batch."""
        best, median = min(self.seconds), statistics.median(self.seconds)
        return {
            "way": self.way,
            "kind": self.kind,
            "kb_per": self.kb_per,
            "step_ms": round(1_000 * median, 2),
            "best_step_ms": round(1_000 * best, 2),
            "tokens_per_s": round(num_tokens / median),
            "best_tokens_per_s": round(num_tokens / best),
            "peak_device_mb": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 1),
        }


def benchmark_training_step(settings: TrainingStepBenchmark) -> dict[str, Any]:
    """Measure and return all numbers.

    Raises:
        InputError: no such device, or the base model does not fit into memory.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    machine = Machine(settings.device)
    base_model = _base_model(settings, machine)
    summary: dict[str, Any] = {
        "benchmark": "training-step",
        "seconds_of": "cores" if settings.device == "cpu" else "device",
        "parameters": num_parameters(settings.base_config()),
        "settings": settings.model_dump(),
        **machine.describe(),
    }
    _print(
        f"{summary['parameters'] / 1e6:,.1f} million random parameters, {settings.dtype}, {summary['device_name']}, "
        f"{summary['threads']} threads; {settings.batch_size} rows of {settings.num_tokens} tokens, "
        f"{settings.num_facts} facts"
    )
    if settings.published and "paper" in settings.kind:
        summary["equal_loss"] = _compare_losses(settings, base_model)
        _print(f"one loss at the same arithmetic: {summary['equal_loss']}")
    cases = _cases(settings, base_model)
    if settings.compile:
        base_model.compile()
    _measure(settings, machine, cases)
    num_tokens = settings.batch_size * settings.num_tokens
    rows = [case.row(num_tokens) for case in cases]
    if cases[0].way == "published":
        for row, case in zip(rows, cases, strict=True):
            pairs = zip(cases[0].seconds, case.seconds, strict=True)
            row["ratio"] = round(statistics.median(rival / own for rival, own in pairs), 3)
            row["best_ratio"] = round(min(cases[0].seconds) / min(case.seconds), 3)
    line = "{:<32}{:<8}{:<9}{:>12}{:>12}{:>8}{:>8}"
    _print(line.format("way", "kind", "KB per", "ms (median)", "tokens/s", "ratio", "best"))
    for row in rows:
        ratios = [str(row.get(name, "")) for name in ("ratio", "best_ratio")]
        _print(line.format(row["way"], row["kind"], row["kb_per"], row["step_ms"], row["tokens_per_s"], *ratios))
    return summary | {"cases": rows, "peak_process_mb": round(peak_process_bytes() / 1e6)}


def random_batch(settings: TrainingStepBenchmark, kb_per: str, *, is_all_answer: bool = False) -> TrainingBatch:
    """Random tokens and facts; lengths between the shortest and the longest, evenly.

    Args:
        is_all_answer: every token after the first is in the loss, padding included, as published.
    """
    random = torch.Generator().manual_seed(settings.seed)
    size, longest = settings.batch_size, settings.num_tokens
    lengths_B = torch.linspace(settings.shortest or longest, longest, size).round().long()
    ids_BT = torch.randint(settings.base_config().vocab_size, (size, longest), generator=random)
    mask_BT = (torch.arange(longest) < lengths_B[:, None]).long()
    start_B = lengths_B - settings.answer_tokens
    labels_BT = ids_BT.masked_fill((mask_BT == 0) | (torch.arange(longest) < start_B[:, None]), -100)
    num_bases = 1 if kb_per == "batch" else size
    shape = (2, num_bases, settings.num_facts, settings.dim)
    keys_BMP, values_BMP = torch.randn(shape, generator=random).half()
    # The tokens of an answer are written by the positions before them, each looking at one fact.
    at_W = (start_B[:, None] + torch.arange(-1, settings.answer_tokens - 1)).flatten()
    row_W = torch.arange(size).repeat_interleave(settings.answer_tokens)
    place_W = torch.randint(settings.num_facts, (size,), generator=random)[row_W]
    batch = TrainingBatch(
        numbers=tuple(range(size)),
        kinds=("simple",) * size,
        input_ids_BT=ids_BT,
        attention_mask_BT=mask_BT,
        labels_BT=ids_BT if is_all_answer else labels_BT,
        answer_start_B=start_B,
        is_text_B=torch.zeros(size, dtype=torch.bool),
        is_unanswerable_B=torch.zeros(size, dtype=torch.bool),
        keys_MP=tuple(keys_BMP),
        values_MP=tuple(values_BMP),
        wanted_row_W=row_W,
        wanted_at_W=at_W,
        wanted_place_W=place_W,
        wanted_part_W=torch.ones(len(row_W)),
    )
    return batch.to(settings.device)


def _base_model(settings: TrainingStepBenchmark, machine: Machine) -> PreTrainedModel:
    config, dtype = settings.base_config(), settings.torch_dtype
    size_bytes, free_bytes = num_parameters(config) * dtype.itemsize, FREE_SHARE * machine.free_bytes()
    if size_bytes > free_bytes:
        raise InputError(
            f"the base model takes {size_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB may be taken",
            where="--shape",
            help="choose a smaller shape or dtype, or a larger machine",
        )
    base_model = random_llama(config, machine.device, dtype, settings.seed)
    if settings.gradient_checkpointing:
        base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base_model.train()
    return base_model


def _adapter(settings: TrainingStepBenchmark, kind: str) -> KnowledgeAdapter:
    config = adapter_config(
        settings.base_config(),
        kind,
        dim=settings.dim,
        kb_layer_frequency=settings.kb_layer_frequency,
        kb_scale=settings.kb_scale,
    )
    config = config.changed(retrieval_layers=[config.layers[-1]])
    return random_adapter(config, torch.device(settings.device), torch.float32, settings.seed)


def _cases(settings: TrainingStepBenchmark, base_model: PreTrainedModel) -> list[Case]:
    cases = []
    if settings.published and "paper" in settings.kind:
        rival = PublishedStep(base_model, _adapter(settings, "paper"))
        cases.append(Case("published", "paper", "example", rival, random_batch(settings, "example")))
    for kind in dict.fromkeys(settings.kind):
        for kb_per in dict.fromkeys(settings.kb_per):
            batch = random_batch(settings, kb_per)
            if kind == "paper" and kb_per == "example":
                everything = random_batch(settings, kb_per, is_all_answer=True)
                cases.append(Case("ours, published loss", kind, kb_per, _ours(settings, base_model, kind), everything))
            for way, losses in (("ours, answers' loss", NEXT_TOKEN), ("ours, all losses", ALL_LOSSES)):
                cases.append(Case(way, kind, kb_per, _ours(settings, base_model, kind, losses), batch))
    return cases


def _ours(settings: TrainingStepBenchmark, base_model: PreTrainedModel, kind: str, losses: Any = NEXT_TOKEN) -> OurStep:
    return OurStep(base_model, _adapter(settings, kind), losses)


def _measure(settings: TrainingStepBenchmark, machine: Machine, cases: list[Case]) -> None:
    for turn in range(-1, settings.rounds):
        for case in cases:
            machine.forget_peak()
            with case.step.attached():
                seconds = _seconds(machine, partial(_repeat, case, settings.steps))
            case.peak_bytes = machine.peak_bytes()
            if turn >= 0:
                case.seconds.append(seconds / settings.steps)


def _seconds(machine: Machine, call: Callable[[], None]) -> float:
    if machine.device.type == "cuda":
        return machine.seconds(call)[0]
    # What this process's threads computed: on a machine that others use, too, the clock on the wall counts their work.
    started = time.process_time()
    call()
    return time.process_time() - started


def _repeat(case: Case, steps: int) -> None:
    for _ in range(steps):
        case.step(case.batch)


def _compare_losses(settings: TrainingStepBenchmark, base_model: PreTrainedModel) -> dict[str, Any]:
    """The loss and the gradient's size of both, ours set to the published arithmetic: one loss over all tokens."""
    dtype = settings.torch_dtype
    if num_parameters(settings.base_config()) <= COMPARED_IN_FLOAT32:
        dtype = torch.float32
        base_model = copy.deepcopy(base_model).float()
    batch = random_batch(settings, "example", is_all_answer=True)
    found = []
    for step in (PublishedStep(base_model, _adapter(settings, "paper")), _ours(settings, base_model, "paper")):
        with step.attached():
            loss = step.loss(batch)
            gradients = torch.autograd.grad(loss, list(step.adapter.parameters()))
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        found.append((loss.item(), norm.item()))
    (published, published_norm), (ours, our_norm) = found
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "published": published,
        "ours": ours,
        "gradient_norms": [float(np.format_float_positional(norm, 6)) for norm in (published_norm, our_norm)],
    }


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
