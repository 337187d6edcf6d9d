"""The tensors of a new adapter, scaled by what its base model does, so that training starts well.

Shape legend: L KB layers, S slots of the key vector, N query heads, H head dim, P encoder dim.

The base model runs once over a few random tokens; per KB layer that gives the size of the hidden states that its
attention receives and of its own values. From these:

- value projection, both kinds: the values of a fact are as large as the base model's own in that layer, so that
  neither side drowns the other in the sum; bias 0. Base embeddings are taken to have length 1, as sentence encoders
  give them.
- kind "paper" (KBLaM, arXiv 2410.10450, section 5): each query head is a copy of the layer's own query projection. The
  key projection is random with variance 1/P; its size is invisible behind the LayerNorm, which gives every number of a
  key variance 1, and with it a KB logit the spread of a number of the query. Its bias is 0: a random one would be
  a part that all keys share.
- kind "shared": query heads small enough that the scores of the facts differ by 0.1, so that every fact starts with
  about the same share and gets gradient; gates as small, around a bias at which a head gives text and facts half of
  its attention each: the measured log-sum-exp of its text logits, less that of the facts. Without that measurement the
  biases are 0.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kblam_ray.attention.config import AdapterConfig, BaseShape, EncoderRef
from kblam_ray.errors import AdapterError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KB_LAYER_FREQUENCY = 3
SPREAD = 0.1
NUM_FACTS = 100
"""Facts that a KB is taken to have where nothing says how many, and no `kb_scale` makes it irrelevant."""
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


def settings_for(
    base_model: PreTrainedModel,
    kind: str,
    encoder: EncoderRef | None,
    dim: int | None,
    kb_layer_frequency: int | None,
    kb_layers: list[int] | None,
    sample_keys_MP: torch.Tensor | None,
    settings: dict[str, Any],
) -> AdapterConfig:
    """The settings of a new adapter; see `KnowledgeAdapter.for_model`.

    Raises:
        AdapterError: settings that do not go together, or P is not given.
        UnsupportedModelError: the base model has no single width or number of heads.
    """
    if kb_layer_frequency is None and kb_layers is None:
        kb_layer_frequency = KB_LAYER_FREQUENCY
    if dim is None and encoder is not None:
        dim = encoder.dim
    if dim is None and sample_keys_MP is not None:
        dim = sample_keys_MP.shape[-1]
    if dim is None:
        raise AdapterError("the encoder is not known", where="for_model", help="give `encoder`, or its P as `dim`")
    shape = BaseShape.of(base_model.config)
    num_layers = len(range(0, shape.num_layers, kb_layer_frequency)) if kb_layer_frequency else len(kb_layers or ())
    given = {
        "slots": num_layers,
        "base_model": getattr(base_model.config, "_name_or_path", "") or None,
        **settings,
        "kind": kind,
        "base_shape": shape,
        "encoder": None if encoder is None else EncoderRef.of(encoder),
        "dim": dim,
        "kb_layer_frequency": kb_layer_frequency,
        "kb_layers": kb_layers,
    }
    return AdapterConfig.checked(given, where="for_model")


def starting_tensors(
    base_model: PreTrainedModel,
    config: AdapterConfig,
    text_log_sum_exp_LN: torch.Tensor | None,
    sample_keys_MP: torch.Tensor | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The tensors of a new adapter in float32 on the CPU; the module's docstring says how they are chosen.

    Args:
        text_log_sum_exp_LN: [L, N] mean log-sum-exp of the text logits per KB layer and head, or None.
        sample_keys_MP: base embeddings of some key texts, kind "shared", or None.
        seed: the same seed gives the same tensors.

    Raises:
        AdapterError: the measured values or the sample have another shape, or are not finite.
        UnsupportedModelError: the base model's weights are not loaded, its query projection is quantised or laid
            out in a way that is not known, or its hidden states are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = measure_sizes(base_model, config.layers, generator)
    draw = _Normal(generator)
    width = config.heads_width
    value_SXP = torch.zeros(config.slots, width, config.dim)
    for layer in config.layers:
        value_SXP[config.slot_of(layer)] = draw((width, config.dim), sizes[layer].value)
    tensors = {
        "value_projection.weight": value_SXP.flatten(0, 1),
        "value_projection.bias": torch.zeros(config.slots * width),
    }
    if config.kind == "paper":
        tensors["key_projection.weight"] = draw((config.slots * width, config.dim), config.dim**-0.5)
        tensors["key_projection.bias"] = torch.zeros(config.slots * width)
        for layer, weight in own_query_projections(base_model, config).items():
            tensors[f"query_heads.{layer}.weight"] = weight
        return tensors
    return tensors | _shared_tensors(config, sizes, draw, text_log_sum_exp_LN, sample_keys_MP)


def _shared_tensors(
    config: AdapterConfig,
    sizes: dict[int, LayerSizes],
    draw: _Normal,
    text_log_sum_exp_LN: torch.Tensor | None,
    sample_keys_MP: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    hidden, heads = config.base_shape.hidden_size, config.base_shape.num_heads
    mean_P, scale, key_length = torch.zeros(config.dim), torch.ones(1), 1.0
    if sample_keys_MP is not None:
        _check("sample_keys_MP", sample_keys_MP, (None, config.dim))
        mean_P = sample_keys_MP.float().mean(0).cpu()
        spread = (sample_keys_MP.float().cpu() - mean_P).square().mean().sqrt()
        # One embedding, or the same one many times, has no spread.
        scale = spread.view(1) if spread > 0 else scale
        key_length = config.dim**0.5
    gate_bias_LN = torch.zeros(len(config.layers), heads)
    if text_log_sum_exp_LN is not None:
        _check("text_log_sum_exp_LN", text_log_sum_exp_LN, (len(config.layers), heads))
        gate_bias_LN = text_log_sum_exp_LN.float().cpu() - _expected_log_sum_exp(config)
    tensors = {"key_mean": mean_P, "key_scale": scale}
    for slot, layer in enumerate(config.layers):
        hidden_length = max(sizes[layer].hidden, 1e-6) * hidden**0.5
        tensors[f"query_heads.{layer}.weight"] = draw((config.dim, hidden), SPREAD / (hidden_length * key_length))
        tensors[f"query_heads.{layer}.bias"] = torch.zeros(config.dim)
        tensors[f"gates.{layer}.weight"] = draw((heads, hidden), SPREAD / hidden_length)
        tensors[f"gates.{layer}.bias"] = gate_bias_LN[slot].clone()
    return tensors


def _expected_log_sum_exp(config: AdapterConfig) -> float:
    """Of a KB's logits at the start: log sum_m exp(s_m), s_m normal around 0, with the shift log C - log M."""
    mean_of_exp = SPREAD**2 / 2
    if config.kb_scale is not None:
        return mean_of_exp + math.log(config.kb_scale)
    fewest, most = config.training_kb_range or (NUM_FACTS, NUM_FACTS)
    return mean_of_exp + (math.log(max(fewest, 1)) + math.log(max(most, 1))) / 2


