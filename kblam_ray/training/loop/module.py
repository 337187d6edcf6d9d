"""What is trained: a frozen base model with an adapter on it, whose forward pass is the loss of some examples."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.attach import attach
from kblam_ray.attention.decoder import attention_modules, decoder_layer_of
from kblam_ray.errors import UnsupportedModelError
from kblam_ray.training.losses import training_loss
from kblam_ray.training.mix.batches import TrainingBatch
from kblam_ray.training.mix.settings import LossSettings


class TrainedModel(nn.Module):
    """A base model with an adapter; the root that engines wrap.

    The adapter is its only part. What engines do to a module's parameters (put on a device, cast, partition) is not for
    a frozen base model: each rank has a whole one, and ranks whose examples differ in kind need not keep step in it.

    Attributes:
        attachment: of the adapter to the base model.

    Args:
        base_model: is frozen here.
        adapter: is put into training; on the base model's device.
        losses: the weights of the loss's terms.
        touch_all: give every parameter a gradient in every pass, be it 0, for engines that count on it.
    """

    def __init__(
        self, base_model: PreTrainedModel, adapter: KnowledgeAdapter, losses: LossSettings, *, touch_all: bool = False
    ) -> None:
        super().__init__()
        base_model.requires_grad_(False)
        self.adapter = adapter.train().requires_grad_(True)
        self.attachment = attach(base_model, adapter)
        self._losses, self._touch_all = losses, touch_all

    def forward(self, batch: TrainingBatch, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch's share of the loss of the global batch.

        Args:
            counts: what the sums of the loss's terms are divided by: those of the global batch.

        Returns:
            The share, with gradients, and the terms' sums float64 [4] without.
        """
        found = training_loss(self.attachment, batch, self._losses)
        loss = found.objective(self._losses, counts)
        if self._touch_all:
            loss = loss + 0 * torch.stack([parameter.sum() for parameter in self.adapter.parameters()]).sum()
        return loss, found.sums.detach().double()


def checkpoint_activations(base_model: PreTrainedModel) -> None:
    """Let decoder layers compute their activations again in the backward pass instead of keeping them.

    Only the layers are put into training mode, which is what transformers asks for; their parts are not, so that a
    frozen model drops nothing out.

    Raises:
        UnsupportedModelError: the model cannot do it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not base_model.supports_gradient_checkpointing:
        raise UnsupportedModelError(
            "the model cannot compute activations again",
            where=type(base_model).__name__,
            help="train without --checkpoint-activations, with a smaller --micro-batch-size",
        )
    base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in base_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def compile_layers(base_model: PreTrainedModel) -> None:
    """Compile each decoder layer with torch.compile; the attention over facts stays as it is between the parts."""
    # Layers differ in their number alone: one compiled for all of them would be compiled anew for each.
    modules = attention_modules(base_model)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 4 * len(modules))
    for module in modules.values():
        decoder_layer_of(base_model, module).compile(dynamic=True)
