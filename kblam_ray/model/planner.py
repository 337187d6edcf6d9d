"""How much memory a base model, an adapter and a number of facts will take, told before anything is loaded.

Shape legend: M facts, L KB layers, S slots of the key vector, N query heads, H head dim, P encoder dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM, PretrainedConfig

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.attention.memory import choose_form
from kblam_ray.encoders.base import EncoderSpec
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.errors import InputError, UnsupportedModelError
from kblam_ray.model.base_model import read_base_config

ID_BYTES = 8
SCALE_BYTES = 4
TABLE_NUMBER_BYTES = 2
"""A table holds embeddings as float16."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Plan(BaseModel):
    """Sizes in bytes. `total_bytes` is what a device must hold before the first prompt."""

    model_config = ConfigDict(frozen=True)

    base_parameters: int = Field(description="numbers in the base model, tied ones once")
    base_model_bytes: int = Field(description="the base model's weights and buffers")
    adapter_bytes: int = Field(description="the adapter's tensors")
    form: Literal["latent", "materialized"] = Field(description="of the knowledge memory")
    num_facts: int = Field(description="M")
    latent_memory_bytes: int = Field(description="embeddings, ids and one number per fact of kind paper, no texts")
    materialized_memory_bytes: int = Field(description="the same with every KB layer's keys and values, no texts")
    text_bytes: int = Field(description="entity, property, value and metadata, on the CPU; 0 if not estimated")
    knowledge_memory_bytes: int = Field(description="of the form planned, with texts")
    kv_cache_bytes_per_token: int = Field(description="of the base model, per sequence; facts add nothing to it")
    table_embedding_bytes: int = Field(description="embeddings in the table on disk, before Parquet's compression")
    total_bytes: int = Field(description="base model, adapter and knowledge memory")


def plan(
    base_model: str | Path | PretrainedConfig,
    encoder: str | EncoderSpec | int | None,
    num_facts: int,
    *,
    form: str = "latent",
    kind: str = "shared",
    kb_layer_frequency: int | None = None,
    kb_layers: list[int] | None = None,
    adapter: AdapterConfig | None = None,
    dtype: str | torch.dtype | None = None,
    adapter_dtype: str | torch.dtype = torch.float32,
    text_bytes_per_fact: int = 0,
) -> Plan:
    """The bytes of everything, from configurations alone: no weights are read or downloaded.

    Args:
        base_model: name, folder or transformers configuration.
        encoder: its name, its spec or P; None takes P from `adapter`.
        num_facts: M.
        form: "latent", "materialized" or "auto".
        kind, kb_layer_frequency, kb_layers: of an adapter that does not exist yet; every third layer by default.
        adapter: settings of one that exists; goes before the three.
        dtype: of the base model; None is the one its configuration states, else float32.
        adapter_dtype: of the adapter's tensors; trained ones are float32.
        text_bytes_per_fact: kept in memory for citations; the texts' length and 16 bytes of offsets.

    Raises:
        InputError: a base model without a configuration, a wrong number of facts, an unknown form or dtype.
        AdapterMismatchError: `adapter` was made for another base model.
        UnsupportedModelError: the base model's layers have no single shape.
    """
    if num_facts < 0:
        raise InputError(f"{num_facts} facts", where="num_facts", help="give 0 or more")
    config = read_base_config(base_model)
    model_dtype = _dtype(dtype if dtype is not None else getattr(config, "dtype", None) or torch.float32)
    adapter = adapter or _new_adapter(config, _dim(encoder), kind, kb_layer_frequency, kb_layers)
    adapter.check_base(config)
    if encoder is not None and _dim(encoder) != adapter.dim:
        raise InputError(
            f"the encoder gives {_dim(encoder)} numbers, the adapter reads {adapter.dim}",
            where="encoder",
            help="plan with the adapter's encoder",
        )
    if form == "auto":
        form = choose_form(KnowledgeAdapter(adapter, device="meta"), num_facts)
    if form not in ("latent", "materialized"):
        raise InputError(f"there is no form {form!r} of a memory", help='"latent", "materialized" or "auto"')
    parameters, base_bytes = base_model_size(config, model_dtype)
    adapter_bytes = _dtype(adapter_dtype).itemsize * sum(map(math.prod, adapter.tensor_shapes().values()))
    memory_bytes = memory_size(adapter, num_facts, model_dtype)
    text_bytes = num_facts * text_bytes_per_fact
    knowledge_bytes = memory_bytes[form] + text_bytes
    return Plan(
        base_parameters=parameters,
        base_model_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        form=form,  # type: ignore[arg-type]
        num_facts=num_facts,
        latent_memory_bytes=memory_bytes["latent"],
        materialized_memory_bytes=memory_bytes["materialized"],
        text_bytes=text_bytes,
        knowledge_memory_bytes=knowledge_bytes,
        kv_cache_bytes_per_token=kv_cache_size(config, model_dtype),
        table_embedding_bytes=num_facts * 2 * adapter.dim * TABLE_NUMBER_BYTES,
        total_bytes=base_bytes + adapter_bytes + knowledge_bytes,
    )


