"""How many operations a closed-form fit takes, from the base model's shape and the number of questions.

Shape legend: X hidden size, P encoder dim, N query heads, H head dim, K key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kblam_ray.attention.adapter.config import BaseShape
from kblam_ray.training.closed_form.positions import PARTS
from kblam_ray.training.closed_form.settings import ClosedFormSettings


@dataclass(frozen=True)
class OperationCount:
    """Floating-point operations (a multiplication and an addition are two), and what the sums take.

    Attributes:
        passes: forward passes over all questions, with attention, without logits.
        products: the sums of products of hidden states, keys and values.
        solutions: factorisations and solutions of all ridges tried.
        gates: forward passes over held-out questions with the knowledge base attached.
        sums_bytes: the statistics' size, whatever the number of questions.
    """

    passes: float
    products: float
    solutions: float
    gates: float
    sums_bytes: int

    @property
    def total(self) -> float:
        return self.passes + self.products + self.solutions + self.gates

    def sentence(self, what: str, operations_per_s: float) -> str:
        """`what` takes so many PFLOP, so many minutes on a device of `operations_per_s`."""
        return (
            f"{what}: {self.total / 1e15:.3g} PFLOP, {self.total / operations_per_s / 60:.2g} minutes on one device at "
            f"{operations_per_s / 1e12:.3g} TFLOP/s; the statistics take {self.sums_bytes / 1e9:.2g} GB"
        )


def operation_count(
    base_config: Any,
    settings: ClosedFormSettings,
    *,
    tokens_per_question: int,
    dim: int = 384,
    num_kb_layers: int = 3,
) -> OperationCount:
    """Operations of one fit of a decoder with gated MLPs, such as Llama, by its transformers configuration.

    Args:
        tokens_per_question: mean number of tokens of a question with its answer.
        dim: P.
        num_kb_layers: layers with a knowledge base in the last step.

    Raises:
        UnsupportedModelError: the configuration lacks a size.
    """
    shape = BaseShape.of(base_config)
    text = base_config.get_text_config(decoder=True)
    hidden, heads, head_dim = shape.hidden_size, shape.num_heads, shape.head_dim
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    weights = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    per_token = shape.num_layers * (2 * weights + 4 * tokens_per_question * heads * head_dim)
    tokens = settings.num_questions * tokens_per_question
    layers = min(settings.max_candidate_layers, shape.num_layers)
    row = 2 * (hidden + 1) * (hidden + 1 + dim + heads)
    # Per candidate layer: the ridges at one weight of the prompt token, the best ridge at the others.
    tried = len(settings.ridges) + len(settings.prompt_shares) - 1
    solve = (hidden**3) / 3 + 2 * hidden**2 * dim + 2 * hidden**2 * dim
    gate_tokens = settings.num_gate_questions * tokens_per_question
    vocabulary = 2 * hidden * (getattr(text, "vocab_size", None) or 0)
    attended = num_kb_layers * 4 * settings.kb_size * dim
    size = hidden + 1
    return OperationCount(
        passes=float(tokens * per_token),
        products=float(tokens * layers * row),
        solutions=float(layers * tried * solve + num_kb_layers * solve),
        gates=float(GATE_PASSES * gate_tokens * (per_token + vocabulary + attended)),
        sums_bytes=8 * layers * (len(PARTS) * size * (size + dim + heads) + 2 * dim * kv_heads * head_dim),
    )


GATE_PASSES = 40
"""Adapters tried by the search of margins, shifts and values, at most; it stops earlier where nothing improves."""
