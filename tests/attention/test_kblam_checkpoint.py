"""Checkpoints of the published KBLaM and AtlasKV code as adapters: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import ENCODER
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Phi3Config

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.errors import AdapterError, UnsupportedModelError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "kblam_llama"

SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
BASE = LlamaConfig(**SIZES)


def encoder_state(slots: int = 3, prefix: str = "", names=("projector_k", "projector_v")) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    state = {"embedding.weight": torch.randn(6, slots * 24), "base_model.0.auto_model.pooler.weight": torch.randn(3, 3)}
    for name in names:
        state |= {f"{name}.weight": torch.randn(slots * 24, 10), f"{name}.bias": torch.randn(slots * 24)}
    return {prefix + name: tensor for name, tensor in state.items()}


def model_state(prefix: str = "", head: str = "q_proj_new", dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = {"model.embed_tokens.weight": torch.randn(7, 24)}
    for layer in range(4):
        attention = f"model.layers.{layer}.self_attn"
        state |= {f"{attention}.{name}.weight": torch.randn(24, 24, dtype=dtype) for name in ("q_proj", head)}
        state[f"{attention}.score_shift"] = torch.randn(4, 1)
    return {prefix + name: tensor for name, tensor in state.items()}


def check(adapter: KnowledgeAdapter, encoder: dict[str, torch.Tensor], model: dict[str, torch.Tensor]) -> None:
    """The adapter holds the numbers of two states without prefixes, under KBLaM's names."""
    assert torch.equal(adapter.key_projection.weight, encoder["projector_k.weight"].to(adapter.dtype))
    assert torch.equal(adapter.key_projection.bias, encoder["projector_k.bias"].to(adapter.dtype))
    assert torch.equal(adapter.value_projection.weight, encoder["projector_v.weight"].to(adapter.dtype))
    assert torch.equal(adapter.value_projection.bias, encoder["projector_v.bias"].to(adapter.dtype))
    for layer in adapter.config.layers:
        head = model[f"model.layers.{layer}.self_attn.q_proj_new.weight"]
        assert torch.equal(adapter.query_heads[str(layer)].weight, head.to(adapter.dtype))


def test_the_published_fixtures():
    sizes = json.loads((FIXTURES / "manifest.json").read_text())["config"]
    files = FIXTURES / "encoder_f3.safetensors", FIXTURES / "model.safetensors"
    adapter = KnowledgeAdapter.from_kblam(*files, LlamaConfig(**sizes), kb_scale=100)
    config = adapter.config
    assert (config.kind, config.layers, config.slots, config.dim, config.kb_scale) == ("paper", (0, 3), 3, 48, 100.0)
    check(adapter, *map(load_file, files))


def test_states_in_memory_need_no_copy_of_the_rest():
    adapter = KnowledgeAdapter.from_kblam(encoder_state(), model_state(), BASE, kb_layer_frequency=2, encoder=ENCODER)
    check(adapter, encoder_state(), model_state())
    assert adapter.config.layers == (0, 2)
    assert adapter.config.kb_scale is None
    assert adapter.config.encoder == ENCODER
    assert set(adapter.state_dict()) == set(adapter.config.tensor_shapes())


@pytest.mark.parametrize(("frequency", "slots", "layers"), [(1, 5, (0, 1, 2, 3)), (3, 2, (0, 3)), (4, 2, (0,))])
def test_slots_and_layers_follow_from_the_frequency(frequency, slots, layers):
    state = encoder_state(slots)
    adapter = KnowledgeAdapter.from_kblam(state, model_state(), BASE, kb_layer_frequency=frequency)
    assert (adapter.config.slots, adapter.config.layers) == (slots, layers)
    check(adapter, state, model_state())


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "_orig_mod.", "module.encoder."])
def test_prefixes_of_wrappers(prefix):
    adapter = KnowledgeAdapter.from_kblam(
        encoder_state(prefix=prefix), model_state("module."), BASE, kb_layer_frequency=2
    )
    check(adapter, encoder_state(), model_state())


