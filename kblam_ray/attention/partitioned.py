"""Adapters whose parameters are partitioned over processes, as DeepSpeed's ZeRO-3 does between their uses.

ZeRO-3 gathers a module's parameters when the module's own forward runs, and empties them after it. An adapter's modules
never run: the base model's layers read slices of their tensors (`projections.py`). So its parameters have to be known
as external ones of a module that does run, around the base model, forwards and backwards:

    class Training(nn.Module):
        def __init__(self, base_model, adapter):
            ...
            for parameter in external_parameters(adapter):
                deepspeed.zero.register_external_parameter(self, parameter)
"""

from __future__ import annotations

from torch import nn

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.errors import AdapterError


def external_parameters(adapter: KnowledgeAdapter) -> list[nn.Parameter]:
    """The parameters that are read outside of their modules' forward: all of them, each once, in a fixed order.

    Register them before `deepspeed.initialize`, with the module whose forward runs the base model. Buffers (kind
    "shared": `key_mean`, `key_scale`) are never partitioned.
    """
    return list(adapter.parameters())


def check_gathered(adapter: KnowledgeAdapter) -> None:
    """Raises AdapterError where a parameter is empty because its numbers lie in other processes now."""
    for name, parameter in adapter.named_parameters():
        if not parameter.numel():
            raise AdapterError(
                "a tensor of the adapter is partitioned over processes and not gathered now",
                where=name,
                help="register `external_parameters(adapter)` with the module that runs the base model, or work inside"
                " `deepspeed.zero.GatheredParameters(list(adapter.parameters()))`",
            )
