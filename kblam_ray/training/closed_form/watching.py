"""Looks at what some attention modules of a frozen model receive and compute, without changing its output.

Shape legend: B batch, T tokens, N query heads, K key/value heads, H head dim, X hidden size.

For the time of a pass the modules look their attention function up under a name of ours, as they do for any other
attention implementation of transformers; the library's own function then computes their output.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kblam_ray.attention.decoder import attention_modules, eager_function, refuse_unsupported
from kblam_ray.attention.text import text_log_sum_exp
from kblam_ray.errors import UnsupportedModelError

_NAME = "kblam_ray_closed_form"


class Consumer(Protocol):
    """Takes what a layer's attention worked on, at once: nothing is kept of a pass but what it keeps."""

    def take(self, layer: int, hidden_BTX: torch.Tensor, value_BKTH: torch.Tensor, lse_BNT: torch.Tensor) -> None:
        """`hidden_BTX`: what the module received; `lse_BNT`: log-sum-exp of its text logits per query head."""


class WatchedModel:
    """A frozen model whose chosen attention modules are watched.

    Args:
        layers: decoder layers to watch.

    Raises:
        UnsupportedModelError: a layer has no attention that knowledge can be merged with.
    """

    def __init__(self, base_model: PreTrainedModel, layers: Sequence[int]) -> None:
        AttentionInterface.register(_NAME, _watched_attention)
        found = attention_modules(base_model)
        missing = [layer for layer in layers if layer not in found]
        if missing:
            raise UnsupportedModelError(
                f"layer {missing[0]} has no attention that knowledge can be merged with",
                where=type(base_model).__name__,
                help=f"choose KB layers among {sorted(found)}",
            )
        self._modules = {layer: found[layer] for layer in layers}
        refuse_unsupported(base_model, self._modules.values())
        self._model = base_model
        self.layers = tuple(layers)
        # Logits are not looked at: of a large vocabulary they would be most of the memory.
        keeps = "logits_to_keep" in inspect.signature(base_model.forward).parameters
        self._least = {"logits_to_keep": 1} if keeps else {}

    @property
    def device(self) -> torch.device:
        return self._model.device

    @torch.no_grad()
    def run(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, consumer: Consumer) -> None:
        """One forward pass; `consumer` sees each watched layer once, in order."""
        with self._watched(consumer):
            self._model(
                input_ids=input_ids_BT.to(self.device),
                attention_mask=attention_mask_BT.to(self.device),
                use_cache=False,
                **self._least,
            )

    @contextmanager
    def _watched(self, consumer: Consumer) -> Iterator[None]:
        configs: dict[int, Any] = {layer: module.config for layer, module in self._modules.items()}
        training = [module for module in self._model.modules() if module.training]
        hooks = []
        try:
            self._model.eval()
            for layer, module in self._modules.items():
                # The modules share one config object: each watched one gets a copy with our name in it.
                watched = copy.copy(configs[layer])
                watched._attn_implementation_internal = _NAME
                module.config = watched
                watch = _Watch(layer, configs[layer]._attn_implementation, consumer)
                hooks.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, module in self._modules.items():
                module.config = configs[layer]
            for module in training:
                module.training = True


class _Watch:
    def __init__(self, layer: int, implementation: str, consumer: Consumer) -> None:
        self.layer, self.implementation, self._consumer = layer, implementation, consumer
        self._hidden_BTX: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._hidden_BTX = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, {**kwargs, "kblam_ray_watch": self}

    def saw(self, query_BNTH: torch.Tensor, key_BKTH: torch.Tensor, value_BKTH: torch.Tensor, mask: Any, scale: Any):
        hidden_BTX, self._hidden_BTX = self._hidden_BTX, None
        assert hidden_BTX is not None
        lse_BNT = text_log_sum_exp(query_BNTH, key_BKTH, mask, is_causal=mask is None, scale=scale)
        self._consumer.take(self.layer, hidden_BTX, value_BKTH, lse_BNT)


def _watched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kblam_ray_watch: _Watch,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    kblam_ray_watch.saw(query, key, value, attention_mask, kwargs.get("scaling"))
    function = ALL_ATTENTION_FUNCTIONS.get_interface(kblam_ray_watch.implementation, eager_function(module))
    return function(module, query, key, value, attention_mask, **kwargs)
