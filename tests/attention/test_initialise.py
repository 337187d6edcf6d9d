"""New adapters: query heads that are the base model's own, the rest at the size of what the base model computes."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from adapter_samples import ENCODER, base_model
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.base_probe import probe
from kblam_ray.attention.attach import attach
from kblam_ray.attention.decoder import attention_modules
from kblam_ray.errors import AdapterError, UnsupportedModelError

SEEN: dict[int, dict[str, torch.Tensor]] = {}


def watched_attention(module, query, key, value, attention_mask, **kwargs):
    SEEN[module.layer_idx] |= {"query": query, "key": key, "value": value}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("watched", watched_attention)


def watch(model, input_ids: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """Per layer: the hidden states that the attention received, and its queries and values."""

    def note(module, args, kwargs):
        SEEN[module.layer_idx] = {"hidden": kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]}

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attention_modules(model).values()]
    before = model.config._attn_implementation
    model.set_attn_implementation("watched")
    with torch.no_grad():
        model(input_ids=input_ids)
    model.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    return SEEN


FAMILIES = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {},
    "olmo": {},
    "smollm3": {},
    "mixtral": {"num_local_experts": 2},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128},
    "persimmon": {"num_key_value_heads": 4, "qk_layernorm": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_query_heads_are_the_layers_own_query_projection(family):
    model = base_model(family, **FAMILIES[family])
    for module in model.modules():
        if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)  # query heads have no bias: what remains is the matrix
    adapter = KnowledgeAdapter.for_model(model, kind="paper", dim=10, kb_layer_frequency=2)
    # One token, at position 0, where rotary embeddings turn nothing.
    seen = watch(model, torch.tensor([[5]]))
    for layer in (0, 2):
        query_NH = adapter.query_heads[str(layer)](seen[layer]["hidden"])[0, 0].view(4, 8)
        torch.testing.assert_close(query_NH, seen[layer]["query"][0, :, 0], rtol=1e-4, atol=1e-6)
        assert query_NH.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_query_heads_of_families_that_normalise_queries_are_copies_too(family):
    model = base_model(family)
    adapter = KnowledgeAdapter.for_model(model, kind="paper", dim=10, kb_layers=[1, 2])
    for layer in (1, 2):
        own = model.model.layers[layer].self_attn.q_proj.weight
        assert torch.equal(adapter.query_heads[str(layer)].weight, own)
        assert adapter.query_heads[str(layer)].weight.data_ptr() != own.data_ptr()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("kind", ["paper", "shared"])
def test_values_of_facts_are_as_large_as_the_base_models_own(family, kind):
    model = base_model(family, **FAMILIES.get(family, {}))
    layers = attention_modules(model)
    with torch.no_grad():
        for layer in (1, 3):  # as different as layers of a trained model are
            for parameter in layers[layer].parameters():
                parameter.mul_(30.0)
    adapter = KnowledgeAdapter.for_model(model, kind=kind, dim=64, kb_layers=[0, 1, 3])
    seen = watch(model, torch.randint(64, (2, 48)))
    values_MP = nn.functional.normalize(torch.randn(200, 64), dim=-1)
    values_MSX = adapter.value_projection(values_MP).view(200, 3, 32)
    for slot, layer in enumerate((0, 1, 3)):
        own, facts = seen[layer]["value"].square().mean().sqrt(), values_MSX[:, slot].square().mean().sqrt()
        assert 0.7 < facts / own < 1.4, layer


def test_keys_of_kind_paper_are_far_above_the_eps_of_their_norm():
    adapter = KnowledgeAdapter.for_model(base_model(), kind="paper", dim=64)
    keys_MP = nn.functional.normalize(torch.randn(50, 64), dim=-1)
    assert adapter.key_projection(keys_MP).var(-1).min() > 100 * 1e-5


def test_an_unread_slot_has_a_key_and_no_value():
    adapter = KnowledgeAdapter.for_model(base_model(), kind="paper", dim=10, kb_layer_frequency=2, slots=3)
    key_SXP, value_SXP = (
        projection.weight.view(3, 32, 10) for projection in (adapter.key_projection, adapter.value_projection)
    )
    assert key_SXP[2].std() > 0.1
    assert value_SXP[2].abs().max() == 0
    assert value_SXP[1].abs().max() > 0


@pytest.mark.parametrize("sampled", [False, True])
def test_scores_and_gates_of_kind_shared_start_small(sampled):
    model = base_model()
    keys_MP = nn.functional.normalize(torch.randn(300, 24) + 0.5, dim=-1)
    sample = {"sample_keys_MP": keys_MP} if sampled else {}
    adapter = KnowledgeAdapter.for_model(model, dim=24, kb_layer_frequency=1, **sample)
    if sampled:
        torch.testing.assert_close(adapter.key_mean, keys_MP.mean(0))
        assert ((keys_MP - adapter.key_mean) / adapter.key_scale).square().mean().item() == pytest.approx(1, rel=1e-4)
    else:
        assert adapter.key_mean.abs().max() == 0
        assert adapter.key_scale.item() == 1
    seen = watch(model, torch.randint(64, (1, 100)))
    for layer in range(4):
        hidden_TX = seen[layer]["hidden"][0]
        scores_TM = adapter.query_heads[str(layer)](hidden_TX) @ ((keys_MP - adapter.key_mean) / adapter.key_scale).T
        assert 0.03 < scores_TM.square().mean().sqrt() < 0.3
        gate = adapter.gates[str(layer)]
        assert 0.02 < (gate(hidden_TX) - gate.bias).square().mean().sqrt() < 0.3


@pytest.mark.parametrize(
    ("settings", "num_facts"),
    [({"kb_scale": 50.0}, 7), ({"kb_scale": 50.0}, 5_000), ({"training_kb_range": (10, 1000)}, 100), ({}, 100)],
)
def test_gates_start_where_a_head_gives_text_and_facts_half_each(settings, num_facts):
    text_LN = torch.randn(2, 4) * 20
    adapter = KnowledgeAdapter.for_model(base_model(), dim=24, text_log_sum_exp_LN=text_LN, **settings)
    scores_M = torch.randn(num_facts) * 0.1
    scale = settings.get("kb_scale")
    shift = 0.0 if scale is None else math.log(scale) - math.log(num_facts)
    for slot, layer in enumerate(adapter.config.layers):
        kb_N = torch.logsumexp(scores_M, 0) + adapter.gates[str(layer)].bias + shift
        weight_N = torch.sigmoid(kb_N - text_LN[slot])
        torch.testing.assert_close(weight_N, torch.full((4,), 0.5), atol=0.03, rtol=0)


def test_settings_of_a_new_adapter():
    model = base_model()
    model.config._name_or_path = "owner/base"
    adapter = KnowledgeAdapter.for_model(
        model, encoder=ENCODER, kb_layer_frequency=1, retrieval_layers=[3], kb_scale=9, refusal_text="No."
    )
    config = adapter.config
    assert (config.kind, config.base_model, config.encoder, config.dim) == ("shared", "owner/base", ENCODER, 10)
    assert (config.layers, config.slots, config.retrieval_layers) == ((0, 1, 2, 3), 4, [3])
    assert (config.kb_scale, config.refusal_text) == (9.0, "No.")
    assert adapter.training
    assert adapter.dtype == torch.float32


def test_by_default_every_third_layer_is_a_kb_layer():
    assert KnowledgeAdapter.for_model(base_model(), dim=10).config.layers == (0, 3)


def test_the_same_seed_gives_the_same_adapter():
    def tensors(seed):
        return KnowledgeAdapter.for_model(base_model(), dim=10, seed=seed).state_dict().values()

    assert all(torch.equal(one, other) for one, other in zip(tensors(4), tensors(4), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(tensors(4), tensors(5), strict=True))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(11)
    expected = torch.randn(3)
    model = base_model()
    torch.manual_seed(11)
    KnowledgeAdapter.for_model(model, dim=10)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_measuring_leaves_the_base_model_as_it_was(implementation):
    model = base_model(attention_dropout=0.5, attn_implementation=implementation)
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    configs = [id(getattr(module, "config", None)) for module in model.modules()]
    probe(model, (0, 1, 3), torch.ones(1, 5, dtype=torch.long))
    assert [module.training for module in model.modules()] == modes
    assert [id(getattr(module, "config", None)) for module in model.modules()] == configs
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())


def text_log_sum_exp(seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, N, T] of unpadded sequences, by the plain formula."""
    query, key = seen["query"], seen["key"].repeat_interleave(2, dim=1)
    logits = query @ key.transpose(-1, -2) / 8**0.5
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf).logsumexp(-1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_probed_is_what_a_forward_pass_works_on(implementation):
    model = base_model(attn_implementation=implementation)
    enlarge_queries(model)
    ids = torch.randint(64, (2, 20))
    probes = probe(model, (0, 3), ids)
    seen = watch(model, ids)
    for layer, found in probes.items():
        assert found.hidden == pytest.approx(seen[layer]["hidden"].square().mean().sqrt().item(), rel=1e-5)
        assert found.value == pytest.approx(seen[layer]["value"].square().mean().sqrt().item(), rel=1e-5)
        lse_N = text_log_sum_exp(seen[layer]).mean((0, 2))
        torch.testing.assert_close(found.text_log_sum_exp_N, lse_N, rtol=1e-4, atol=1e-4)
        assert lse_N.std() > 0.5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_not_measured(implementation):
    model = base_model(attn_implementation=implementation)
    enlarge_queries(model)
    short, long = torch.randint(64, (1, 9)), torch.randint(64, (1, 20))
    padded = torch.cat([nn.functional.pad(short, (0, 11)), long])
    together = probe(model, (1, 3), padded, (torch.arange(20) < torch.tensor([[9], [20]])).long())
    apart = [probe(model, (1, 3), ids) for ids in (short, long)]
    for layer, found in together.items():
        lse_N = (9 * apart[0][layer].text_log_sum_exp_N + 20 * apart[1][layer].text_log_sum_exp_N) / 29
        torch.testing.assert_close(found.text_log_sum_exp_N, lse_N, rtol=1e-4, atol=1e-4)
        hidden = math.sqrt((9 * apart[0][layer].hidden ** 2 + 20 * apart[1][layer].hidden ** 2) / 29)
        assert found.hidden == pytest.approx(hidden, rel=1e-4)


def enlarge_queries(model):
    """Logits of a trained model's size, different in every head."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(torch.logspace(1, 3, 4).repeat_interleave(8)[:, None])


def test_gates_start_at_the_text_log_sum_exp_of_the_sample():
    model = base_model()
    enlarge_queries(model)
    ids = torch.randint(64, (3, 24))
    adapter = KnowledgeAdapter.for_model(model, dim=10, kb_scale=100.0, sample_ids_BT=ids)
    other = KnowledgeAdapter.for_model(model, dim=10, kb_scale=100.0)
    seen = watch(model, ids)
    for layer in (0, 3):
        bias_N = text_log_sum_exp(seen[layer]).mean((0, 2)) - math.log(100) - 0.005
        torch.testing.assert_close(adapter.gates[str(layer)].bias, bias_N, rtol=1e-4, atol=1e-4)
        # Random tokens are no text, but nearer to it than nothing.
        assert (other.gates[str(layer)].bias - bias_N).abs().max() < bias_N.abs().max()


def test_a_base_model_in_16_bit_gives_an_adapter_in_32():
    model = base_model().to(torch.bfloat16)
    adapter = KnowledgeAdapter.for_model(model, kind="paper", dim=10)
    assert adapter.dtype == torch.float32
    assert torch.equal(adapter.query_heads["0"].weight, model.model.layers[0].self_attn.q_proj.weight.float())


class Quantised(nn.Module):
    """Holds a weight as libraries of quantisation do: bytes, and a scale; computes what the layer computed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return hidden @ (self.weight.float() * self.scale).T


def quantised_model():
    model = base_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Quantised(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Quantised(layer.self_attn.v_proj)
    return model


def test_a_quantised_query_projection_is_refused_where_it_is_needed():
    with pytest.raises(UnsupportedModelError, match=r"quantised.*layer 0.*unquantised"):
        KnowledgeAdapter.for_model(quantised_model(), kind="paper", dim=10)
    adapter = KnowledgeAdapter.for_model(quantised_model(), kind="shared", dim=10)
    whole = KnowledgeAdapter.for_model(base_model(), kind="shared", dim=10)
    torch.testing.assert_close(adapter.value_projection.weight, whole.value_projection.weight, rtol=0.05, atol=1e-4)


def test_an_unknown_layout_is_refused_where_it_matters():
    model = base_model("gpt_bigcode", n_embd=32, n_head=4, n_layer=4, n_positions=128)
    with pytest.raises(UnsupportedModelError, match=r"gpt_bigcode.*not known.*shared"):
        KnowledgeAdapter.for_model(model, kind="paper", dim=10)
    assert KnowledgeAdapter.for_model(model, kind="shared", dim=10).config.layers == (0, 3)


class ClaimsFloats(torch.Tensor):
    """Quantised numbers that call themselves float32, as some libraries' do; they know few operations."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.detach:
            return cls(args[0].numbers)
        return NotImplemented


def test_a_quantised_weight_that_claims_to_be_floats_is_refused():
    model = quantised_model()
    for layer in model.model.layers:
        numbers = layer.self_attn.q_proj.weight
        layer.self_attn.q_proj.forward = partial(Quantised.forward, SimpleNamespace(weight=numbers.float(), scale=1e-3))
        layer.self_attn.q_proj.weight = nn.Parameter(ClaimsFloats(numbers), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised.*layer 0"):
        KnowledgeAdapter.for_model(model, kind="paper", dim=10)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", {}, "capped at 50"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
        ("gptj", {}, "no layer calls the attention interface"),
    ],
)
def test_a_base_model_that_cannot_be_attached_to_gets_no_adapter(family, settings, message):
    with pytest.raises(UnsupportedModelError, match=message):
        KnowledgeAdapter.for_model(base_model(family, **settings), dim=10)


def test_a_query_projection_that_computes_more_than_queries_is_refused():
    model = base_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = nn.Parameter(torch.randn(64, 32))
        layer.self_attn.o_proj = nn.Linear(64, 32, bias=False)
    with pytest.raises(UnsupportedModelError, match="64 rows instead of 32"):
        KnowledgeAdapter.for_model(model, kind="paper", dim=10)


def test_a_base_model_without_weights_is_refused():
    with torch.device("meta"):
        model = base_model()
    with pytest.raises(UnsupportedModelError, match="not loaded"):
        KnowledgeAdapter.for_model(model, dim=10)


def test_a_base_model_that_computes_nothing_finite_is_refused():
    model = base_model()
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, float("inf"))
    with pytest.raises(UnsupportedModelError, match="layer 3 computes is not finite"):
        KnowledgeAdapter.for_model(model, dim=10)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": None}, "encoder is not known"),
        ({"dim": 11, "encoder": ENCODER}, "dim is 11"),
        ({"kb_layer_frequency": 2, "kb_layers": [0]}, "one of the two"),
        ({"kb_layers": [9]}, "not ascending layers"),
        ({"kb_layers": []}, "not ascending layers"),
        ({"kb_layer_frequency": 0}, "kb_layer_frequency"),
        ({"kind": "other"}, "kind"),
        ({"learning_rate": 1}, "learning_rate"),
        ({"text_log_sum_exp_LN": torch.zeros(4, 2)}, "text_log_sum_exp_LN must be 2 x 4"),
        ({"text_log_sum_exp_LN": torch.full((2, 4), float("nan"))}, "finite"),
        ({"sample_ids_BT": torch.tensor([1, 2])}, "rows of token ids below 64"),
        ({"sample_ids_BT": torch.tensor([[1, 64]])}, "rows of token ids below 64"),
        ({"sample_ids_BT": torch.zeros(1, 0, dtype=torch.int64)}, "rows of token ids"),
        ({"sample_ids_BT": torch.tensor([[1.0]])}, "rows of token ids"),
        ({"sample_keys_MP": torch.zeros(5, 11)}, "sample_keys_MP must be any x 10"),
        ({"sample_keys_MP": torch.zeros(0, 10)}, "sample_keys_MP"),
    ],
)
def test_what_cannot_be_asked_for(settings, message):
    with pytest.raises(AdapterError, match=message):
        KnowledgeAdapter.for_model(base_model(), **{"dim": 10, **settings})


def test_a_sample_without_spread_keeps_the_scale():
    adapter = KnowledgeAdapter.for_model(base_model(), sample_keys_MP=torch.ones(3, 10))
    assert adapter.config.dim == 10
    assert adapter.key_scale.item() == 1
    assert torch.equal(adapter.key_mean, torch.ones(10))


def test_a_second_adapter_for_a_model_that_has_one_attached():
    alone = KnowledgeAdapter.for_model(base_model(), kind="paper", dim=10)
    model = base_model()
    attachment = attach(model, alone)
    second = KnowledgeAdapter.for_model(model, kind="paper", dim=10)
    attachment.detach()
    assert all(
        torch.equal(one, other)
        for one, other in zip(alone.state_dict().values(), second.state_dict().values(), strict=True)
    )
