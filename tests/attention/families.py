"""Tiny random models of many families, random adapters of both kinds, and their attention as a plain formula.

`PlainModel` is what every optimised path is compared with: the library's model with one attention function of our own,
which makes all keys, concatenates [facts | text] and takes one softmax, in float64. It shares no code with the package.

Shape legend: B batch, T query tokens, S text tokens, M facts, L KB layers, N query heads, H head dim, P encoder dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from kblam_ray.attention import AdapterConfig, Attachment, BaseShape, KnowledgeAdapter, KnowledgeMemory, attach

PLAIN = "plain_one_softmax"
VOCABULARY = 96
DIM = 24
WINDOW = 4
"""Sliding window of the families that have one: shorter than every prompt."""


@dataclass(frozen=True)
class Family:
    """One model family and what is special about its tiny model."""

    name: str
    config_class: type
    kb_layers: tuple[int, ...] = (0, 2)
    settings: dict[str, Any] = field(default_factory=dict)
    grouped: bool = True

    def config(self) -> Any:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        if self.grouped:
            sizes["num_key_value_heads"] = 2
        return self.config_class(**{**sizes, **self.settings})

    def model(
        self, *, dtype: torch.dtype = torch.float32, implementation: str = "sdpa", seed: int = 0
    ) -> hf.PreTrainedModel:
        """The family's tiny model, with the same numbers at each call."""
        return tiny_model(self.config(), dtype=dtype, implementation=implementation, seed=seed)


