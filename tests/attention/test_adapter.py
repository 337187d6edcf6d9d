"""The adapter as a module and its settings: names and shapes, the key of its weights, what is refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from adapter_samples import ENCODER, SHAPE, adapter, base_model, config
from torch import nn
from transformers import LlamaConfig, Qwen3Config

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.errors import AdapterError, AdapterMismatchError, UnsupportedModelError


@pytest.mark.parametrize("kind", ["paper", "shared"])
def test_the_tensors_are_those_of_the_settings(kind):
    made = adapter(kind=kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes == made.config.tensor_shapes()


def test_names_and_shapes_of_kind_paper():
    assert config().tensor_shapes() == {
        "key_projection.weight": (4 * 24, 10),
        "key_projection.bias": (4 * 24,),
        "value_projection.weight": (4 * 24, 10),
        "value_projection.bias": (4 * 24,),
        "query_heads.0.weight": (24, 24),
        "query_heads.2.weight": (24, 24),
        "query_heads.4.weight": (24, 24),
    }


def test_names_and_shapes_of_kind_shared():
    assert config(kind="shared", kb_layers=[1, 4], slots=2).tensor_shapes() == {
        "key_mean": (10,),
        "key_scale": (1,),
        "value_projection.weight": (2 * 24, 10),
        "value_projection.bias": (2 * 24,),
        **{f"query_heads.{layer}.weight": (10, 24) for layer in (1, 4)},
        **{f"query_heads.{layer}.bias": (10,) for layer in (1, 4)},
        **{f"gates.{layer}.weight": (4, 24) for layer in (1, 4)},
        **{f"gates.{layer}.bias": (4,) for layer in (1, 4)},
    }


def test_kb_layers_by_frequency_and_by_list():
    by_frequency, by_list = config(), config(kb_layers=[1, 3], slots=2)
    assert by_frequency.layers == (0, 2, 4)
    assert by_list.layers == (1, 3)
    assert [by_list.slot_of(layer) for layer in (1, 3)] == [0, 1]
    assert by_frequency.retrieval_layers == [0, 2, 4]
    with pytest.raises(KeyError):
        by_list.slot_of(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kb_layer_frequency": None}, "one of the two"),
        ({"kb_layer_frequency": 2, "kb_layers": [0]}, "one of the two"),
        ({"kb_layers": []}, "not ascending layers"),
        ({"kb_layers": [3, 1]}, "not ascending layers"),
        ({"kb_layers": [1, 1]}, "not ascending layers"),
        ({"kb_layers": [1, 5]}, "not ascending layers"),
        ({"kb_layers": [-1, 1]}, "not ascending layers"),
        ({"slots": 2}, "2 slots for 3 KB layers: there must be at least"),
        ({"kind": "shared", "slots": 4}, "there must be exactly"),
        ({"retrieval_layers": [1]}, r"retrieval layers \[1\] are not KB layers"),
        ({"retrieval_layers": []}, "retrieval_layers"),
        ({"retrieval_layers": [2, 0, 2]}, "more than once"),
        ({"encoder": ENCODER, "dim": 11}, "dim is 11 but the encoder gives 10"),
        ({"kb_scale": 0}, "kb_scale"),
        ({"kb_scale": float("nan")}, "kb_scale"),
        ({"question_prior": float("inf")}, "question_prior"),
        ({"training_kb_range": (9, 3)}, "not a range"),
        ({"kind": "other"}, "kind"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(AdapterError, match=message):
        config(**settings)


def test_settings_survive_the_file(tmp_path):
    written = config(
        kb_layers=[0, 3], encoder=ENCODER, training_kb_range=(4, 100), refusal_text="Weiß ich nicht.", kb_scale=100
    )
    written.write(tmp_path)
    assert AdapterConfig.read(tmp_path) == AdapterConfig.read(tmp_path / "adapter_config.json") == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "reads up to 1.*upgrade"),
        ({"format_version": None}, "states no format_version"),
        ({"format_version": True}, "states no format_version"),
        ({"colour": "red"}, "colour"),
        ({"slots": "4"}, "slots"),
        ({"slots": None}, "slots"),
        ({"base_shape": {"model_type": "llama"}}, "base_shape.hidden_size"),
    ],
)
def test_a_file_of_settings_that_cannot_be_read(tmp_path, change, message):
    path = tmp_path / "adapter_config.json"
    config().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message) as error:
        AdapterConfig.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1]", b'"text"', b"[" * 100_000])
def test_a_file_that_holds_no_settings(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        AdapterConfig.read(tmp_path)


def test_a_newer_format_is_named_before_its_new_settings(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"format_version": 7, "kind": "quantum"}')
    with pytest.raises(AdapterError, match="format 7"):
        AdapterConfig.read(tmp_path)


def test_the_shape_of_a_base_model():
    shape = BaseShape.of(Qwen3Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=64))
    assert shape == BaseShape(model_type="qwen3", hidden_size=32, num_layers=3, num_heads=2, head_dim=64)


def test_the_shape_of_a_model_with_several_parts_is_its_decoders():
    from transformers import Gemma3Config, Gemma3TextConfig

    text = Gemma3TextConfig(hidden_size=48, num_hidden_layers=6, num_attention_heads=4, head_dim=16)
    assert BaseShape.of(Gemma3Config(text_config=text)) == BaseShape.of(text)
    assert BaseShape.of(text).hidden_size == 48


def test_heads_whose_values_are_narrower_than_their_keys_are_refused():
    from transformers import DeepseekV3Config

    with pytest.raises(UnsupportedModelError, match="values of"):
        BaseShape.of(DeepseekV3Config(hidden_size=32, num_attention_heads=2, v_head_dim=48))


def test_a_base_model_of_another_shape_is_named():
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    config().check_base(LlamaConfig(**sizes))
    with pytest.raises(AdapterMismatchError, match="num_layers 6 instead of 5") as error:
        config(base_model="owner/base").check_base(LlamaConfig(**(sizes | {"num_hidden_layers": 6})))
    assert "owner/base" in str(error.value)
    with pytest.raises(AdapterMismatchError, match="model_type qwen3 instead of llama, num_heads 8 instead of 4"):
        config().check_base(Qwen3Config(**(sizes | {"num_attention_heads": 8, "head_dim": 6})))


def test_settings_of_a_finished_adapter():
    made = adapter()
    made.configure(question_prior=3, refusal_threshold=0.5)
    assert (made.config.question_prior, made.config.refusal_threshold) == (3.0, 0.5)
    for settings in ({"slots": 5}, {"kb_layers": [0], "kb_layer_frequency": None}, {"kind": "shared"}):
        with pytest.raises(AdapterError, match="cannot be changed"):
            made.configure(**settings)
    with pytest.raises(AdapterError, match="retrieval layers"):
        made.configure(retrieval_layers=[1])
    assert made.config.retrieval_layers == [0, 2, 4]


def replace_a_weight(made):
    # The old tensor is freed first, so that the new one may get its id, address and version.
    made.value_projection.weight = None
    made.value_projection.weight = nn.Parameter(torch.zeros(4 * 24, 10))


def step(made, optimizer):
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(made.parameters(), lr=0.1).step()


CHANGES = {
    "in place": lambda made: nn.init.ones_(made.query_heads["2"].weight),
    "bias": lambda made: nn.init.ones_(made.key_projection.bias),
    "SGD": lambda made: step(made, torch.optim.SGD),
    "AdamW": lambda made: step(made, torch.optim.AdamW),
    "fused AdamW": lambda made: step(made, lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True)),
    "train": lambda made: made.train(),
    "eval": lambda made: made.eval(),
    "of a parent": lambda made: nn.ModuleList([made]).eval(),
    "load": lambda made: made.load_state_dict(adapter().state_dict()),
    "load into a parent": lambda made: nn.ModuleList([made]).load_state_dict(nn.ModuleList([adapter()]).state_dict()),
    "load by assignment": lambda made: made.load_state_dict(adapter().state_dict(), assign=True),
    "cast": lambda made: made.double(),
    "replaced": replace_a_weight,
    "told": lambda made: made.weights_changed(),
    "settings": lambda made: made.configure(kb_scale=5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_of_the_weights_changes_with_them(change):
    made = adapter()
    before = made.weights_key()
    assert made.weights_key() == before
    assert hash(made.weights_key()) == hash(before)
    CHANGES[change](made)
    assert made.weights_key() != before


def test_the_key_of_the_weights_covers_every_tensor():
    for kind in ("paper", "shared"):
        made = adapter(kind=kind)
        for name, tensor in made.state_dict(keep_vars=True).items():
            before = made.weights_key()
            with torch.no_grad():
                tensor.add_(1)
            assert made.weights_key() != before, name


def test_a_use_of_the_weights_leaves_their_key():
    made = adapter()
    before = made.weights_key()
    made.value_projection(torch.ones(2, 10)).sum().backward()
    made.zero_grad()
    assert made.weights_key() == before


def test_copies_have_keys_of_their_own():
    made = adapter()
    key = made.weights_key()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.weights_key() != key
        assert torch.equal(other.value_projection.weight, made.value_projection.weight)
    assert made.weights_key() == key


def test_device_and_dtype_are_those_of_the_tensors():
    made = adapter().to(torch.bfloat16)
    assert (made.device, made.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert KnowledgeAdapter(config(), device="meta").device == torch.device("meta")


def test_an_adapter_of_tensors_copies_them_in_one_dtype():
    tensors = adapter().state_dict()
    tensors["query_heads.0.weight"] = tensors["query_heads.0.weight"].bfloat16()
    made = KnowledgeAdapter.of_tensors(config(), tensors)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert torch.equal(made.query_heads["0"].weight, tensors["query_heads.0.weight"].float())
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert not made.training
    tensors["value_projection.weight"].zero_()
    assert made.value_projection.weight.abs().sum() > 0


def test_the_encoder_of_an_adapter_can_be_anything_with_its_three_fields():
    class Encoder:
        name, revision, dim = "tiny", "abc", 10

    made = KnowledgeAdapter.for_model(base_model(), encoder=Encoder())
    assert made.config.encoder == ENCODER
    assert made.config.dim == 10
    assert made.config.base_shape != SHAPE
