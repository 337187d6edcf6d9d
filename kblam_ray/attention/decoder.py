"""A base model's attention modules: which can be attached to, and what in them cannot be merged with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
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
        UnsupportedModelError: it has none, has several of one layer, or encodes and decodes.
    """
    name = type(base_model).__name__
    if getattr(base_model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError("not a decoder-only model", where=name, help="attach to a decoder, such as Llama")
    # A few families call their output projection the decoder, and give that.
    found = _by_layer(base_model.get_decoder()) or _by_layer(base_model.base_model)
    if not found:
        raise UnsupportedModelError(
            "no layer calls the attention interface of transformers",
            where=name,
            help="use a decoder whose modelling file looks its attention up in ALL_ATTENTION_FUNCTIONS",
        )
    return found


def _by_layer(decoder: nn.Module) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for name, module in decoder.named_modules():
        layer = getattr(module, "layer_idx", None)
        if type(layer) is not int or _is_cross_attention(name) or not _uses_attention_interface(module):
            continue
        if layer in found:
            raise UnsupportedModelError(
                f"layer {layer} has several attentions",
                where=type(decoder).__name__,
                help="choose a base model that is one stack of layers, each with one attention over the text",
            )
        found[layer] = module
    return found


def _is_cross_attention(name: str) -> bool:
    own_name = name.rpartition(".")[2]
    return "cross" in own_name or own_name == "encoder_attn"


def decoder_layer_of(base_model: nn.Module, attention: nn.Module) -> nn.Module:
    """The decoder layer that an attention module stands in: what is around it, up to a place in a list of modules."""
    name = next(name for name, module in base_model.named_modules() if module is attention)
    around = name.split(".")[:-1]
    while around and not around[-1].isdigit():
        around.pop()
    return base_model.get_submodule(".".join(around) if around else name.rpartition(".")[0])


_WORKS_ON_TOKENS_ALONE = re.compile(
    "Linear|Norm|Dropout|Identity|Router|Experts|Activation|GELU|SiLU|ReLU|Sigmoid|Embedding|Conv1D$"
)
"""Names of modules that give each token what they give it alone (`Conv1D` is how GPT-2 calls its projections)."""


def mixes_tokens_later(layer: nn.Module, attention: nn.Module) -> bool:
    """Whether a decoder layer may mix tokens outside of its attention, as convolutions and recurrences do."""
    others = set(layer.modules()) - set(attention.modules())
    leaves = (module for module in others if next(module.children(), None) is None)
    return not all(_WORKS_ON_TOKENS_ALONE.search(type(module).__name__) for module in leaves)


def _uses_attention_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def eager_function(module: nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The plain attention function of a module's own modelling file."""
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward", _no_eager_function)


def _no_eager_function(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    raise unsupported_implementation("eager", type(module).__name__)


def refuse_unsupported(base_model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    """Raises UnsupportedModelError where one of these attentions has something that cannot be merged with."""
    name = type(base_model).__name__
    implementation = base_model.config._attn_implementation
    if implementation not in SUPPORTED:
        raise unsupported_implementation(implementation, name)
    config = base_model.config.get_text_config(decoder=True)
    shape = BaseShape.of(base_model.config)
    for module in modules:
        widths = {getattr(module, width, None) or shape.head_dim for width in ("head_dim", "qk_head_dim", "v_head_dim")}
        if widths != {shape.head_dim}:
            raise UnsupportedModelError(
                f"heads of several widths: {sorted({*widths, shape.head_dim})}",
                where=name,
                help="choose a base model, or KB layers, whose keys, queries and values have one head dimension",
            )
        num_heads = getattr(module, "num_heads", shape.num_heads)
        hidden_size = getattr(getattr(module, "q_proj", None), "in_features", shape.hidden_size)
        if (num_heads, hidden_size) != (shape.num_heads, shape.hidden_size):
            raise UnsupportedModelError(
                f"an attention of {num_heads} heads over hidden states of {hidden_size} numbers, where the model has"
                f" {shape.num_heads} and {shape.hidden_size}",
                where=name,
                help="choose a base model, or KB layers, whose attentions have one shape",
            )
        if any("sink" in parameter for parameter, _ in module.named_parameters()):
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


def training_implementation(device: torch.device | str) -> str:
    """The attention implementation that a frozen base model trains fastest with, among `SUPPORTED`.

    On a CPU the backward pass of the fused operator takes several times as long as plain products do for texts as
    short as training examples (measured: 17 ms for 20 rows of 48 tokens and 8 heads, where all else of a layer takes
    25 ms); on a GPU the fused one is faster and needs less memory.
    """
    return "eager" if torch.device(device).type == "cpu" else "sdpa"