def test_atlaskv_names():
    encoder = encoder_state(names=("key_projector", "value_projector"))
    adapter = KnowledgeAdapter.from_kblam(encoder, model_state(head="q_proj_kg"), BASE, kb_layer_frequency=2)
    check(adapter, encoder_state(), model_state())


def test_phi3_has_a_fused_projection_and_a_query_head_of_its_own():
    state = {name.replace("q_proj.", "qkv_proj."): tensor for name, tensor in model_state().items()}
    base = Phi3Config(**SIZES, pad_token_id=0)
    adapter = KnowledgeAdapter.from_kblam(encoder_state(), state, base, kb_layer_frequency=2)
    assert adapter.config.base_shape.model_type == "phi3"
    check(adapter, encoder_state(), model_state())


def test_an_encoder_in_32_and_a_model_in_16_bit_meet_in_32():
    model = model_state(dtype=torch.bfloat16)
    adapter = KnowledgeAdapter.from_kblam(encoder_state(), model, BASE, kb_layer_frequency=2)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    check(adapter, encoder_state(), model)


def write_folder(folder: Path, **settings) -> Path:
    """What KBLaM's trainer leaves: a sharded model, its settings, and the encoder in a folder beside it."""
    model, encoder = folder / "step_600", folder / "step_600_encoder"
    model.mkdir()
    encoder.mkdir()
    torch.save(encoder_state(), encoder / "encoder.pt")
    shards: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}
    for number, (name, tensor) in enumerate(model_state().items()):
        weight_map[name] = f"model-0000{number % 2}-of-00002.safetensors"
        shards.setdefault(weight_map[name], {})[name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "kb_config_explicit.json").write_text(json.dumps({"kb_layer_frequency": 2, **settings}))
    return folder


def from_folder(folder: Path, **settings) -> KnowledgeAdapter:
    paths = folder / "step_600_encoder", str(folder / "step_600")
    return KnowledgeAdapter.from_kblam(*paths, BASE, **{"kb_layer_frequency": 2, **settings})


def test_the_folders_that_the_published_trainer_leaves(tmp_path):
    adapter = from_folder(write_folder(tmp_path, sep_query_head=True, kb_scale_factor=None))
    check(adapter, encoder_state(), model_state())
    assert adapter.config.kb_scale is None


def test_only_the_shards_with_query_heads_are_opened(tmp_path):
    write_folder(tmp_path)
    index = tmp_path / "step_600" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = "model-00099-of-00100.safetensors"
    index.write_text(json.dumps(listed))
    check(from_folder(tmp_path), encoder_state(), model_state())


def test_a_scale_that_the_checkpoint_states_is_taken_unless_one_is_given(tmp_path):
    write_folder(tmp_path, kb_scale_factor=100)
    assert from_folder(tmp_path).config.kb_scale == 100.0
    assert from_folder(tmp_path, kb_scale=7).config.kb_scale == 7.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kb_layer_frequency": 3}, "frequency of 3, not 2"),
        ({"sep_query_head": False}, "without a separate query head"),
    ],
)
def test_settings_of_a_checkpoint_that_speak_against_it(tmp_path, settings, message):
    write_folder(tmp_path, **settings)
    with pytest.raises(AdapterError, match=f"{message}.*kb_config_explicit"):
        from_folder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_in_one_file(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(model_state(), tmp_path / name)
    for place in (tmp_path, tmp_path / name):
        adapter = KnowledgeAdapter.from_kblam(encoder_state(), place, BASE, kb_layer_frequency=2)
        check(adapter, encoder_state(), model_state())


def test_a_file_of_torch_before_version_1_6(tmp_path):
    torch.save(encoder_state(), tmp_path / "encoder.pt", _use_new_zipfile_serialization=False)
    adapter = KnowledgeAdapter.from_kblam(tmp_path, model_state(), BASE, kb_layer_frequency=2)
    check(adapter, encoder_state(), model_state())


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**encoder_state(), "extra": Exploit()}, tmp_path / "encoder.pt")
    with pytest.raises(AdapterError, match="more than tensors"):
        KnowledgeAdapter.from_kblam(tmp_path / "encoder.pt", model_state(), BASE, kb_layer_frequency=2)
    assert not (tmp_path / "exploited").exists()