FAMILIES = [
    Family("llama", hf.LlamaConfig),
    Family("phi3", hf.Phi3Config),
    Family("qwen2", hf.Qwen2Config),
    Family("qwen3", hf.Qwen3Config, settings={"head_dim": 16}),
    Family("mistral", hf.MistralConfig, settings={"sliding_window": WINDOW}),
    Family(
        "gemma3",
        hf.Gemma3TextConfig,
        settings={
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    # The last layer has no rotary embedding.
    Family("smollm3", hf.SmolLM3Config, settings={"no_rope_layers": [1, 1, 0]}),
    Family("olmo", hf.OlmoConfig, settings={"clip_qkv": 1.0}),
    Family("gpt_neox", hf.GPTNeoXConfig, grouped=False),
    Family("mixtral", hf.MixtralConfig, settings={"num_local_experts": 4}),
    Family(
        "qwen3_moe",
        hf.Qwen3MoeConfig,
        kb_layers=(1, 2),
        settings={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
]

INKLING = {
    **{"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "d_rel": 4, "rel_extent": 8},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "head_dim": 8},
}
"""Sizes of two families that are in none of the lists: convolutions after the attention, position biases, sinks."""


def tiny_model(
    config: Any, *, dtype: torch.dtype = torch.float32, implementation: str = "sdpa", seed: int = 0
) -> hf.PreTrainedModel:
    """A model of random weights that depend on the seed alone, large enough to make a difference."""
    # The library's other implementation of mixtures of experts has no float64.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.eval().to(dtype).requires_grad_(False)


def random_adapter(
    config: Any, kind: str, kb_layers: Sequence[int], *, seed: int = 1, **settings: Any
) -> KnowledgeAdapter:
    """An adapter of random weights for a model of this configuration, or shape.

    Kind "paper" has a slot that no layer reads, as published checkpoints may have. Queries are small enough that facts
    and text both get a good part of the attention.
    """
    adapter_config = AdapterConfig(
        kind=kind,
        base_shape=config if isinstance(config, BaseShape) else BaseShape.of(config),
        dim=DIM,
        kb_layers=list(kb_layers),
        slots=len(kb_layers) + (kind == "paper"),
        **settings,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (0.3 if "projection" in name else 0.1) * torch.randn(shape, generator=generator)
        for name, shape in adapter_config.tensor_shapes().items()
    }
    if kind == "shared":
        tensors["key_scale"] = torch.tensor([1.7])
    return KnowledgeAdapter.of_tensors(adapter_config, tensors)


@dataclass(frozen=True)
class Facts:
    """Base embeddings of M facts and, perhaps, a prior over them."""

    keys_MP: torch.Tensor
    values_MP: torch.Tensor
    prior_M: torch.Tensor | None = None

    @classmethod
    def random(cls, num_facts: int, *, seed: int = 2, dim: int = DIM, has_prior: bool = False) -> Facts:
        generator = torch.Generator().manual_seed(seed)
        keys_MP, values_MP = torch.randn(2, num_facts, dim, generator=generator)
        prior_M = 2 * torch.randn(num_facts, generator=generator) if has_prior else None
        return cls(keys_MP, values_MP, prior_M)

    def memory(self, adapter: KnowledgeAdapter, **options: Any) -> KnowledgeMemory:
        memory = KnowledgeMemory.from_embeddings(adapter, self.keys_MP, self.values_MP, **options)
        return memory if self.prior_M is None else memory.with_prior(self.prior_M)

    def rows(self, rows: Sequence[int]) -> Facts:
        prior_M = None if self.prior_M is None else self.prior_M[rows]
        return Facts(self.keys_MP[rows], self.values_MP[rows], prior_M)


@contextmanager
def attached(model: nn.Module, *adapters: KnowledgeAdapter) -> Iterator[Attachment]:
    """The first adapter's attachment; all are taken off at the end."""
    attachments = [attach(model, adapter) for adapter in adapters]
    try:
        yield attachments[0]
    finally:
        for attachment in attachments:
            attachment.detach()


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter's tensors, by the names of its file, and the formula they stand in.

    paper:  key = LayerNorm(W_K e + b_K) over all slots, no affine part, eps 1e-5; logit = <W_q h, key> / sqrt(H)
    shared: logit = <A h + a, (e - mean) / scale> + G h + b
    both:   + log C - log M, + the prior;  value = W_V v + b_V
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    kb_scale: float | None

    @classmethod
    def of(cls, adapter: KnowledgeAdapter, *, requires_grad: bool = False) -> PlainAdapter:
        """The same weights in float64, as leaves of their own."""
        config = adapter.config
        tensors = {name: tensor.detach().double().clone() for name, tensor in adapter.state_dict().items()}
        for name, _ in adapter.named_parameters():
            tensors[name].requires_grad_(requires_grad)
        shape = config.base_shape
        return cls(config.kind, tensors, config.layers, shape.num_heads, shape.head_dim, config.kb_scale)

    def attend(self, layer: int, hidden_TX: torch.Tensor, facts: Facts) -> tuple[torch.Tensor, torch.Tensor]:
        """KB logits [N, T, M] and values [N, M, H] of one KB layer."""
        tensors, slot = self.tensors, self.layers.index(layer)
        keys_MP, values_MP = facts.keys_MP.double(), facts.values_MP.double()
        values_MNH = self._slot(self._linear("value_projection", values_MP), slot)
        query = self._linear(f"query_heads.{layer}", hidden_TX)
        if self.kind == "paper":
            projected_MX = self._linear("key_projection", keys_MP)
            keys_MNH = self._slot(F.layer_norm(projected_MX, projected_MX.shape[-1:], eps=1e-5), slot)
            query_TNH = query.unflatten(-1, (self.num_heads, self.head_dim))
            logits_NTM = torch.einsum("tnh,mnh->ntm", query_TNH, keys_MNH) / math.sqrt(self.head_dim)
        else:
            score_TM = query @ ((keys_MP - tensors["key_mean"]) / tensors["key_scale"]).T
            logits_NTM = score_TM + self._linear(f"gates.{layer}", hidden_TX).T[:, :, None]
        if self.kb_scale is not None:
            logits_NTM = logits_NTM + math.log(self.kb_scale) - math.log(len(keys_MP))
        if facts.prior_M is not None:
            logits_NTM = logits_NTM + facts.prior_M.double()
        return logits_NTM, values_MNH.transpose(0, 1)

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _slot(self, flat_MX: torch.Tensor, slot: int) -> torch.Tensor:
        return flat_MX.unflatten(-1, (-1, self.num_heads, self.head_dim))[:, slot]


class PlainModel:
    """A base model in float64 whose KB layers attend to `facts`: one Facts (or None) per row, or one for all rows."""

    def __init__(self, base_model: hf.PreTrainedModel, adapter: PlainAdapter) -> None:
        assert base_model.config._attn_implementation == PLAIN, "build the model with implementation=PLAIN"
        self.base_model, self.adapter = base_model, adapter
        self.facts: Facts | Sequence[Facts | None] | None = None
        for module in base_model.modules():
            if type(module).__name__.endswith("Attention") and module.layer_idx in adapter.layers:
                module.plain_model = [self]  # in a list: as an attribute it would be looked at as a submodule is
                module.register_forward_pre_hook(_keep_hidden, with_kwargs=True)

    def logits(self, input_ids: torch.Tensor, facts: Any, **inputs: Any) -> torch.Tensor:
        self.facts = facts
        return self.base_model(input_ids, **inputs).logits

    def generate(self, input_ids: torch.Tensor, facts: Any, **options: Any) -> torch.Tensor:
        self.facts = facts
        return self.base_model.generate(input_ids, **options)

    def rows(self, batch: int) -> list[Facts | None]:
        rows = [self.facts] if self.facts is None or isinstance(self.facts, Facts) else list(self.facts)
        assert batch % len(rows) == 0
        return [facts for facts in rows for _ in range(batch // len(rows))]


def _keep_hidden(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    module.plain_hidden = args[0] if args else kwargs["hidden_states"]


def _one_softmax(
    module: nn.Module,
    query_BNTH: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    group = query_BNTH.shape[1] // key.shape[1]
    key_BNSH, value_BNSH = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits_BNTS = query_BNTH @ key_BNSH.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits_BNTS = logits_BNTS + attention_mask[..., : key_BNSH.shape[2]]
    owner = getattr(module, "plain_model", [None])[0]
    rows = [None] * len(query_BNTH) if owner is None else owner.rows(len(query_BNTH))
    out = []
    for row, facts in enumerate(rows):
        logits_NTX, values_NXH = logits_BNTS[row], value_BNSH[row]
        if facts is not None and len(facts.keys_MP):
            kb_NTM, kb_NMH = owner.adapter.attend(module.layer_idx, module.plain_hidden[row], facts)
            logits_NTX = torch.cat([kb_NTM, logits_NTX], -1)
            values_NXH = torch.cat([kb_NMH, values_NXH], 1)
        out.append((torch.softmax(logits_NTX, -1) @ values_NXH).transpose(0, 1))
    return torch.stack(out).contiguous(), None


AttentionInterface.register(PLAIN, _one_softmax)
AttentionMaskInterface.register(PLAIN, eager_mask)
