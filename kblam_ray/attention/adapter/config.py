"""What an adapter is: its kind, the base model and encoder it was made for, its KB layers and its settings.

Written as `adapter_config.json` beside the tensors. Shape legend: L KB layers, S slots of the key vector (S >= L),
N query heads, H head dim, P encoder dim.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kblam_ray.errors import AdapterError, AdapterMismatchError, UnsupportedModelError

FORMAT_VERSION: Final = 1
CONFIG_FILE = "adapter_config.json"
PAPER_REFUSAL = "I am sorry I cannot find relevant information in the KB."

STRUCTURE = ("format_version", "kind", "base_shape", "encoder", "dim", "kb_layer_frequency", "kb_layers", "slots")
"""Settings that the tensors' shapes and meaning rest on; the others can be changed on a finished adapter."""


class BaseShape(BaseModel):
    """The sizes of a base model that an adapter's tensors depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str = Field(description="architecture of the decoder, as transformers names it")
    hidden_size: int = Field(gt=0, description="numbers in one hidden state")
    num_layers: int = Field(gt=0, description="decoder layers")
    num_heads: int = Field(gt=0, description="N, query heads per layer")
    head_dim: int = Field(gt=0, description="H, numbers per head")

    @classmethod
    def of(cls, hf_config: Any) -> BaseShape:
        """The shape of a transformers configuration; of the text decoder where a model has several parts.

        Raises:
            UnsupportedModelError: the configuration lacks a size, has one per layer, or its heads' values have
                another width than their keys.
        """
        if not hasattr(hf_config, "get_text_config"):
            raise UnsupportedModelError(
                f"a {type(hf_config).__name__} is not a transformers configuration", help="give the base model's config"
            )
        text = hf_config.get_text_config(decoder=True)
        sizes: dict[str, Any] = {
            "hidden_size": _of_all_layers(text, "hidden_size"),
            "num_layers": _of_all_layers(text, "num_hidden_layers"),
            "num_heads": _of_all_layers(text, "num_attention_heads"),
        }
        wrong = [name for name, size in sizes.items() if type(size) is not int or size < 1]
        if wrong:
            raise UnsupportedModelError(
                f"the configuration of a {text.model_type} model has no single {', '.join(wrong)}",
                help="give a decoder whose layers all have one width and one number of heads",
            )
        head_dim = _of_all_layers(text, "head_dim") or sizes["hidden_size"] // sizes["num_heads"]
        value_dim = _of_all_layers(text, "v_head_dim") or head_dim
        if value_dim != head_dim:
            raise UnsupportedModelError(
                f"the heads of a {text.model_type} model have keys of {head_dim} numbers and values of {value_dim}",
                help="give a base model whose keys and values have the same head dimension",
            )
        return cls(model_type=text.model_type, head_dim=head_dim, **sizes)


class EncoderRef(BaseModel):
    """The sentence encoder whose base embeddings an adapter reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="the encoder's name")
    revision: str = Field(description="hash over its weights, tokenizer and pooling")
    dim: int = Field(gt=0, description="P, the numbers in one embedding")

    @classmethod
    def of(cls, encoder: Any) -> EncoderRef:
        """The reference to anything with `name`, `revision` and `dim`, such as a knowledge base's encoder.

        Raises:
            AdapterError: it lacks one of them, or they are of another type.
        """
        try:
            return cls(name=encoder.name, revision=encoder.revision, dim=encoder.dim)
        except (AttributeError, ValidationError):
            raise AdapterError(
                f"a {type(encoder).__name__} does not say which encoder it is",
                where="encoder",
                help="give an EncoderRef with its name, revision and dim, or a knowledge base's encoder",
            ) from None