def base_model_size(config: PretrainedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Parameters of a base model, tied ones once, and the bytes of its parameters and buffers in `dtype`."""
    with torch.device("meta"):
        # Built without memory: exact for every family, whatever its configuration leaves unsaid.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    return sum(tensor.numel() for tensor in parameters), sum(tensor.nbytes for tensor in tensors)


def memory_size(adapter: AdapterConfig, num_facts: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a knowledge memory without texts, by form, once it has answered a question.

    Embeddings take 16 bits a number: the table's float16 beside a float32 base model, else the model's dtype.
    """
    shape = adapter.base_shape
    is_paper = adapter.kind == "paper"
    per_fact = 2 * adapter.dim * 2 + ID_BYTES + (SCALE_BYTES if is_paper else 0)
    # Kind "shared" scores base embeddings: it has values to materialize and no keys.
    parts = 2 if is_paper else 1
    made = parts * len(adapter.layers) * shape.num_heads * shape.head_dim * dtype.itemsize
    return {"latent": num_facts * per_fact, "materialized": num_facts * (per_fact + made)}


def kv_cache_size(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that one token of one sequence takes in the base model's cache, in layers of full attention.

    Layers with a sliding window take no more than this, and nothing more once their window is full.

    Raises:
        UnsupportedModelError: the configuration does not state one number of key and value heads.
    """
    text: Any = config.get_text_config(decoder=True)
    shape = BaseShape.of(config)
    num_heads = getattr(text, "num_key_value_heads", None) or shape.num_heads
    if not isinstance(num_heads, int):
        raise UnsupportedModelError(
            f"the layers of a {text.model_type} model have different numbers of key and value heads",
            help="choose a base model whose layers are alike",
        )
    layers_with_cache = shape.num_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    return 2 * layers_with_cache * num_heads * shape.head_dim * dtype.itemsize


def _new_adapter(
    config: PretrainedConfig, dim: int | None, kind: str, frequency: int | None, layers: list[int] | None
) -> AdapterConfig:
    if dim is None:
        raise InputError("neither an encoder nor an adapter", where="encoder", help="give one of the two")
    shape = BaseShape.of(config)
    if frequency is None and layers is None:
        frequency = 3
    num_layers = len(layers) if layers is not None else len(range(0, shape.num_layers, frequency or 1))
    settings: Mapping[str, Any] = {
        "kind": kind,
        "base_shape": shape.model_dump(),
        "dim": dim,
        "kb_layer_frequency": frequency,
        "kb_layers": layers,
        "slots": num_layers,
    }
    return AdapterConfig.checked(dict(settings), where="plan")


def _dim(encoder: str | EncoderSpec | int | None) -> int | None:
    if encoder is None or isinstance(encoder, int):
        return encoder
    return (encoder_spec(encoder) if isinstance(encoder, str) else encoder).dim


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r} for models", where="dtype", help=f"one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