def measure_sizes(
    base_model: PreTrainedModel, layers: tuple[int, ...], generator: torch.Generator
) -> dict[int, LayerSizes]:
    """Run the base model over a few random tokens and measure what the attention of some layers works on.

    Raises:
        UnsupportedModelError: it has no weights, lacks a layer, or what it computes is not finite.
    """
    modules = _attention_modules(base_model, layers)
    embeddings = base_model.get_input_embeddings().weight
    if embeddings.is_meta:
        raise UnsupportedModelError(
            "the base model's weights are not loaded", where=type(base_model).__name__, help="load it with its weights"
        )
    ids = torch.randint(embeddings.shape[0], (1, NUM_SAMPLE_TOKENS), generator=generator).to(embeddings.device)
    sizes = {layer: LayerSizes() for layer in layers}
    training = [module for module in base_model.modules() if module.training]
    configs = {layer: module.config for layer, module in modules.items()}
    hooks = []
    try:
        base_model.eval()
        for layer, module in modules.items():
            # Attention modules look the attention function up by the name in their config, which layers share.
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = _MEASURED_ATTENTION
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
        projection, rows = module.q_proj, torch.arange(width)
        expected = width
    elif hasattr(module, STACKED.get(shape.model_type, "none")):
        projection, rows = getattr(module, STACKED[shape.model_type]), torch.arange(width)
        expected = None
    elif hasattr(module, INTERLEAVED.get(shape.model_type, "none")):
        projection = getattr(module, INTERLEAVED[shape.model_type])
        rows = torch.arange(3 * width).view(shape.num_heads, 3, shape.head_dim)[:, 0].flatten()
        expected = 3 * width
    else:
        raise UnsupportedModelError(
            f"where a {shape.model_type} model keeps its query projection is not known",
            where=where,
            help='choose the kind "shared", which starts without it, or another base model',
        )
    # PEFT keeps the layer that it adapts in `base_layer`.
    projection = getattr(projection, "base_layer", projection)
    weight = getattr(projection, "weight", None)
    if type(projection).__name__ == "Conv1D" and weight is not None:
        weight = weight.T
    sizes_fit = weight is not None and weight.dim() == 2 and weight.shape[1] == shape.hidden_size
    if not sizes_fit or not weight.is_floating_point() or weight.element_size() < 2:
        raise UnsupportedModelError(
            "the query projection is quantised, or no plain matrix",
            where=where,
            help='load the base model unquantised to start an adapter of kind "paper", or choose "shared"',
        )
    if weight.shape[0] < width or (expected is not None and weight.shape[0] != expected):
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
    return base_model.get_input_embeddings().weight.device


class _Normal:
    """Draws float32 tensors from a normal distribution around 0."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, size: tuple[int, ...], spread: float) -> torch.Tensor:
        return torch.randn(size, generator=self._generator) * spread


def _check(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.numel() == 0 or not torch.isfinite(tensor).all():
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise AdapterError(
            f"{name} must be {wanted} finite numbers; it has the shape {list(tensor.shape)}",
            where="for_model",
            help="one row per KB layer, ascending" if name.startswith("text") else "give base embeddings of key texts",
        )
