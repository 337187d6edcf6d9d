"""Read the checkpoints of the published KBLaM and AtlasKV training code as adapters of kind "paper".

Both save two things: the knowledge encoder's state (`encoder.pt`) and the whole language model in transformers'
format, query heads among its tensors. Read are, after the prefixes that wrappers add (`module.`, `_orig_mod.`,
`encoder.`):

| here                             | microsoft/KBLaM                       | HKUST-KnowComp/AtlasKV, where different |
|----------------------------------|---------------------------------------|-----------------------------------------|
| `key_projection.{weight,bias}`   | `projector_k.{weight,bias}`           | `key_projector.{weight,bias}`           |
| `value_projection.{weight,bias}` | `projector_v.{weight,bias}`           | `value_projector.{weight,bias}`         |
| `query_heads.{i}.weight`         | `model.layers.{i}.self_attn.q_proj_new.weight` | `...self_attn.q_proj_kg.weight` |

Everything else is left alone: `embedding.*`, the sentence encoder's `base_model.*`, `score_shift`, the base model.
Both lay out keys as 1 + layers // frequency slots of N*H numbers: one more than there are KB layers where the frequency
divides the number of layers. The LayerNorm of the keys runs over all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kblam_ray.attention.adapter import checkpoint_files
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape, EncoderRef
from kblam_ray.attention.adapter.loading import check_tensors
from kblam_ray.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

State = Mapping[str, torch.Tensor] | str | Path

PROJECTIONS = {
    "key_projection": ("projector_k", "key_projector"),
    "value_projection": ("projector_v", "value_projector"),
}
QUERY_HEADS = ("q_proj_new", "q_proj_kg")
ENCODER_FILES = ("encoder.safetensors", "encoder.pt")
CONFIG_FILES = ("kb_config_explicit.json", "kb_config.json")

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|encoder)\.)+")
_QUERY_HEAD = re.compile(rf"model\.layers\.(\d+)\.self_attn\.({'|'.join(QUERY_HEADS)})\.(weight|bias)")


def read_checkpoint(
    encoder_state: State,
    model_state: State,
    base_config: PretrainedConfig,
    kb_layer_frequency: int,
    kb_scale: float | None,
    encoder: EncoderRef | None,
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Settings and tensors of the adapter in a checkpoint; see `KnowledgeAdapter.from_kblam`.

    Raises:
        AdapterError: the projectors are MLPs, a tensor is missing or has another shape, there is another number of
            slots, the checkpoint was trained without query heads of its own, or files that cannot be read safely.
    """
    kb_scale = _agreed_scale(model_state, kb_layer_frequency, kb_scale)
    shape = BaseShape.of(base_config)
    projections = _read_projections(encoder_state)
    dim = projections["key_projection.weight"].shape[1]
    slots = _count_slots(projections["key_projection.weight"], shape, kb_layer_frequency)
    config = AdapterConfig.checked(
        {
            "kind": "paper",
            "base_model": getattr(base_config, "_name_or_path", "") or None,
            "base_shape": shape,
            "encoder": None if encoder is None else EncoderRef.of(encoder),
            "dim": dim,
            "kb_layer_frequency": kb_layer_frequency,
            "slots": slots,
            "kb_scale": kb_scale,
        },
        where="the checkpoint",
    )
    tensors = {**projections, **_read_query_heads(model_state, config.layers)}
    check_tensors(
        config, tensors, where="the checkpoint", help="give both states of one training run, and its base model"
    )
    # Query heads may be on the device of a whole model.
    device = tensors["value_projection.weight"].device
    return config, {name: tensor.to(device) for name, tensor in tensors.items()}


def _read_projections(state: State) -> dict[str, torch.Tensor]:
    entries = _without_wrappers(checkpoint_files.entries(state, preferred=ENCODER_FILES))
    tensors = {}
    for ours, theirs in PROJECTIONS.items():
        if any(re.fullmatch(rf"{name}\.\d+\.(weight|bias)", key) for name in theirs for key in entries):
            raise AdapterError(
                f"the checkpoint's {theirs[0]} is an MLP; keys and values must be linear in the base embeddings",
                where="encoder_state",
                help='train with the projector type "linear"',
            )
        for part in ("weight", "bias"):
            found = [f"{name}.{part}" for name in theirs if f"{name}.{part}" in entries]
            if len(found) != 1:
                problem = f"both {' and '.join(found)}" if found else f"no {' or '.join(f'{n}.{part}' for n in theirs)}"
                raise AdapterError(
                    f"the checkpoint has {problem}",
                    where="encoder_state",
                    help="give the knowledge encoder's state of KBLaM or AtlasKV, which they save as encoder.pt",
                )
            tensors[f"{ours}.{part}"] = entries[found[0]]()
    for name, tensor in tensors.items():
        if tensor.dim() != (2 if name.endswith("weight") else 1):
            raise AdapterError(
                f"{name} has the shape {list(tensor.shape)}", where="encoder_state", help="give a linear projection"
            )
    return tensors


