"""What a base model's own attention works on: the size of its states and values, its log-sum-exps, its queries.

Shape legend: B batch, T prompt tokens, N query heads, K key/value heads, H head dim, X hidden size.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.errors import AdapterError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_SAMPLE_TOKENS = 32

STACKED = {"phi3": "qkv_proj", "phi4_multimodal": "qkv_proj", "gpt2": "c_attn"}
"""Families whose one projection gives the queries of all heads, then the keys, then the values."""
INTERLEAVED = {"gpt_neox": "query_key_value", "persimmon": "query_key_value"}
"""Families whose one projection gives query, key and value of the first head, then of the second, and so on."""

_WATCHED_ATTENTION = "kblam_ray_watched"


@dataclass
class LayerProbe:
    """What one layer's attention worked on: root mean squares, and the normaliser of its softmax.

    Attributes:
        hidden: of the hidden states that the attention module received.
        value: of its values.
        text_log_sum_exp_N: per query head the mean log-sum-exp of the logits, float32 [N] on the CPU.
    """

    hidden: float
    value: float
    text_log_sum_exp_N: torch.Tensor


def probe(
    base_model: PreTrainedModel,
    layers: tuple[int, ...],
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor | None = None,
) -> dict[int, LayerProbe]:
    """Run the base model once and measure what the attention of some layers works on, over all tokens but padding.

    Args:
        input_ids_BT: token ids, as typical as can be of what the model will be asked.
        attention_mask_BT: 1 for tokens, 0 for padding; None: no padding.

    Raises:
        AdapterError: there are no tokens, or other things than the base model's.
        UnsupportedModelError: it has no weights, lacks a layer, its attention is of a kind that knowledge cannot be
            merged with, or what it computes is not finite.
    """
    modules = _attention_modules(base_model, layers)
    device = device_of(base_model)
    if device.type == "meta":
        raise UnsupportedModelError(
            "the base model's weights are not loaded", where=type(base_model).__name__, help="load it with its weights"
        )
    _check_tokens(input_ids_BT, _vocabulary(base_model))
    is_real_BT = torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT
    watches = {layer: _Watch(is_real_BT.bool()) for layer in layers}
    training = [module for module in base_model.modules() if module.training]
    configs: dict[int, Any] = {layer: module.config for layer, module in modules.items()}
    hooks = []
    try:
        base_model.eval()
        for layer, module in modules.items():
            # Attention modules look the attention function up by the name in their config, which layers share.
            watched = copy.copy(configs[layer])
            watched._attn_implementation_internal = _WATCHED_ATTENTION
            module.config = watched
            hooks.append(module.register_forward_pre_hook(watches[layer].before, with_kwargs=True))
        with torch.no_grad():
            mask = None if attention_mask_BT is None else attention_mask_BT.to(device)
            base_model(input_ids=input_ids_BT.to(device), attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, module in modules.items():
            module.config = configs[layer]
        for module in training:
            module.training = True
    return {layer: watch.probed(layer, type(base_model).__name__) for layer, watch in watches.items()}


def random_tokens(base_model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """Some token ids of a base model's vocabulary, [1, T], for want of text."""
    return torch.randint(_vocabulary(base_model), (1, NUM_SAMPLE_TOKENS), generator=generator)


def _vocabulary(base_model: PreTrainedModel) -> int:
    embeddings: Any = base_model.get_input_embeddings()
    return embeddings.weight.shape[0]


def _check_tokens(ids_BT: torch.Tensor, vocabulary: int) -> None:
    is_batch = isinstance(ids_BT, torch.Tensor) and ids_BT.dim() == 2 and ids_BT.numel() > 0
    if not is_batch or ids_BT.dtype not in (torch.int64, torch.int32) or ids_BT.min() < 0 or ids_BT.max() >= vocabulary:
        raise AdapterError(
            f"the sample must be a tensor of rows of token ids below {vocabulary}",
            where="sample_ids_BT",
            help="give the input_ids of one tokenised text, or of several of one length",
        )


class _Watch:
    """Watches one attention module through one forward pass."""

    def __init__(self, is_real_BT: torch.Tensor) -> None:
        self._is_real_BT = is_real_BT
        self._hidden = self._value = math.nan
        self._text_log_sum_exp_N = torch.tensor([math.nan])

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: notes the hidden states, and asks to be told of queries, keys and values."""
        hidden_BTX = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._hidden = _root_mean_square(hidden_BTX[self._is_real_BT.to(hidden_BTX.device)])
        return args, {**kwargs, "kblam_ray_watch": self}

    def attention(
        self,
        query_BNTH: torch.Tensor,
        key_BKTH: torch.Tensor,
        value_BKTH: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        # Here, not above: text.py imports the adapter, which imports this module.
        from kblam_ray.attention.text import text_log_sum_exp

        is_real_BT = self._is_real_BT.to(query_BNTH.device)
        self._value = _root_mean_square(value_BKTH.transpose(1, 2)[is_real_BT])
        lse_BNT = text_log_sum_exp(query_BNTH, key_BKTH, mask, is_causal=mask is None, scale=scale)
        self._text_log_sum_exp_N = lse_BNT.transpose(1, 2)[is_real_BT].float().mean(0).cpu()

    def probed(self, layer: int, where: str) -> LayerProbe:
        found = LayerProbe(self._hidden, self._value, self._text_log_sum_exp_N)
        if not math.isfinite(found.hidden + found.value + found.text_log_sum_exp_N.sum().item()):
            raise UnsupportedModelError(
                f"what the attention of layer {layer} computes is not finite",
                where=where,
                help="check the base model's weights, or load it in a wider dtype",
            )
        return found


def _watched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kblam_ray_watch: _Watch,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kblam_ray_watch.attention(query, key, value, attention_mask, kwargs.get("scaling"))
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
    # Some libraries quantise into a subclass of tensors that claims to hold floats.
    is_plain = type(weight) in (torch.Tensor, nn.Parameter)
    if isinstance(weight, torch.Tensor) and type(projection).__name__ == "Conv1D":
        weight = weight.T
    if (
        not is_plain
        or not isinstance(weight, torch.Tensor)
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

    from kblam_ray.attention.decoder import attention_modules, refuse_unsupported

    AttentionInterface.register(_WATCHED_ATTENTION, _watched_attention)
    found = attention_modules(base_model)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise UnsupportedModelError(
            f"layer {missing[0]} has no attention that knowledge can be merged with",
            where=type(base_model).__name__,
            help=f"choose KB layers among {sorted(found)}",
        )
    refuse_unsupported(base_model, [found[layer] for layer in layers])
    return {layer: found[layer] for layer in layers}


def device_of(base_model: PreTrainedModel) -> torch.device:
    """Where a base model's hidden states start."""
    embeddings: Any = base_model.get_input_embeddings()
    return embeddings.weight.device
