"""A training step of ours, as the benchmark measures it: the loss of `losses.py`, its gradients, the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.attach import attach
from kblam_ray.attention.decoder import training_implementation
from kblam_ray.training.losses import training_loss
from kblam_ray.training.mix.batches import TrainingBatch
from kblam_ray.training.mix.settings import LossSettings

NEXT_TOKEN = LossSettings(next_token=1.0, retrieval=0.0, refusal=0.0, divergence=0.0)
"""The published loss: cross-entropy of tokens, and nothing else."""

ALL_LOSSES = LossSettings()


@dataclass
class OurStep:
    """A step over a frozen base model that trains an adapter, whose tensors stay float32.

    Args:
        base_model: frozen.
        settings: which losses.
    """

    base_model: PreTrainedModel
    adapter: KnowledgeAdapter
    settings: LossSettings
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        self.adapter.train().requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self.adapter.parameters(), self.learning_rate, fused=True)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the base model attends to knowledge, and to its text as `training_implementation` says."""
        before = self.base_model.config._attn_implementation
        self.base_model.set_attn_implementation(training_implementation(self.base_model.device))
        self._attachment = attach(self.base_model, self.adapter)
        try:
            yield
        finally:
            self._attachment.detach()
            self.base_model.set_attn_implementation(before)

    def __call__(self, batch: TrainingBatch) -> torch.Tensor:
        """One step, while attached."""
        loss = self.loss(batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        """The objective of a batch, with autograd."""
        return training_loss(self._attachment, batch, self.settings).objective(self.settings)
