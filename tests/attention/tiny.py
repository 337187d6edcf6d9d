"""A tiny random Llama, adapters for it, and attention over facts by definition: one softmax over [facts | text].

The reference shares nothing with the package but the adapter's tensors: it makes every key and value of the layer
(KBLaM, arXiv 2410.10450, eqs. 5-8 and 11) and every score. Shape legend: B batch, T tokens, M facts, S slots, N query
heads, H head dim, P encoder dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kblam_ray.attention import KnowledgeAdapter, KnowledgeMemory, projections, softmax, text
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape

KINDS = ("paper", "shared")
FORMS = ("latent", "materialized")
VOCABULARY = 32
DIM = 6

torch.set_num_threads(1)


def tiny_llama(
    *,
    dtype: torch.dtype = torch.float32,
    implementation: str = "sdpa",
    num_layers: int = 3,
    hidden: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
) -> LlamaForCausalLM:
    """In evaluation mode. In float64 every operation is: the library's norms go through float32 otherwise."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=implementation,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    if dtype == torch.float64:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LlamaRMSNorm):
                    setattr(parent, name, nn.RMSNorm(hidden, child.variance_epsilon))
    return model.to(dtype).eval()


def tiny_adapter(
    model: nn.Module,
    kind: str,
    *,
    dim: int = DIM,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    slots: int | None = None,
    **settings: Any,
) -> KnowledgeAdapter:
    """With random tensors that make the facts count for about as much as the text."""
    if "kb_layers" not in settings:
        settings = {"kb_layer_frequency": 2, **settings}
    shape = BaseShape.of(model.config)
    layers = len(settings.get("kb_layers") or range(0, shape.num_layers, settings.get("kb_layer_frequency") or 1))
    extra = 1 if kind == "paper" else 0
    config = AdapterConfig(
        kind=kind, base_shape=shape, dim=dim, slots=slots or layers + extra, **{"kb_scale": 5.0, **settings}
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
        for name, shape in config.tensor_shapes().items()
    }
    if kind == "shared":
        tensors["key_scale"] = torch.tensor([0.8], dtype=torch.float64)
    return KnowledgeAdapter.of_tensors(config, tensors, dtype=dtype)


@dataclass(frozen=True)
class PlainFacts:
    """Facts of one row as plain matrices.

    Attributes:
        keys_MP, values_MP: base embeddings.
        prior_M: added to the logits; None: nothing.
        num_counted: M of the shift; None: the number of facts.
    """

    keys_MP: torch.Tensor
    values_MP: torch.Tensor
    prior_M: torch.Tensor | None = None
    num_counted: int | None = None

    def __len__(self) -> int:
        return len(self.keys_MP)

    def take(self, places: Sequence[int]) -> PlainFacts:
        at = torch.tensor(list(places), dtype=torch.int64)
        prior_M = None if self.prior_M is None else self.prior_M[at]
        return replace(self, keys_MP=self.keys_MP[at], values_MP=self.values_MP[at], prior_M=prior_M)

    def memory(self, adapter: KnowledgeAdapter, form: str = "latent", *, sizes: Sequence[int] | None = None, **given):
        """As a memory, in chunks of the given sizes (of any number; the last one gets the rest)."""
        bounds = [0, *torch.tensor(list(sizes or [])).cumsum(0).clamp_max(len(self)).tolist(), len(self)]
        ids = given.pop("fact_ids", range(len(self)))
        parts = [
            KnowledgeMemory.from_embeddings(
                adapter,
                self.keys_MP[start:stop],
                self.values_MP[start:stop],
                form=form,
                fact_ids=torch.tensor(list(ids)[start:stop], dtype=torch.int64).numpy(),
                **given,
            )
            for start, stop in pairwise(bounds)
        ]
        views = tuple(view for part in parts for view in part.views)
        memory = replace(parts[0], views=views, num_total=len(self))
        return memory if self.prior_M is None else memory.with_prior(self.prior_M)


def random_facts(num_facts: int, *, dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float32) -> PlainFacts:
    generator = torch.Generator().manual_seed(1_000 + seed)
    keys_MP, values_MP = torch.randn(2, num_facts, dim, generator=generator, dtype=torch.float64).to(dtype)
    return PlainFacts(keys_MP, values_MP)


def random_ids(batch: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, num_tokens), generator=torch.Generator().manual_seed(2_000 + seed))


