"""What is derived from an adapter's weights equals its definition, and is kept exactly as long as the weights stay."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from tiny import DIM, KINDS, small_blocks, tiny_adapter, tiny_llama

from kblam_ray.attention import projections
from kblam_ray.attention.projections import Projections, fact_scale, materialize

NUM_FACTS = 8


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def random_keys(dtype=torch.float64, seed=0):
    return torch.randn(NUM_FACTS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normalised(adapter, keys_MP):
    """LayerNorm over the whole key vector, in float64: [M, S*N*H]."""
    linear = adapter.key_projection
    keys_MX = keys_MP.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    return F.layer_norm(keys_MX, keys_MX.shape[1:], eps=1e-5)


def plain_scale(adapter, keys_MP):
    """1 / sqrt(variance + eps) of the whole key vector, in float64."""
    linear = adapter.key_projection
    keys_MX = keys_MP.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    return 1 / (keys_MX.var(1, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize("blocks", [2, 10_000])
@pytest.mark.parametrize(
    ("adapter_dtype", "key_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.float16, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-5),
    ],
)
def test_the_scale_of_a_fact_is_that_of_the_layer_norm(model, blocks, adapter_dtype, key_dtype, tolerance):
    adapter = tiny_adapter(model, "paper", dtype=adapter_dtype)
    keys_MP = random_keys(key_dtype)
    with small_blocks(facts=blocks):
        scale_M = fact_scale(adapter, keys_MP)
    assert scale_M.dtype == (torch.float64 if adapter_dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scale_M.double(), plain_scale(adapter, keys_MP), rtol=tolerance, atol=0)


def test_what_all_rows_of_the_projection_share_costs_no_precision(model):
    """The LayerNorm takes the mean out; left in, it would swamp the variance in float32."""
    adapter = tiny_adapter(model, "paper")
    with torch.no_grad():
        adapter.key_projection.weight += 30 * torch.randn(DIM, generator=torch.Generator().manual_seed(1))
        adapter.key_projection.bias += 100
    keys_MP = random_keys(torch.float32)
    torch.testing.assert_close(fact_scale(adapter, keys_MP).double(), plain_scale(adapter, keys_MP), rtol=1e-4, atol=0)


def test_a_key_without_variance_has_the_largest_scale_and_no_nan(model):
    adapter = tiny_adapter(model, "paper")
    with torch.no_grad():
        adapter.key_projection.weight.zero_()
        adapter.key_projection.bias.fill_(3.0)
    scale_M = fact_scale(adapter, random_keys(torch.float32))
    torch.testing.assert_close(scale_M, torch.full((NUM_FACTS,), 1e-5**-0.5))


def test_the_scale_has_its_gradient(model):
    adapter = tiny_adapter(model, "paper", dtype=torch.float64, slots=2, kb_layer_frequency=2)
    keys_MP = random_keys()[:3].requires_grad_(True)
    leaves = (keys_MP, adapter.key_projection.bias, adapter.key_projection.weight)

    def scale(*_):
        adapter.weights_changed()
        return fact_scale(adapter, keys_MP)

    with small_blocks(facts=2):
        assert torch.autograd.gradcheck(scale, leaves)


@pytest.mark.parametrize("blocks", [3, 10_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_materialised_keys_and_values_are_the_definitions(model, kind, dtype, blocks):
    adapter = tiny_adapter(model, kind, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    config, shape = adapter.config, adapter.config.base_shape
    keys_MP, values_MP = random_keys(torch.float32), random_keys(torch.float32, 1)
    heads = (config.slots, shape.num_heads, shape.head_dim)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    linear = adapter.value_projection
    values_MX = values_MP.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    for layer in config.layers:
        slot = config.slot_of(layer)
        with small_blocks(facts=blocks), torch.no_grad():
            keys, values = materialize(adapter, layer, keys_MP, values_MP, dtype)
        expected = values_MX.unflatten(1, heads)[:, slot]
        expected = expected.transpose(0, 1) if kind == "paper" else expected.flatten(1)
        assert values.dtype == dtype
        torch.testing.assert_close(values.double(), expected, rtol=tolerance, atol=tolerance)
        if kind == "shared":
            assert keys is None
            continue
        expected = normalised(adapter, keys_MP).unflatten(1, heads)[:, slot].transpose(0, 1)
        assert keys.dtype == dtype
        torch.testing.assert_close(keys.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_no_facts_have_no_keys_and_values(model, kind):
    adapter, none_MP = tiny_adapter(model, kind), torch.empty(0, DIM)
    shape = adapter.config.base_shape
    keys, values = materialize(adapter, 0, none_MP, none_MP, torch.float32)
    width = shape.num_heads * shape.head_dim
    assert values.shape == ((shape.num_heads, 0, shape.head_dim) if kind == "paper" else (0, width))
    if kind == "paper":
        assert keys.shape == values.shape
        assert fact_scale(adapter, none_MP).shape == (0,)
    else:
        assert keys is None


def change_in_place(adapter):
    with torch.no_grad():
        adapter.value_projection.weight.mul_(2)


def change_data(adapter):
    adapter.value_projection.weight.data.mul_(2)
    adapter.weights_changed()


def load(adapter):
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    state["value_projection.weight"] *= 2
    adapter.load_state_dict(state)


def replace_parameter(adapter):
    adapter.value_projection.weight = torch.nn.Parameter(2 * adapter.value_projection.weight.detach())


def step(adapter):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    adapter.value_projection.weight.grad = -adapter.value_projection.weight.detach().clone()
    optimizer.step()


CHANGES = (change_in_place, change_data, load, replace_parameter, step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_projections_are_kept_until_the_weights_change(model, kind, change):
    adapter = tiny_adapter(model, kind)
    with torch.no_grad():
        before = Projections.of(adapter)
        value = before.layer(0, torch.bfloat16).value_NHP.clone()
        assert Projections.of(adapter) is before
    change(adapter)
    with torch.no_grad():
        after = Projections.of(adapter)
        assert after is not before
        assert Projections.of(adapter) is after
        assert torch.equal(after.layer(0, torch.bfloat16).value_NHP, 2 * value)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_while_autograd_records_the_adapter(model, kind):
    adapter = tiny_adapter(model, kind).train()
    assert Projections.of(adapter) is not Projections.of(adapter)
    assert Projections.of(adapter).layer(0, torch.float32).value_NHP.requires_grad
    with torch.no_grad():
        assert not Projections.of(adapter).layer(0, torch.float32).value_NHP.requires_grad
    adapter.requires_grad_(False)
    assert Projections.of(adapter) is Projections.of(adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_made_in_inference_mode_may_be_used_in_training(model, kind):
    adapter = tiny_adapter(model, kind).requires_grad_(False)
    with torch.inference_mode():
        made = Projections.of(adapter)
        made.layer(0, torch.bfloat16)
    assert Projections.of(adapter) is made
    weights = made.layer(0, torch.bfloat16)
    hidden = torch.randn(2, DIM, dtype=torch.bfloat16, requires_grad=True)
    (hidden @ weights.value_NHP[0].T).sum().backward()
    assert hidden.grad is not None


def test_projections_made_under_autocast_are_exact(model):
    keys_MP = random_keys(torch.float32)
    plain, cast = tiny_adapter(model, "paper"), tiny_adapter(model, "paper")
    with torch.no_grad():
        expected = fact_scale(plain, keys_MP)
        with torch.autocast("cpu", torch.bfloat16):
            Projections.of(cast)
        assert torch.equal(fact_scale(cast, keys_MP), expected)


def test_what_is_kept_goes_with_its_adapter(model):
    adapter = tiny_adapter(model, "paper")
    with torch.no_grad():
        Projections.of(adapter)
    gc.collect()
    before = len(projections._KNOWN)
    del adapter
    gc.collect()
    assert len(projections._KNOWN) == before - 1