def drop(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def add(**tensors):
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


HEAD = "model.layers.2.self_attn.q_proj_new.weight"
ENCODER_CHANGES = {
    "MLP": (add(projector_k__0__weight=torch.zeros(5, 10)), "MLP"),
    "no key projection": (drop("projector_k.weight"), r"no projector_k\.weight or key_projector\.weight"),
    "no value bias": (drop("projector_v.bias"), r"no projector_v\.bias"),
    "two of a kind": (add(key_projector__weight=torch.zeros(72, 10)), "both projector_k"),
    "twice": (add(module__projector_k__weight=torch.zeros(72, 10)), "twice"),
    "slots": (lambda _: encoder_state(2), "2 slots of 24.*has 3"),
    "part of a slot": (lambda _: add(projector_k__weight=torch.zeros(60, 10))(encoder_state()), r"2\.5 slots"),
    "values of other slots": (add(projector_v__weight=torch.zeros(48, 10)), "value_projection.weight has the shape"),
    "values of another encoder": (add(projector_v__weight=torch.zeros(72, 11)), r"\[72, 11\].*\[72, 10\]"),
    "flat": (add(projector_k__weight=torch.zeros(720)), r"the shape \[720\]"),
    "not finite": (add(projector_k__bias=torch.full((72,), float("nan"))), "not finite"),
    "nested": (lambda state: {"state_dict": state}, "'state_dict' is dict, not a tensor"),
    "model instead": (lambda _: model_state(), "encoder.pt"),
    "nothing": (lambda _: {}, "no projector_k"),
    "a module": (lambda _: torch.nn.Linear(2, 2), "a Linear is not a checkpoint"),
    "arrays": (lambda state: {name: tensor.numpy() for name, tensor in state.items()}, "is ndarray, not a tensor"),
    "one array": (add(projector_k__bias=np.zeros(72)), "'projector_k.bias' is ndarray"),
    "quantised": (add(projector_v__bias=torch.zeros(72, dtype=torch.int8)), "cannot be int8"),
    "not loaded": (add(projector_v__bias=torch.zeros(72, device="meta")), "meta device"),
}
MODEL_CHANGES = {
    "no query head": (drop(HEAD), "no query head for KB layer 2"),
    "query head of another width": (
        lambda state: state | {HEAD: torch.zeros(24, 20)},
        r"query_heads\.2\.weight has the shape.*both states of one training run",
    ),
    "quantised": (lambda state: state | {HEAD: torch.zeros(24, 24, dtype=torch.int8)}, "cannot be int8"),
    "float8": (lambda state: state | {HEAD: torch.zeros(24, 24, dtype=torch.float8_e5m2)}, "cannot be float8_e5m2"),
    "not loaded": (lambda state: state | {HEAD: torch.zeros(24, 24, device="meta")}, "meta device"),
    "two of a kind": (lambda state: state | {HEAD.replace("_new", "_kg"): torch.zeros(24, 24)}, "both .*q_proj_kg"),
    "bias": (lambda state: state | {HEAD.replace("weight", "bias"): torch.ones(24)}, "KB layer 2 has a bias"),
    "encoder instead": (lambda _: encoder_state(), "no query head for KB layer 0"),
}


@pytest.mark.parametrize("change", ENCODER_CHANGES)
def test_encoder_states_that_are_refused(change):
    make, message = ENCODER_CHANGES[change]
    with pytest.raises(AdapterError, match=message):
        KnowledgeAdapter.from_kblam(make(encoder_state()), model_state(), BASE, kb_layer_frequency=2)


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_model_states_that_are_refused(change):
    make, message = MODEL_CHANGES[change]
    with pytest.raises(AdapterError, match=message):
        KnowledgeAdapter.from_kblam(encoder_state(), make(model_state()), BASE, kb_layer_frequency=2)


def test_what_is_no_tensor_and_not_read_does_no_harm():
    encoder = encoder_state() | {"steps": 600, "optimizer": {"lr": 0.1}}
    model = model_state() | {"model.layers.0.mlp._extra_state": None}
    made = KnowledgeAdapter.from_kblam(encoder, model, BASE, kb_layer_frequency=2)
    check(made, encoder, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_config": "meta-llama/Llama-3.2-1B"}, "str is not a transformers configuration"),
        ({"base_config": BASE.to_dict()}, "dict is not a transformers configuration"),
        ({"kb_layer_frequency": "3"}, "no whole number: '3'"),
        ({"kb_layer_frequency": None}, "no whole number: None"),
        ({"kb_scale": 0}, "kb_scale"),
        ({"encoder": "all-MiniLM-L6-v2"}, "str does not say which encoder"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    given = {"encoder_state": encoder_state(), "model_state": model_state(), "base_config": BASE} | arguments
    with pytest.raises((AdapterError, UnsupportedModelError), match=message):
        KnowledgeAdapter.from_kblam(**{"kb_layer_frequency": 2, **given})


def test_a_bias_of_zeros_is_no_bias():
    model = model_state() | {HEAD.replace("weight", "bias"): torch.zeros(24)}
    check(KnowledgeAdapter.from_kblam(encoder_state(), model, BASE, kb_layer_frequency=2), encoder_state(), model)


def test_an_encoder_of_another_dimension():
    other = ENCODER.model_copy(update={"dim": 12})
    with pytest.raises(AdapterError, match="dim is 10 but the encoder gives 12"):
        KnowledgeAdapter.from_kblam(encoder_state(), model_state(), BASE, kb_layer_frequency=2, encoder=other)


def test_another_frequency_than_the_checkpoints():
    with pytest.raises(AdapterError, match=r"3 slots of 24.*frequency of 3 has 2"):
        KnowledgeAdapter.from_kblam(encoder_state(), model_state(), BASE)
    with pytest.raises(AdapterError, match="below 1"):
        KnowledgeAdapter.from_kblam(encoder_state(), model_state(), BASE, kb_layer_frequency=0)


def break_index(folder: Path, change) -> None:
    index = folder / "step_600" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    change(listed)
    index.write_text(json.dumps(listed))


def swap_shards(index: dict) -> None:
    first, second = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: second if shard == first else first for name, shard in index["weight_map"].items()}


PATH_CHANGES = {
    "no such file": (lambda f: (f / "step_600_encoder" / "encoder.pt").unlink(), "the folder has none of"),
    "no such folder": (lambda f: (f / "step_600").rename(f / "other"), "no such file or folder"),
    "missing shard": (lambda f: (f / "step_600" / "model-00000-of-00002.safetensors").unlink(), "is missing"),
    "damaged shard": (
        lambda f: (f / "step_600" / "model-00000-of-00002.safetensors").write_bytes(b"{}"),
        "damaged.*model-00000",
    ),
    "damaged archive": (
        lambda f: (f / "step_600_encoder" / "encoder.pt").write_bytes(b"PK\x03\x04 nothing"),
        "damaged",
    ),
    "list of tensors": (lambda f: torch.save([torch.ones(1)], f / "step_600_encoder" / "encoder.pt"), "holds a list"),
    "no JSON": (lambda f: (f / "step_600" / "model.safetensors.index.json").write_text("{"), "not JSON"),
    "no map": (lambda f: break_index(f, lambda index: index.pop("weight_map")), "no weight_map"),
    "outside": (lambda f: break_index(f, lambda i: i["weight_map"].update({HEAD: "../secret"})), "outside its folder"),
    "other shard": (lambda f: break_index(f, swap_shards), "which the index places there"),
}


@pytest.mark.parametrize("change", PATH_CHANGES)
def test_checkpoints_on_disk_that_are_refused(tmp_path, change):
    write_folder(tmp_path)
    make, message = PATH_CHANGES[change]
    make(tmp_path)
    with pytest.raises(AdapterError, match=message):
        from_folder(tmp_path)


def test_a_file_that_holds_no_tensors(tmp_path):
    (tmp_path / "encoder.npy").write_bytes(b"")
    with pytest.raises(AdapterError, match="not a kind of file"):
        KnowledgeAdapter.from_kblam(tmp_path / "encoder.npy", model_state(), BASE)