def _count_slots(key_weight: torch.Tensor, shape: BaseShape, frequency: int) -> int:
    if not isinstance(frequency, Integral) or frequency < 1:
        raise AdapterError(
            f"a KB layer frequency below 1, or no whole number: {frequency!r}",
            where="kb_layer_frequency",
            help="the published one is 3",
        )
    width = shape.num_heads * shape.head_dim
    slots = 1 + shape.num_layers // frequency
    rows = key_weight.shape[0]
    if rows != slots * width:
        raise AdapterError(
            f"the key projection has {rows} rows, which is {rows / width:g} slots of {width}; a model of "
            f"{shape.num_layers} layers with a KB layer frequency of {frequency} has {slots}",
            where="encoder_state",
            help="give the kb_layer_frequency and the base model that the checkpoint was trained with",
        )
    return slots


def _read_query_heads(state: State, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    entries = _without_wrappers(checkpoint_files.entries(state, preferred=()))
    found: dict[int, dict[str, str]] = {}
    for name in entries:
        if match := _QUERY_HEAD.fullmatch(name):
            layer, kind, part = int(match[1]), match[2], match[3]
            found.setdefault(layer, {})[f"{kind}.{part}"] = name
    tensors = {}
    for layer in layers:
        heads = found.get(layer, {})
        weights = [name for key, name in heads.items() if key.endswith(".weight")]
        if len(weights) != 1:
            expected = f"model.layers.{layer}.self_attn.{QUERY_HEADS[0]}.weight"
            problem = f"both {' and '.join(weights)}" if weights else f"no query head for KB layer {layer} ({expected})"
            raise AdapterError(
                f"the checkpoint has {problem}",
                where="model_state",
                help="give the model's state, trained with a separate query head, and its kb_layer_frequency",
            )
        biases = [name for key, name in heads.items() if key.endswith(".bias")]
        if any(entries[name]().count_nonzero() for name in biases):
            raise AdapterError(
                f"the query head of KB layer {layer} has a bias", where="model_state", help="adapters have none there"
            )
        tensors[f"query_heads.{layer}.weight"] = entries[weights[0]]()
    return tensors


def _without_wrappers(entries: dict[str, Callable[[], torch.Tensor]]) -> dict[str, Callable[[], torch.Tensor]]:
    plain: dict[str, Callable[[], torch.Tensor]] = {}
    for name, read in entries.items():
        short = _WRAPPERS.sub("", name)
        plain[short] = partial(_ambiguous, short) if short in plain else read
    return plain


def _ambiguous(name: str) -> torch.Tensor:
    raise AdapterError(
        f"the checkpoint has {name} twice, under different prefixes",
        where="the checkpoint",
        help="give the state of one module",
    )


def _agreed_scale(model_state: State, frequency: int, kb_scale: float | None) -> float | None:
    """The scale to use, after comparing the arguments with the settings that a checkpoint's folder states."""
    settings, path = _stated_settings(model_state)
    stated = settings.get("kb_layer_frequency")
    if stated is not None and stated != frequency:
        raise AdapterError(
            f"the checkpoint was trained with a KB layer frequency of {stated}, not {frequency}",
            where=str(path),
            help=f"give kb_layer_frequency={stated}",
        )
    if settings.get("sep_query_head") is False:
        raise AdapterError(
            "the checkpoint was trained without a separate query head", where=str(path), help="train with one"
        )
    return settings.get("kb_scale_factor") if kb_scale is None else kb_scale


def _stated_settings(model_state: State) -> tuple[dict[str, Any], Path | None]:
    if isinstance(model_state, str | Path) and Path(model_state).is_dir():
        for path in (Path(model_state) / name for name in CONFIG_FILES):
            if path.is_file():
                return checkpoint_files.read_json(path), path
    return {}, None
