"""A base model's attention modules: which can be attached to, and what in them cannot be merged with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kblam_ray.attention.adapter import BaseShape
from kblam_ray.errors import UnsupportedModelError

SUPPORTED = ("sdpa", "eager")
"""Attention implementations of a base model whose log-sum-exp can be had."""


def attention_modules(base_model: PreTrainedModel) -> dict[int, Any]:
    """The decoder's self-attention modules that use the library's attention interface, by layer.

    Raises:
        UnsupportedModelError: it has none, or encodes and decodes.
    """
    name = type(base_model).__name__
    if getattr(base_model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError("not a decoder-only model", where=name, help="attach to a decoder, such as Llama")
    decoder: nn.Module = base_model.get_decoder() if hasattr(base_model, "get_decoder") else base_model
    found: dict[int, Any] = {
        module.layer_idx: module  # type: ignore[misc]
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and _uses_attention_interface(module)
    }
    if not found:
        raise UnsupportedModelError(
            "no layer calls the attention interface of transformers",
            where=name,
            help="use a decoder whose modelling file looks its attention up in ALL_ATTENTION_FUNCTIONS",
        )
    return found


def _uses_attention_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def eager_function(module: nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The plain attention function of a module's own modelling file."""
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward", _no_eager_function)


def _no_eager_function(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    raise unsupported_implementation("eager", type(module).__name__)


def refuse_unsupported(base_model: PreTrainedModel, modules: dict[int, Any]) -> None:
    """Raises UnsupportedModelError where the attention has something that cannot be merged with."""
    name = type(base_model).__name__
    implementation = base_model.config._attn_implementation
    if implementation not in SUPPORTED:
        raise unsupported_implementation(implementation, name)
    config = base_model.config.get_text_config(decoder=True)
    head_dim = BaseShape.of(base_model.config).head_dim
    for module in modules.values():
        widths = {getattr(module, width, head_dim) for width in ("head_dim", "qk_head_dim", "v_head_dim")}
        if widths != {head_dim}:
            raise UnsupportedModelError(
                f"heads of several widths: {sorted({*widths, head_dim})}",
                where=name,
                help="choose a base model whose keys, queries and values have one head dimension",
            )
        if getattr(module, "sinks", None) is not None:
            raise UnsupportedModelError("attention sinks", where=name, help="choose a base model without them")
        softcap = getattr(module, "attn_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None)
        if softcap is not None:
            raise UnsupportedModelError(
                f"attention logits are capped at {softcap}", where=name, help="choose a base model without soft-capping"
            )


def refuse_other_terms(implementation: str, where: str, kwargs: dict[str, Any]) -> None:
    """Some layers hand terms of their softmax to the attention function: what is not in the log-sum-exp is refused."""
    # `sdpa` gets position biases as a mask, which the log-sum-exp has; the names are the library's.
    refused = ["sinks", "s_aux", "softcap"] + ["position_bias"] * (implementation != "sdpa")
    for term in refused:
        if kwargs.get(term) is not None:
            raise UnsupportedModelError(
                f"its attention has {term!r}, which cannot be merged with",
                where=where,
                help='load the base model with attn_implementation="sdpa", or choose another without it',
            )


def unsupported_implementation(implementation: str, where: str) -> UnsupportedModelError:
    """The error for an attention implementation other than `SUPPORTED`."""
    return UnsupportedModelError(
        f"the attention implementation {implementation!r} gives no log-sum-exp to merge with",
        where=where,
        help='load the base model with attn_implementation="sdpa"',
    )