class AdapterConfig(BaseModel):
    """Everything about an adapter but its tensors. Immutable: `changed` gives an altered copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = Field(FORMAT_VERSION, description="of this file")
    kind: Literal["paper", "shared"] = Field(
        description="paper: every head scores facts with keys of its own; shared: one score for a layer's heads"
    )
    base_model: str | None = Field(None, description="name or path of the base model")
    base_shape: BaseShape = Field(description="sizes of the base model")
    encoder: EncoderRef | None = Field(None, description="the sentence encoder, where it is known")
    dim: int = Field(gt=0, description="P, the numbers in one base embedding")
    kb_layer_frequency: int | None = Field(None, gt=0, description="layer i is a KB layer iff i % this == 0")
    kb_layers: list[int] | None = Field(None, description="the KB layers one by one, ascending")
    slots: int = Field(gt=0, description="S, slots of the key vector; at least as many as there are KB layers")
    kb_scale: float | None = Field(
        None, gt=0, description="C: log C - log M is added to the KB logits; unset: no shift at all"
    )
    retrieval_layers: list[int] = Field(
        default_factory=lambda given: list(_kb_layers(given)),
        min_length=1,
        description="KB layers whose attention tells the facts used (default: all of them)",
    )
    question_prior: float = Field(0.0, description="beta: weight of the cosine of question and fact in the KB logits")
    prior_context: Literal["last", "last_two"] = Field(
        "last", description="the question that the prior reads: the last user message, or the last two"
    )
    prior_lexical: float = Field(
        0.0, description="gamma: added to a fact's KB logit where the question names its entity"
    )
    selection_log_m: Literal["whole", "selection"] = Field(
        "whole", description="the M of the shift when only a part of the facts is selected"
    )
    refusal_weights: dict[str, float] | None = Field(
        None,
        description="logistic weights of the best facts' features, by name, and `bias`: their probability is the"
        " refusal statistic (unset: it is the largest retrieval score)",
    )
    refusal_threshold: float | None = Field(None, description="below it the best facts' statistic means: refuse")
    refusal_text: str = Field(PAPER_REFUSAL, min_length=1, description="the answer when no fact applies")
    chat_template: str | None = Field(None, description="Jinja chat template trained with; unset: the tokenizer's")
    training_kb_range: tuple[int, int] | None = Field(None, description="fewest and most facts seen in training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kb_layer_frequency is None) == (self.kb_layers is None):
            raise ValueError("give kb_layer_frequency or kb_layers, one of the two")
        layers, num_layers = self.layers, self.base_shape.num_layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
            raise ValueError(f"KB layers {list(layers)} are not ascending layers of a model with {num_layers}")
        if self.slots < len(layers) or (self.kind == "shared" and self.slots != len(layers)):
            least = "exactly" if self.kind == "shared" else "at least"
            raise ValueError(f"{self.slots} slots for {len(layers)} KB layers: there must be {least} that many")
        strangers = sorted(set(self.retrieval_layers) - set(layers))
        if strangers:
            raise ValueError(f"retrieval layers {strangers} are not KB layers; those are {list(layers)}")
        if len(set(self.retrieval_layers)) != len(self.retrieval_layers):
            raise ValueError(f"retrieval layers {self.retrieval_layers} name one more than once")
        if self.encoder is not None and self.encoder.dim != self.dim:
            raise ValueError(f"dim is {self.dim} but the encoder gives {self.encoder.dim} numbers")
        if self.refusal_weights is not None and "bias" not in self.refusal_weights:
            raise ValueError("refusal_weights have no bias")
        least_facts, most_facts = self.training_kb_range or (0, 0)
        if not 0 <= least_facts <= most_facts:
            raise ValueError(f"training_kb_range {least_facts} to {most_facts} is not a range of facts")
        return self

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The KB layers, ascending."""
        return _kb_layers(self.__dict__)

    @cached_property
    def _slots_by_layer(self) -> dict[int, int]:
        return {layer: slot for slot, layer in enumerate(self.layers)}

    def slot_of(self, layer: int) -> int:
        """The slot of the key vector that a KB layer reads. Raises KeyError for a layer that is none."""
        return self._slots_by_layer[layer]

    @property
    def heads_width(self) -> int:
        """N * H: the numbers of all heads of one layer."""
        return self.base_shape.num_heads * self.base_shape.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the adapter's file."""
        hidden, width, dim = self.base_shape.hidden_size, self.heads_width, self.dim
        value_rows = self.slots * width
        shapes: dict[str, tuple[int, ...]] = {
            "value_projection.weight": (value_rows, dim),
            "value_projection.bias": (value_rows,),
        }
        if self.kind == "paper":
            shapes |= {"key_projection.weight": (value_rows, dim), "key_projection.bias": (value_rows,)}
            return shapes | {f"query_heads.{layer}.weight": (width, hidden) for layer in self.layers}
        shapes |= {"key_mean": (dim,), "key_scale": (1,)}
        for layer in self.layers:
            shapes |= {f"query_heads.{layer}.weight": (dim, hidden), f"query_heads.{layer}.bias": (dim,)}
            heads = self.base_shape.num_heads
            shapes |= {f"gates.{layer}.weight": (heads, hidden), f"gates.{layer}.bias": (heads,)}
        return shapes

    def changed(self, **settings: Any) -> AdapterConfig:
        """A copy with other settings, checked like a new one.

        Raises:
            AdapterError: an unknown setting or a value it cannot have.
        """
        return AdapterConfig.checked({**self.model_dump(), **settings}, where=", ".join(settings))

    @classmethod
    def checked(cls, given: dict[str, Any], *, where: str) -> AdapterConfig:
        """Validate settings.

        Raises:
            AdapterError: what is wrong with them, with `where` they come from.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise AdapterError(
                f"not settings that an adapter can have: {_first(error)}", where=where, help="correct the setting"
            ) from None

    def check_base(self, hf_config: Any) -> None:
        """Make sure that a base model has the shape this adapter was made for.

        Raises:
            AdapterMismatchError: it has another; names what differs.
            UnsupportedModelError: its configuration has no such sizes.
        """
        found, wanted = BaseShape.of(hf_config).model_dump(), self.base_shape.model_dump()
        differing = [
            f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if found[name] != wanted[name]
        ]
        if differing:
            raise AdapterMismatchError(
                f"the base model does not fit the adapter: it has {', '.join(differing)}",
                where=getattr(hf_config, "_name_or_path", "") or None,
                help=f"use the base model that it was made for{f', {self.base_model}' if self.base_model else ''}",
            )

    @classmethod
    def read(cls, path: str | Path) -> AdapterConfig:
        """Read `adapter_config.json`, given its path or its folder's.

        Raises:
            AdapterError: no such file, not JSON, a newer format, unknown settings, or wrong types.
        """
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        try:
            text = path.read_bytes().decode("utf-8")
            given = json.loads(text)
        except OSError as error:
            raise AdapterError(
                f"cannot read the adapter's configuration: {error.strerror}",
                where=str(path),
                help=f"an adapter's folder has {CONFIG_FILE} in it: check the path",
            ) from None
        except (ValueError, RecursionError) as error:
            raise AdapterError(
                f"the adapter's configuration is not JSON: {error}", where=str(path), help="get the file again"
            ) from None
        version = given.get("format_version") if isinstance(given, dict) else None
        if type(version) is not int or version < 1:
            raise AdapterError(
                "the file is not the configuration of a knowledge adapter: it states no format_version",
                where=str(path),
                help="give the folder of an adapter written by kblam-ray; other tools use the same file name",
            )
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"the adapter has format {version}; this version of kblam-ray reads up to {FORMAT_VERSION}",
                where=str(path),
                help="upgrade kblam-ray",
            )
        try:
            # As strict as the file's types are: "3" is no number of slots.
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise AdapterError(
                f"the adapter's configuration is wrong: {_first(error)}", where=str(path), help="correct the file"
            ) from None

    def write(self, path: str | Path) -> None:
        """Write `adapter_config.json`, given its path or its folder's."""
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _of_all_layers(hf_config: Any, name: str) -> Any:
    try:
        return getattr(hf_config, name, None)
    except RuntimeError:  # how the library says that it is a setting of each layer
        raise UnsupportedModelError(
            f"the layers of a {hf_config.model_type} model have each a {name} of their own",
            help="give a decoder whose layers all have one width, one number of heads and one head dimension",
        ) from None


def _kb_layers(settings: dict[str, Any]) -> tuple[int, ...]:
    layers, frequency, shape = (settings.get(name) for name in ("kb_layers", "kb_layer_frequency", "base_shape"))
    if layers is None and frequency is not None and shape is not None:
        layers = range(0, shape.num_layers, frequency)
    return tuple(layers or ())


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
