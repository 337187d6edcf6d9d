"""What is compared: cases, the memory that each takes, and which of them are measured side by side.

Shape legend: M facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.attention.benchmark.settings import AttentionBenchmark
from kblam_ray.attention.layer_facts import is_cheaper_expanded
from kblam_ray.attention.softmax import ROWS_PER_BLOCK, SCORES_PER_BLOCK


@dataclass(frozen=True)
class Case:
    """One way to attend to some facts: a form of our memory, or the published computation."""

    kind: Literal["paper", "shared"]
    form: Literal["latent", "materialized", "published"]
    num_facts: int

    def __str__(self) -> str:
        return f"{self.kind} {self.form}, {self.num_facts:,} facts"


@dataclass(frozen=True)
class CaseBytes:
    """Memory that a case takes: what it holds, and what it needs for a moment while it is made or used."""

    held: int
    working: int

    @property
    def total(self) -> int:
        return self.held + self.working


@dataclass(frozen=True)
class Skipped:
    case: Case
    reason: str


def cases_of(settings: AttentionBenchmark, num_facts: int) -> list[Case]:
    """The cases of one size, those that need least memory first."""
    cases = [
        Case(kind, form, num_facts) for form in dict.fromkeys(settings.form) for kind in dict.fromkeys(settings.kind)
    ]
    cases.sort(key=lambda case: (case.form, case.kind == "paper"))
    if settings.published and "paper" in settings.kind:
        cases.append(Case("paper", "published", num_facts))
    return cases


def case_bytes(case: Case, config: AdapterConfig, settings: AttentionBenchmark) -> CaseBytes:
    """An estimate from above of what a case takes on the device."""
    number_bytes = settings.torch_dtype.itemsize
    width, num_heads, num_facts = config.heads_width, config.base_shape.num_heads, case.num_facts
    layer_bytes = num_facts * width * number_bytes
    if case.form == "published":
        # Logits, their sum with the mask, the softmax in float32 with its input, and the weights.
        score_bytes = 3 * number_bytes + 8
        scores = settings.prompt_tokens * num_heads * num_facts
        return CaseBytes(2 * config.slots * layer_bytes, 2 * layer_bytes + scores * score_bytes)
    embeddings = 2 * num_facts * config.dim * settings.torch_memory_dtype.itemsize
    # An id and a scale per fact.
    held = embeddings + num_facts * (8 + 4)
    most_scores = SCORES_PER_BLOCK[settings.device]
    rows = num_heads if case.kind == "paper" else 1
    block_facts = min(num_facts, most_scores // rows)
    # Three float32 copies of the scores of a block, and its embeddings in the dtype of the queries.
    queries = rows * max(1, min(settings.prompt_tokens, ROWS_PER_BLOCK // rows))
    working = 12 * min(most_scores, queries * num_facts)
    working += 2 * block_facts * config.dim * number_bytes
    if case.form == "materialized":
        parts = 2 if case.kind == "paper" else 1
        held += len(config.layers) * parts * layer_bytes
        # While a layer is made, its blocks and what they are joined to exist side by side.
        working += 2 * parts * layer_bytes
    elif case.kind == "paper" and is_cheaper_expanded(
        num_tokens=settings.prompt_tokens, head_dim=config.base_shape.head_dim, dim=config.dim
    ):
        working += 2 * min(num_facts, most_scores // queries) * width * number_bytes
    return CaseBytes(held, working)


def side_by_side(
    cases: list[tuple[Case, CaseBytes]], limit_bytes: int | None
) -> tuple[list[list[Case]], list[Skipped]]:
    """Cases in groups that fit into memory together, in their order, and those that do not fit even alone.

    Args:
        limit_bytes: what all cases of a group may take together; None: anything.
    """
    if limit_bytes is None:
        return [[case for case, _ in cases]], []
    groups: list[list[Case]] = []
    skipped = []
    held = working = 0
    for case, size in cases:
        if size.total > limit_bytes:
            needed, allowed = size.total / 1e9, limit_bytes / 1e9
            skipped.append(Skipped(case, f"needs about {needed:.1f} GB of memory, and {allowed:.1f} GB are allowed"))
            continue
        held, working = held + size.held, max(working, size.working)
        if not groups or held + working > limit_bytes:
            groups.append([])
            held, working = size.held, size.working
        groups[-1].append(case)
    return groups, skipped
