"""How the gradients of several processes become one step: plain data parallel, or DeepSpeed's ZeRO 1, 2 and 3.

An engine takes a loss that is this rank's share of the global batch's loss: the gradients of the ranks are **added**.
Where the loss is a sum over this rank's tokens divided by the number of tokens of the whole global batch, the step is
that of one process with the whole batch, however many ranks and micro-batches it was spread over.

What an engine saves is whole tensors by the adapter's parameter names, gathered where they are partitioned: a
checkpoint can be resumed with another strategy or another number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.training.loop.deepspeed_config import require_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""

OptimizerState = dict[str, torch.Tensor]
"""`exp_avg.NAME` and `exp_avg_sq.NAME` of each parameter of the adapter, float32."""


class Engine(Protocol):
    """The trained module and its optimizer."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of one micro-batch; `is_last` of a step's."""

    def step(self, learning_rate: float) -> float:
        """Add up the ranks' gradients, clip, update; the gradient's norm before clipping, infinite if not a number."""

    def adapter_tensors(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The adapter's state, whole, on the CPU. Every rank must call; one that does not keep it gets nothing."""

    def optimizer_state(self, keep: bool = True) -> OptimizerState:
        """The optimizer's, whole, on the CPU; empty before the first step. Every rank must call, as above."""

    def load_optimizer_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Put back what `optimizer_state` gave after so many steps."""


def parameter_groups(adapter: KnowledgeAdapter, value_rate: float) -> list[dict[str, Any]]:
    """The adapter's parameters for an optimizer: the value projection learns `value_rate` times as fast."""
    values = list(adapter.value_projection.parameters())
    of_values = {id(parameter) for parameter in values}
    others = [parameter for parameter in adapter.parameters() if id(parameter) not in of_values]
    return [{"params": others, "rate": 1.0}, {"params": values, "rate": value_rate}]


def adamw(groups: list[dict[str, Any]], weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW in torch: the same arithmetic under every engine, and nothing to compile."""
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, betas=betas, foreach=True)


def _set_rates(groups: list[dict[str, Any]], learning_rate: float) -> None:
    for group in groups:
        group["lr"] = learning_rate * group["rate"]


class DataParallel:
    """Every rank has the whole adapter and optimizer; the gradients are added up once per step.

    One flat buffer, all parameters in it whether or not this rank's rows gave them a gradient: ranks whose rows differ
    in kind still agree on what is added.
    """

    def __init__(
        self, module: nn.Module, adapter: KnowledgeAdapter, optimizer: torch.optim.Optimizer, clipping: float
    ) -> None:
        self.module, self._adapter, self._optimizer, self._clipping = module, adapter, optimizer, clipping
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        if loss.requires_grad:  # rows without facts have nothing to train
            loss.backward()

    def step(self, learning_rate: float) -> float:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in self._parameters if parameter.grad is not None])
            dist.all_reduce(flat)
            sizes = [parameter.numel() for parameter in self._parameters]
            for parameter, gradient in zip(self._parameters, flat.split(sizes), strict=True):
                parameter.grad = gradient.view_as(parameter)
        if self._clipping:
            norm = float(nn.utils.clip_grad_norm_(self._parameters, self._clipping))
        else:
            norm = float(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        if math.isfinite(norm):
            _set_rates(self._optimizer.param_groups, learning_rate)
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._adapter.weights_changed()
        return norm if math.isfinite(norm) else math.inf

    def adapter_tensors(self, keep: bool = True) -> dict[str, torch.Tensor]:
        state = self._adapter.state_dict() if keep else {}
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def optimizer_state(self, keep: bool = True) -> OptimizerState:
        found: OptimizerState = {}
        if not keep:
            return found
        for name, parameter in self._adapter.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            found.update({f"{moment}.{name}": state[moment].cpu().clone() for moment in MOMENTS if moment in state})
        return found

    def load_optimizer_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        for name, parameter in self._adapter.named_parameters():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)),
                **{moment: state[f"{moment}.{name}"].to(parameter.device).clone() for moment in MOMENTS},
            }


class Zero:
    """DeepSpeed's ZeRO: the optimizer's state (stage 1), the gradients (2), the adapter (3), spread over the ranks.

    `module` must have no other parameters than the adapter's.
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: KnowledgeAdapter,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
    ) -> None:
        deepspeed = import_deepspeed(adapter.device)
        self.module, self._adapter = module, adapter
        self._stage: int = config["zero_optimization"]["stage"]
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            # The adapter's tensors are read by the attention core, not by the forward passes of its own modules.
            for parameter in adapter.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
            # One bucket, in which gradients are sorted: of several, each rank fills the next in its own order.
            zero = config["zero_optimization"]
            least = sum(parameter.numel() for parameter in self._parameters)
            zero = {**zero, "reduce_bucket_size": max(least, zero.get("reduce_bucket_size", 0))}
            # It would put another function in the place of torch's for the whole process, the frozen model included.
            config = {**config, "zero_optimization": {"memory_efficient_linear": False, **zero}}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._world_size = dist.get_world_size()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs) if self._stage == 2 else self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        if self._stage == 2:
            loss = self._in_order(loss)
        # It takes the mean over the ranks; the ranks' losses are shares of a sum.
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()

    def _in_order(self, loss: torch.Tensor) -> torch.Tensor:
        """Another loss with the same gradients, which reach the parameters in the same order on every rank.

        Stage 2 adds up gradients in the order in which they come, whatever parameter they are of: where examples of one
        rank take another way through the model than those of the next, it adds those of different parameters.
        """
        gradients = torch.autograd.grad(loss, self._parameters)
        parts = [(parameter * gradient).sum() for parameter, gradient in zip(self._parameters, gradients, strict=True)]
        return torch.stack(parts).sum()

    def step(self, learning_rate: float) -> float:
        _set_rates(self._optimizer.param_groups, learning_rate)
        self._engine.step()
        self._adapter.weights_changed()
        norm = float(self._engine.get_global_grad_norm())
        # Of what is no number it takes the norm to be -1 or infinite, and leaves the step out.
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def adapter_tensors(self, keep: bool = True) -> dict[str, torch.Tensor]:
        tensors = {name: buffer.detach().cpu().clone() for name, buffer in self._adapter.named_buffers()}
        for name, parameter in self._adapter.named_parameters():
            whole = parameter
            if self._stage == 3:
                from deepspeed.utils import safe_get_full_fp32_param

                whole = safe_get_full_fp32_param(parameter)
            if keep:
                tensors[name] = whole.detach().cpu().clone()
        return tensors

    def optimizer_state(self, keep: bool = True) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not any(self._optimizer.optimizer.state.values()):
            return {}
        self._link()
        found: OptimizerState = {}
        for name, parameter in self._adapter.named_parameters():
            for moment in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if keep:
                    found[f"{moment}.{name}"] = whole.cpu().clone()
        return found

    def load_optimizer_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for flat in self._flat_parts():
            self._optimizer.optimizer.state[flat] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        self._link()
        for name, parameter in self._adapter.named_parameters():
            for moment in MOMENTS:
                value = state[f"{moment}.{name}"].to(self._adapter.device)
                self._set_state(parameter, value, moment, safe_set_full_optimizer_state)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str, set_state: Any) -> None:
        if self._stage == 3:
            # The last rank's part is padded to the size of the others'.
            part = -(-value.numel() // self._world_size)
            padded = value.new_zeros(part * self._world_size)
            padded[: value.numel()] = value.flatten()
            position = self._optimizer._get_fp32_opt_state_partition(parameter, False, moment)[0]
            rank = dist.get_rank()
            position.copy_(padded[rank * part : rank * part + position.numel()])
            return
        set_state(parameter, value, moment)

    def _flat_parts(self) -> list[torch.Tensor]:
        """What the optimizer sees: this rank's part of each group of parameters, flat."""
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """Let each parameter find its part of the optimizer's state.

        DeepSpeed does it after the step of the first group of parameters, when the others have no state yet.
        """
        if self._stage == 3:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for group, flat in zip(self._optimizer.bit16_groups, self._flat_parts(), strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, self._optimizer.optimizer.state)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this device, without the operator that it would compile for the CPU.

    Between processes of one machine it wants a shared-memory reduction of its own, compiled when first used: a minute,
    a C++ compiler and ninja, for what gloo does as well.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    require_deepspeed()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