def plain_kb_part(
    adapter: KnowledgeAdapter, layer: int, hidden_TX: torch.Tensor, facts: PlainFacts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, T, M] and values [N, M, H] of one layer, from the definition."""
    config, shape = adapter.config, adapter.config.base_shape
    slot, heads = config.slot_of(layer), (config.slots, shape.num_heads, shape.head_dim)
    dtype = hidden_TX.dtype
    keys_MP, values_MP = facts.keys_MP.to(dtype), facts.values_MP.to(dtype)
    weights = {name: parameter.to(dtype) for name, parameter in adapter.named_parameters()}
    values_MX = values_MP @ weights["value_projection.weight"].T + weights["value_projection.bias"]
    values_NMH = values_MX.unflatten(1, heads)[:, slot].transpose(0, 1)
    if config.kind == "paper":
        keys_MX = keys_MP @ weights["key_projection.weight"].T + weights["key_projection.bias"]
        keys_MX = F.layer_norm(keys_MX, keys_MX.shape[1:], eps=1e-5)
        keys_NMH = keys_MX.unflatten(1, heads)[:, slot].transpose(0, 1)
        query_NTH = (hidden_TX @ weights[f"query_heads.{layer}.weight"].T).unflatten(1, heads[1:]).transpose(0, 1)
        logits_NTM = query_NTH @ keys_NMH.transpose(1, 2) / math.sqrt(shape.head_dim)
    else:
        query_TP = hidden_TX @ weights[f"query_heads.{layer}.weight"].T + weights[f"query_heads.{layer}.bias"]
        gate_TN = hidden_TX @ weights[f"gates.{layer}.weight"].T + weights[f"gates.{layer}.bias"]
        compared_MP = (keys_MP - adapter.key_mean.to(dtype)) / adapter.key_scale.to(dtype)
        logits_NTM = (query_TP @ compared_MP.T)[None] + gate_TN.T[..., None]
    if config.kb_scale is not None:
        num_counted = len(facts) if facts.num_counted is None else facts.num_counted
        logits_NTM = logits_NTM + math.log(config.kb_scale) - math.log(num_counted)
    if facts.prior_M is not None:
        logits_NTM = logits_NTM + facts.prior_M.to(dtype)
    return logits_NTM, values_NMH


class PlainAttention:
    """Stands in for the forward of a Llama's attention module; keeps all shares [N, T, M + S] of each row."""

    def __init__(self, module: nn.Module, adapter: KnowledgeAdapter, rows: Sequence[PlainFacts | None]) -> None:
        self.module, self.adapter, self.rows = module, adapter, rows
        self.shares: list[torch.Tensor] = []

    def __call__(self, hidden_states, position_embeddings, attention_mask=None, **_):
        module, heads = self.module, (-1, self.module.head_dim)
        query, key, value = (
            projection(hidden_states).unflatten(-1, heads).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (tensor.repeat_interleave(module.num_key_value_groups, 1) for tensor in (key, value))
        logits = query @ key.transpose(-1, -2) / math.sqrt(module.head_dim) + attention_mask
        outs = []
        self.shares = []
        for row, facts in enumerate(self.rows):
            logits_NTS, values_NSH = logits[row], value[row]
            if facts is not None and len(facts) and module.layer_idx in self.adapter.config.layers:
                logits_NTM, values_NMH = plain_kb_part(self.adapter, module.layer_idx, hidden_states[row], facts)
                logits_NTS = torch.cat([logits_NTM, logits_NTS], -1)
                values_NSH = torch.cat([values_NMH, values_NSH], 1)
            shares_NTS = torch.softmax(logits_NTS, -1)
            self.shares.append(shares_NTS)
            outs.append((shares_NTS @ values_NSH).transpose(0, 1).flatten(1))
        return module.o_proj(torch.stack(outs)), None


@contextmanager
def plainly(
    model: LlamaForCausalLM, adapter: KnowledgeAdapter, rows: Sequence[PlainFacts | None]
) -> Iterator[dict[int, PlainAttention]]:
    """The attention of a model computes by definition, with these facts for each row of the batch in the KB layers."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # whose mask is always a matrix of numbers to add
    modules = [layer.self_attn for layer in model.model.layers]
    plain = {module.layer_idx: PlainAttention(module, adapter, rows) for module in modules}
    try:
        for module in modules:
            module.forward = plain[module.layer_idx]
        yield plain
    finally:
        for module in modules:
            del module.forward
        model.set_attn_implementation(implementation)


def plain_logits(
    model: LlamaForCausalLM,
    adapter: KnowledgeAdapter,
    ids_BT: torch.Tensor | None,
    rows: PlainFacts | Sequence[PlainFacts | None] | None,
    **inputs: Any,
) -> torch.Tensor:
    """Logits of a model whose attention computes by definition; `rows`: facts of all rows, or of each."""
    if rows is None or isinstance(rows, PlainFacts):
        rows = [rows] * len(ids_BT if ids_BT is not None else inputs["inputs_embeds"])
    with plainly(model, adapter, rows):
        return model(ids_BT, use_cache=False, **inputs).logits


@contextmanager
def small_blocks(scores: int = 16, *, rows: int = 8, text_scores: int = 64, facts: int = 3) -> Iterator[None]:
    """Everything that works in blocks does so at the sizes of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "SCORES_PER_BLOCK", {"cpu": scores, "cuda": scores})
        patch.setattr(softmax, "ROWS_PER_BLOCK", rows)
        patch.setattr(text, "SCORES_PER_BLOCK", text_scores)
        patch.setattr(projections, "FACTS_PER_BLOCK", facts)
        yield
