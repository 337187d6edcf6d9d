"""The tensors of a new adapter, scaled by what its base model does, so that training starts well.

Shape legend: L KB layers, S slots of the key vector, N query heads, H head dim, P encoder dim.

The base model runs once over sample tokens, random ones for want of text; per KB layer that gives the size of the
hidden states that its attention receives, of its own values, and the log-sum-exp of its text logits. From these:

- value projection, both kinds: the values of a fact are as large as the base model's own in that layer, so that
  neither side drowns the other in the sum; bias 0. Base embeddings are taken to have length 1, as sentence encoders
  give them.
- kind "paper" (KBLaM, arXiv 2410.10450, section 5): each query head is a copy of the layer's own query projection. The
  key projection is random with variance 1/P; its size is invisible behind the LayerNorm, which gives every number of a
  key variance 1, and with it a KB logit the spread of a number of the query. Its bias is 0: a random one would be
  a part that all keys share.
- kind "shared": query heads small enough that the scores of the facts differ by 0.1, so that every fact starts with
  about the same share and gets gradient; gates as small, around a bias at which a head gives text and facts half of
  its attention each: the log-sum-exp of its text logits, which differs by tens between heads and models, less that of
  the facts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kblam_ray.attention.adapter.base_probe import LayerProbe, own_query_projections, probe, random_tokens
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape, EncoderRef
from kblam_ray.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KB_LAYER_FREQUENCY = 3
SPREAD = 0.1
NUM_FACTS = 100
"""Facts that a KB is taken to have where nothing says how many, and no `kb_scale` makes it irrelevant."""


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
        # At least one, so that what is said of a list without layers is that it is one.
        "slots": max(num_layers, 1),
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
    sample_ids_BT: torch.Tensor | None,
    text_log_sum_exp_LN: torch.Tensor | None,
    sample_keys_MP: torch.Tensor | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The tensors of a new adapter in float32 on the CPU; the module's docstring says how they are chosen.

    Args:
        sample_ids_BT: token ids to run the base model over, without padding; None: random ones.
        text_log_sum_exp_LN: [L, N] mean log-sum-exp of the text logits per KB layer and head, instead of that over
            the sample.
        sample_keys_MP: base embeddings of some key texts, kind "shared", or None.
        seed: the same seed gives the same tensors.

    Raises:
        AdapterError: the measured values or the sample have another shape, or are not finite.
        UnsupportedModelError: the base model's weights are not loaded, its query projection is quantised or laid
            out in a way that is not known, or its hidden states are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    if sample_ids_BT is None:
        sample_ids_BT = random_tokens(base_model, generator)
    probes = probe(base_model, config.layers, sample_ids_BT)
    draw = _Normal(generator)
    width = config.heads_width
    value_SXP = torch.zeros(config.slots, width, config.dim)
    for layer in config.layers:
        value_SXP[config.slot_of(layer)] = draw((width, config.dim), probes[layer].value)
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
    return tensors | _shared_tensors(config, probes, draw, text_log_sum_exp_LN, sample_keys_MP)


def _shared_tensors(
    config: AdapterConfig,
    probes: dict[int, LayerProbe],
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
    if text_log_sum_exp_LN is None:
        text_log_sum_exp_LN = torch.stack([probes[layer].text_log_sum_exp_N for layer in config.layers])
    _check("text_log_sum_exp_LN", text_log_sum_exp_LN, (len(config.layers), heads))
    gate_bias_LN = text_log_sum_exp_LN.float().cpu() - _expected_log_sum_exp(config)
    tensors = {"key_mean": mean_P, "key_scale": scale}
    for slot, layer in enumerate(config.layers):
        hidden_length = max(probes[layer].hidden, 1e-6) * hidden**0.5
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
