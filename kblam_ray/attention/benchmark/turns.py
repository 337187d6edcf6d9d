"""Prefill and decode of a base model, case by case in turns, each turn right after one without facts.

What else the machine does strikes neighbours in time alike: a ratio is taken within each pair, and the median over
the rounds is reported, with the smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM

from kblam_ray.attention.benchmark.machine import Machine
from kblam_ray.attention.benchmark.ways import NoFacts, Way


@dataclass
class Times:
    """Seconds of one case's rounds, and of the rounds without facts before each."""

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    bare_prefill_s: list[float] = field(default_factory=list)
    bare_decode_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def summary(self) -> dict[str, Any]:
        """Medians in milliseconds and ratios to no facts."""
        found: dict[str, Any] = {}
        for part, own_s, bare_s in (
            ("prefill", self.prefill_s, self.bare_prefill_s),
            ("decode", self.decode_s, self.bare_decode_s),
        ):
            ratios = [own / bare for own, bare in zip(own_s, bare_s, strict=True)]
            found[f"{part}_ms"] = round(1_000 * statistics.median(own_s), 3)
            found[f"no_kb_{part}_ms"] = round(1_000 * statistics.median(bare_s), 3)
            found[f"{part}_ratio"] = round(statistics.median(ratios), 3)
            found[f"{part}_ratio_smallest"] = round(min(ratios), 3)
            found[f"{part}_ratio_largest"] = round(max(ratios), 3)
        found["peak_device_mb"] = None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 1)
        return found


class Prompt:
    """One prompt of a base model: its prefill, and decode steps on a cache of its length."""

    def __init__(
        self, base_model: LlamaForCausalLM, machine: Machine, *, num_tokens: int, decode_steps: int, seed: int
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(base_model.config.vocab_size, (1, num_tokens + 1), generator=random)
        self._prompt_BT, self._next_BT = tokens.to(machine.device).split([num_tokens, 1], 1)
        self._base_model, self._machine, self._decode_steps = base_model, machine, decode_steps

    def turn(self, way: Way) -> tuple[float, float]:
        """Seconds of one prefill, and the median of the decode steps after it."""
        with way.attached(self._base_model) as knowledge:
            prefill_s, output = self._machine.seconds(
                lambda: self._base_model(self._prompt_BT, use_cache=True, logits_to_keep=1, **knowledge)
            )
            cache, steps_s = output.past_key_values, []
            for _ in range(self._decode_steps):
                step_s, _ = self._machine.seconds(
                    lambda: self._base_model(
                        self._next_BT, past_key_values=cache, use_cache=True, logits_to_keep=1, **knowledge
                    )
                )
                cache.crop(-1)
                steps_s.append(step_s)
        return prefill_s, statistics.median(steps_s)


def measure_in_turns(prompt: Prompt, ways: Sequence[Way], rounds: int, machine: Machine) -> list[Times]:
    """Times of each way, after one turn that does not count."""
    bare = NoFacts()
    times = [Times() for _ in ways]
    for way in (bare, *ways):
        prompt.turn(way)
    for _ in range(rounds):
        for way, taken in zip(ways, times, strict=True):
            bare_prefill_s, bare_decode_s = prompt.turn(bare)
            machine.forget_peak()
            prefill_s, decode_s = prompt.turn(way)
            taken.peak_bytes = machine.peak_bytes()
            taken.bare_prefill_s.append(bare_prefill_s)
            taken.bare_decode_s.append(bare_decode_s)
            taken.prefill_s.append(prefill_s)
            taken.decode_s.append(decode_s)
    return times
