"""What a base model's own attention works on: how large its hidden states and values are, and its query projections."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kblam_ray.attention.config import AdapterConfig, BaseShape
from kblam_ray.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_SAMPLE_TOKENS = 32

STACKED = {"phi3": "qkv_proj", "phi4_multimodal": "qkv_proj", "gpt2": "c_attn"}
"""Families whose one projection gives the queries of all heads, then the keys, then the values."""
INTERLEAVED = {"gpt_neox": "query_key_value", "persimmon": "query_key_value"}
"""Families whose one projection gives query, key and value of the first head, then of the second, and so on."""

_MEASURED_ATTENTION = "kblam_ray_measured"


@dataclass
class LayerSizes:
    """Root mean squares of one layer's attention: of the hidden states it receives, and of its values."""

    hidden: float = math.nan
    value: float = math.nan


def measure_sizes(
    base_model: PreTrainedModel, layers: tuple[int, ...], generator: torch.Generator
) -> dict[int, LayerSizes]:
    """Run the base model over a few random tokens and measure what the attention of some layers works on.

    Raises:
        UnsupportedModelError: it has no weights, lacks a layer, or what it computes is not finite.
    """
    modules = _attention_modules(base_model, layers)
    embeddings: Any = base_model.get_input_embeddings().weight
    if embeddings.is_meta:
        raise UnsupportedModelError(
            "the base model's weights are not loaded", where=type(base_model).__name__, help="load it with its weights"
        )
    ids = torch.randint(embeddings.shape[0], (1, NUM_SAMPLE_TOKENS), generator=generator).to(embeddings.device)
    sizes = {layer: LayerSizes() for layer in layers}
    training = [module for module in base_model.modules() if module.training]
    configs: dict[int, Any] = {layer: module.config for layer, module in modules.items()}
    hooks = []
    try:
        base_model.eval()
        for layer, module in modules.items():
            # Attention modules look the attention function up by the name in their config, which layers share.
            measuring = copy.copy(configs[layer])
            measuring._attn_implementation_internal = _MEASURED_ATTENTION
            module.config = measuring
            hooks.append(module.register_forward_pre_hook(_Measure(sizes[layer]), with_kwargs=True))
        with torch.no_grad():
            base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, module in modules.items():
            module.config = configs[layer]
        for module in training:
            module.training = True
    wrong = [layer for layer, size in sizes.items() if not math.isfinite(size.hidden + size.value)]
    if wrong:
        raise UnsupportedModelError(
            f"what the attention of layer {wrong[0]} computes is not finite",
            where=type(base_model).__name__,
            help="check the base model's weights, or load it in a wider dtype",
        )
    return sizes


@dataclass
class _Measure:
    """Forward pre-hook of an attention module: notes the hidden states, and asks for a note on the values."""

    sizes: LayerSizes

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_BTX = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.sizes.hidden = _root_mean_square(hidden_BTX)
        return args, {**kwargs, "measured_sizes": self.sizes}


def _measured_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    measured_sizes: LayerSizes,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    measured_sizes.value = _root_mean_square(value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()


def own_query_projections(base_model: PreTrainedModel, config: AdapterConfig) -> dict[int, torch.Tensor]:
    """The base model's own query projection of each KB layer: float32 [N*H, hidden] on the CPU, copies.

    Raises:
        UnsupportedModelError: it is quantised, or laid out in a way that is not known.
    """
    modules = _attention_modules(base_model, config.layers)
    return {layer: _own_query_projection(module, layer, config.base_shape) for layer, module in modules.items()}


def _own_query_projection(module: nn.Module, layer: int, shape: BaseShape) -> torch.Tensor:
    width = shape.num_heads * shape.head_dim
    where = f"layer {layer}, {type(module).__name__}"
    if hasattr(module, "q_proj"):
        rows, expected = torch.arange(width), width
        projection: Any = module.q_proj
    elif hasattr(module, STACKED.get(shape.model_type, "none")):
        rows, expected = torch.arange(width), 0
        projection = getattr(module, STACKED[shape.model_type])
    elif hasattr(module, INTERLEAVED.get(shape.model_type, "none")):
        projection = getattr(module, INTERLEAVED[shape.model_type])
        rows, expected = torch.arange(3 * width).view(shape.num_heads, 3, shape.head_dim)[:, 0].flatten(), 3 * width
    else:
        raise UnsupportedModelError(
            f"where a {shape.model_type} model keeps its query projection is not known",
            where=where,
            help='choose the kind "shared", which starts without it, or another base model',
        )
    # PEFT keeps the layer that it adapts in `base_layer`.
    projection = getattr(projection, "base_layer", projection)
    weight = getattr(projection, "weight", None)
    if isinstance(weight, torch.Tensor) and type(projection).__name__ == "Conv1D":
        weight = weight.T
    if (
        not isinstance(weight, torch.Tensor)
        or weight.shape[1:] != (shape.hidden_size,)
        or not weight.is_floating_point()
        or weight.element_size() < 2
    ):
        raise UnsupportedModelError(
            "the query projection is quantised, or no plain matrix",
            where=where,
            help='load the base model unquantised to start an adapter of kind "paper", or choose "shared"',
        )
    if weight.shape[0] < width or (expected and weight.shape[0] != expected):
        raise UnsupportedModelError(
            f"the query projection has {weight.shape[0]} rows instead of {expected or width}: it computes more than "
            "queries",
            where=where,
            help='choose the kind "shared", which starts without it, or another base model',
        )
    return weight.detach()[rows.to(weight.device)].float().cpu()


def _attention_modules(base_model: PreTrainedModel, layers: tuple[int, ...]) -> dict[int, nn.Module]:
    # Here, not above: attach.py imports the adapter, which imports this module.
    from transformers import AttentionInterface

    from kblam_ray.attention.attach import attention_modules

    AttentionInterface.register(_MEASURED_ATTENTION, _measured_attention)
    found = attention_modules(base_model)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise UnsupportedModelError(
            f"layer {missing[0]} has no attention that knowledge can be merged with",
            where=type(base_model).__name__,
            help=f"choose KB layers among {sorted(found)}",
        )
    return {layer: found[layer] for layer in layers}


def device_of(base_model: PreTrainedModel) -> torch.device:
    """Where a base model's hidden states start."""
    embeddings: Any = base_model.get_input_embeddings()
    return embeddings.weight.device
