"""One KB layer of a decoder while adapters are attached: its attention merges the text with the facts.

Shape legend: B batch, T query tokens, S text tokens attended to, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kblam_ray.attention.batch import ForwardPass
from kblam_ray.attention.decoder import eager_function, refuse_other_terms, unsupported_implementation
from kblam_ray.attention.text import is_plain, plain_attention, sdpa_with_log_sum_exp, text_log_sum_exp
from kblam_ray.errors import InputError

ATTENTION_NAME = "kblam_ray"
"""Under which `knowledge_attention` is registered with transformers."""

_REACHED_LAYER: ContextVar[weakref.ref[ForwardPass] | None] = ContextVar("kblam_ray_reached_layer", default=None)
"""The forward pass that the decoder layer at work in this thread was called with."""


class Site:
    """A KB layer's attention module while it is attached to."""

    def __init__(self, module: Any, decoder_layer: nn.Module, layer: int) -> None:
        self._module, self.layer = module, layer
        self._config = module.config
        # A copy, because the model's own config must go on saying which masks and caches it needs.
        marked = copy.copy(module.config)
        marked._attn_implementation_internal = ATTENTION_NAME
        module.knowledge_site = self
        self._hooks = [
            decoder_layer.register_forward_pre_hook(self._before_layer, with_kwargs=True),
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True),
        ]
        # Last, and first to go: another thread may be running the model.
        module.config = marked

    def remove(self) -> None:
        self._module.config = self._config
        for hook in self._hooks:
            hook.remove()
        del self._module.knowledge_site

    @property
    def implementation(self) -> str:
        """The attention implementation that the model's masks and caches are made for at this moment."""
        return self._config._attn_implementation

    def text_function(self) -> Callable[..., tuple[torch.Tensor, Any]]:
        """The library's attention function for this module."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_function(self._module))

    @torch.compiler.disable
    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Here as well as at the attention: layers of a few families keep their keyword arguments to themselves.
        forward = kwargs.get("knowledge")
        _REACHED_LAYER.set(weakref.ref(forward) if isinstance(forward, ForwardPass) else None)

    @torch.compiler.disable
    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        reached = _REACHED_LAYER.get()
        forward = kwargs.pop("knowledge", None if reached is None else reached())
        if forward is not None and not isinstance(forward, ForwardPass):
            raise InputError(
                "knowledge was given to a part of the base model",
                where=type(module).__name__,
                help="give it to the model that the adapter is attached to",
            )
        if forward is not None:
            kwargs["knowledge_call"] = (forward, args[0] if args else kwargs["hidden_states"])
        return args, kwargs


@torch.compiler.disable
def knowledge_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of KB layers: the library's, merged with the attention over facts.

    Args: as transformers calls attention functions: query [B, N, T, H], key and value [B, K, S, H].

    Returns:
        Output [B, T, N, H], and the text's attention weights where the library gives them.
    """
    site: Site | None = getattr(module, "knowledge_site", None)
    if site is None:  # taken off by another thread a moment ago: `module` has its own config again
        own = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_function(module))
        return own(module, query, key, value, attention_mask, **kwargs)
    call = kwargs.pop("knowledge_call", None)
    function = site.text_function()
    if call is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    forward, hidden_BTX = call
    attended = forward.attend(site.layer, hidden_BTX.flatten(0, 1))
    if attended is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    refuse_other_terms(site.implementation, type(module).__name__, kwargs)
    # Of a token that surely sees facts no text output stands alone: none of them has to be the library's to the bit.
    may_be_plain = attended.is_everywhere
    if site.implementation == "sdpa":
        text_BTNH, lse_BNT = sdpa_with_log_sum_exp(
            function, module, query, key, value, attention_mask, may_be_plain=may_be_plain, **kwargs
        )
        weights_BNTS = None
    elif site.implementation == "eager" and may_be_plain and is_plain(query, key, value, kwargs.get("dropout", 0.0)):
        text_BNTH, lse_BNT, weights_BNTS = plain_attention(
            query, key, value, attention_mask, scale=kwargs.get("scaling")
        )
        text_BTNH = text_BNTH.transpose(1, 2)
    elif site.implementation == "eager":
        text_BTNH, weights_BNTS = function(module, query, key, value, attention_mask, **kwargs)
        lse_BNT = text_log_sum_exp(query, key, attention_mask, scale=kwargs.get("scaling"))
    else:
        raise unsupported_implementation(site.implementation, type(module).__name__)
    out_BTNH, weight_TN = attended.merge_with_text(text_BTNH, lse_BNT)
    if forward.recorder is not None:
        forward.recorder.record(site.layer, attended, weight_TN)
    if weights_BNTS is not None:
        text_share_BNT1 = 1 - weight_TN.view(*text_BTNH.shape[:3]).transpose(1, 2)[..., None]
        weights_BNTS = weights_BNTS * text_share_BNT1.to(weights_BNTS.dtype)
    return out_BTNH, weights_BNTS


AttentionInterface.register(ATTENTION_NAME, knowledge_attention)
