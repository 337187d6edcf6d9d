"""Attaching changes a base model only where it has knowledge, and detaching leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny import FORMS, KINDS, plain_logits, random_facts, random_ids, tiny_adapter, tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaModel

from kblam_ray.attention import attach
from kblam_ray.errors import AdapterMismatchError, InputError, UnsupportedModelError

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _without_autograd():
    with torch.no_grad():
        yield


def state_of(model) -> dict:
    """Everything about a model that attaching touches, and its tensors' addresses."""
    return {
        "config": model.config.to_json_string(use_diff=False),
        "implementation": model.config._attn_implementation,
        "tensors": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        "modules": {
            name: (
                sorted(module.__dict__),
                id(module.__dict__.get("config")),
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                len(module._forward_pre_hooks_with_kwargs),
                len(module._forward_hooks_with_kwargs),
            )
            for name, module in model.named_modules()
        },
    }


def gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_as_it_was_after_the_last_detach(kind):
    model, ids = tiny_llama(), random_ids(2, 6)
    before, plain = state_of(model), model(ids).logits
    adapter = tiny_adapter(model, kind)
    attachment = attach(model, adapter)
    assert attachment.base_model is model
    assert attachment.adapter is adapter
    assert torch.equal(model(ids).logits, plain)
    assert gap(model(ids, knowledge=random_facts(5).memory(adapter)).logits, plain) > 0.1
    assert torch.equal(model(ids, knowledge=None).logits, plain)
    attachment.detach()
    attachment.detach()
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(AdapterMismatchError, match="was detached"), attachment.using(None):
        pass
    with pytest.raises(AdapterMismatchError, match="was detached"):
        _ = attachment.base_model


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_adapters_of_several_kinds_and_layers_come_and_go_in_any_order(order):
    model, ids, facts = tiny_llama(dtype=DOUBLE), random_ids(2, 6), random_facts(5, dtype=DOUBLE)
    before, plain = state_of(model), model(ids).logits
    adapters = [
        tiny_adapter(model, "paper", dtype=DOUBLE),
        tiny_adapter(model, "shared", dtype=DOUBLE, kb_layer_frequency=None, kb_layers=[1, 2]),
        tiny_adapter(model, "paper", dtype=DOUBLE, kb_layer_frequency=3, seed=7),
    ]
    attachments = [attach(model, adapter) for adapter in adapters]
    expected = [plain_logits(model, adapter, ids, facts) for adapter in adapters]
    left = set(range(3))
    for place in order:
        for number, adapter in enumerate(adapters):
            memory = facts.memory(adapter)
            if number in left:
                assert gap(model(ids, knowledge=memory).logits, expected[number]) < 1e-9
            else:
                with pytest.raises(AdapterMismatchError, match="not attached"):
                    model(ids, knowledge=memory)
        assert torch.equal(model(ids).logits, plain)
        attachments[place].detach()
        left.discard(place)
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, plain)


def test_one_adapter_attached_twice_stays_until_both_are_detached():
    model, ids = tiny_llama(), random_ids(1, 5)
    before = state_of(model)
    adapter = tiny_adapter(model, "paper")
    first, second = attach(model, adapter), attach(model, adapter)
    memory = random_facts(5).memory(adapter)
    expected = model(ids, knowledge=memory).logits
    first.detach()
    first.detach()
    assert torch.equal(model(ids, knowledge=memory).logits, expected)
    with second.using(memory):
        assert torch.equal(model(ids).logits, expected)
    second.detach()
    assert state_of(model) == before
    third = attach(model, adapter)
    assert torch.equal(model(ids, knowledge=memory).logits, expected)
    third.detach()
    assert state_of(model) == before


def test_one_adapter_on_two_base_models():
    models = [tiny_llama(dtype=DOUBLE, seed=seed) for seed in (0, 1)]
    adapter = tiny_adapter(models[0], "shared", dtype=DOUBLE)
    facts, ids = random_facts(5, dtype=DOUBLE), random_ids(1, 5)
    attachments = [attach(model, adapter) for model in models]
    memory = facts.memory(adapter)
    expected = plain_logits(models[0], adapter, ids, facts)
    with attachments[0].using(memory):
        assert gap(models[0](ids).logits, expected) < 1e-9
        without = models[1](ids).logits
        assert torch.equal(without, models[1](ids, knowledge=[None]).logits)
    attachments[0].detach()
    assert gap(models[1](ids, knowledge=memory).logits, plain_logits(models[1], adapter, ids, facts)) < 1e-9
    attachments[1].detach()


def test_knowledge_in_use_and_knowledge_given():
    model, ids = tiny_llama(), random_ids(1, 5)
    adapter = tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    first, second, third = (random_facts(5, seed=seed).memory(adapter) for seed in range(3))
    plain, *expected = (model(ids, knowledge=memory).logits for memory in (None, first, second, third))
    with attachment.using(first):
        assert torch.equal(model(ids).logits, expected[0])
        assert torch.equal(model(ids, knowledge=third).logits, expected[2])
        assert torch.equal(model(ids).logits, expected[0])
        with attachment.using(second):
            assert torch.equal(model(ids).logits, expected[1])
        assert torch.equal(model(ids).logits, expected[0])
        with attachment.using(None):
            assert torch.equal(model(ids).logits, plain)
        with pytest.raises(ZeroDivisionError), attachment.using(second):
            _ = 1 / 0
        assert torch.equal(model(ids).logits, expected[0])
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected[0])
    assert torch.equal(model(ids).logits, plain)
    attachment.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_threads_with_memories_of_their_own(kind, form):
    model, ids = tiny_llama(num_layers=2), random_ids(2, 5)
    adapters = [tiny_adapter(model, kind, seed=seed) for seed in (0, 1)]
    attachments = [attach(model, adapter) for adapter in adapters]
    # The first two share an adapter, chunks and what is made from them when first needed.
    base = random_facts(30).memory(adapters[0], form, sizes=[10])
    memories = [base, base.with_prior(torch.linspace(-2, 2, 30)), random_facts(9).memory(adapters[1], form)]
    serial = [replace_chunks(memory) for memory in memories]
    expected = [model(ids, knowledge=memory).logits for memory in serial]
    failures: list[tuple[int, float]] = []
    start = threading.Barrier(len(memories))

    def work(place: int) -> None:
        start.wait()
        with torch.no_grad(), attachments[place // 2].using(memories[place]):
            for turn in range(40):
                if turn % 10 == 0:
                    adapters[place // 2].weights_changed()  # everything kept is made anew, by whoever comes first
                logits = model(ids).logits if turn % 2 else model(ids, knowledge=memories[place]).logits
                if not torch.equal(logits, expected[place]):
                    failures.append((place, gap(logits, expected[place])))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(memories))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for attachment in attachments:
        attachment.detach()


def replace_chunks(memory):
    """The same memory with nothing kept in its chunks."""
    views = tuple(copy.copy(view) for view in memory.views)
    for view in views:
        view.chunk = copy.copy(view.chunk)
        view.chunk._derived = {}
    return replace(memory, views=views)


def test_threads_that_attach_and_detach_while_others_ask():
    model, ids = tiny_llama(), random_ids(1, 5)
    before, plain = state_of(model), model(ids).logits
    adapters = [
        tiny_adapter(model, kind, kb_layer_frequency=None, kb_layers=[0, 2 - n]) for n, kind in enumerate(KINDS)
    ]
    memories = [random_facts(5).memory(adapter) for adapter in adapters]
    expected = []
    for adapter, memory in zip(adapters, memories, strict=True):
        attachment = attach(model, adapter)
        expected.append(model(ids, knowledge=memory).logits)
        attachment.detach()
    failures: list[str] = []

    def work(number: int) -> None:
        for _ in range(30):
            attachment = attach(model, adapters[number % 2])
            with torch.no_grad(), attachment.using(memories[number % 2]):
                if not torch.equal(model(ids).logits, expected[number % 2]):
                    failures.append("with knowledge")
            attachment.detach()
            with torch.no_grad():
                if not torch.equal(model(ids).logits, plain):
                    failures.append("without")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, number) for number in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert state_of(model) == before


def test_another_thread_has_none_of_what_is_in_use_here():
    model, ids = tiny_llama(), random_ids(1, 5)
    adapter = tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    plain, found = model(ids).logits, []
    with attachment.using(random_facts(5).memory(adapter)):
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)
    attachment.detach()


def test_a_memory_of_an_adapter_that_is_not_attached_is_refused():
    model, ids = tiny_llama(), random_ids(2, 5)
    adapter, other = tiny_adapter(model, "paper"), tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    stranger = random_facts(5).memory(other)
    for knowledge in (stranger, [random_facts(3).memory(adapter), stranger]):
        with pytest.raises(AdapterMismatchError, match="adapter that is not attached"):
            model(ids, knowledge=knowledge)
    with pytest.raises(InputError, match="3 knowledge memories for a batch of 2 rows"):
        model(ids, knowledge=[None] * 3)
    attachment.detach()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden": 32}, "hidden_size 16 instead of 32"),
        ({"num_layers": 2}, "num_layers 3 instead of 2"),
        ({"heads": 2}, "num_heads 4 instead of 2"),
    ],
)
def test_an_adapter_for_another_shape_is_refused_by_what_differs(sizes, named):
    model = tiny_llama()
    before = state_of(model)
    adapter = tiny_adapter(tiny_llama(**sizes), "paper")
    with pytest.raises(AdapterMismatchError, match=named):
        attach(model, adapter)
    assert state_of(model) == before


def test_a_layer_that_the_model_lacks():
    model = tiny_llama()
    before = state_of(model)
    adapter = tiny_adapter(model, "paper")
    del model.model.layers[2]
    before["modules"] = state_of(model)["modules"]
    with pytest.raises(UnsupportedModelError, match="layer 2 has no attention"):
        attach(model, adapter)
    assert state_of(model)["modules"] == before["modules"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_attention_implementation_after_attaching(kind):
    model, ids, facts = tiny_llama(), random_ids(2, 6), random_facts(5)
    adapter = tiny_adapter(model, kind)
    attachment = attach(model, adapter)
    memory = facts.memory(adapter)
    expected = model(ids, knowledge=memory).logits
    AttentionInterface.register("made_up", sdpa_attention_forward)
    AttentionMaskInterface.register("made_up", sdpa_mask)
    for implementation in ("eager", "made_up", "sdpa"):
        model.set_attn_implementation(implementation)
        if implementation == "made_up":
            assert gap(model(ids).logits, tiny_llama()(ids).logits) < 1e-5
            with pytest.raises(UnsupportedModelError, match="'made_up' gives no log-sum-exp"):
                model(ids, knowledge=memory)
        else:
            assert gap(model(ids, knowledge=memory).logits, expected) < 1e-4
            assert torch.equal(model(ids).logits, tiny_llama(implementation=implementation)(ids).logits)
    model.set_attn_implementation("eager")
    attachment.detach()
    assert model.config._attn_implementation == "eager"
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert torch.equal(model(ids).logits, tiny_llama(implementation="eager")(ids).logits)
    model.set_attn_implementation("made_up")
    with pytest.raises(UnsupportedModelError, match="'made_up' gives no log-sum-exp"):
        attach(model, adapter)


class _Dropping(LlamaModel):
    """As older modelling files are written: what is not named does not go down."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        return super().forward(input_ids, attention_mask, position_ids)


def test_a_model_that_drops_keyword_arguments_is_loud():
    model, ids = tiny_llama(), random_ids(1, 5)
    model.model.__class__ = _Dropping
    adapter = tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    plain = model(ids).logits
    with pytest.raises(UnsupportedModelError, match=r"did not reach the attention of layers \[0, 2\]"):
        model(ids, knowledge=random_facts(5).memory(adapter))
    assert torch.equal(model(ids).logits, plain)
    attachment.detach()


def test_knowledge_is_given_to_the_model_and_not_to_a_part_of_it():
    model = tiny_llama()
    adapter = tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    with pytest.raises(InputError, match="to a part of the base model"):
        model.model(random_ids(1, 5), knowledge=random_facts(5).memory(adapter))
    attachment.detach()


@pytest.mark.parametrize("detach_first", [False, True])
def test_the_base_model_is_not_kept_alive(detach_first):
    model = tiny_llama()
    adapter = tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    memory = random_facts(5).memory(adapter)
    with attachment.using(memory):
        model(random_ids(1, 4))
    gone = [weakref.ref(model), weakref.ref(model.model.layers[0].self_attn)]
    if detach_first:
        attachment.detach()
    del model
    gc.collect()
    assert gone[0]() is None
    if not detach_first:
        with pytest.raises(AdapterMismatchError, match="the base model is gone"):
            _ = attachment.base_model
        attachment.detach()
    gc.collect()
    assert gone[1]() is None
    with pytest.raises(AdapterMismatchError, match="was detached"):
        _ = attachment.base_model


def test_an_attached_model_is_saved_as_the_base_model(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 5)
    adapter = tiny_adapter(model, "paper")
    model.save_pretrained(tmp_path / "plain")
    attachment = attach(model, adapter)
    model(ids, knowledge=random_facts(5).memory(adapter))
    model.save_pretrained(tmp_path / "attached")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "attached").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    attachment.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_an_attached_model_is_a_base_model(kind):
    model, ids, facts = tiny_llama(), random_ids(2, 5), random_facts(5)
    plain, before = model(ids).logits, state_of(tiny_llama())
    adapter = tiny_adapter(model, kind)
    attachment = attach(model, adapter)
    memory = facts.memory(adapter)
    expected = model(ids, knowledge=memory).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, plain)
    with pytest.raises(AdapterMismatchError, match="not attached"):
        copied(ids, knowledge=memory)
    with attachment.using(memory):  # in the one, not in the other
        assert torch.equal(copied(ids).logits, plain)
    # Neither hears of what is done to the other.
    for parameter in copied.parameters():
        parameter.mul_(1.1)
    other = tiny_adapter(model, "paper", kb_layer_frequency=None, kb_layers=[1])
    second = attach(copied, adapter)
    third = attach(copied, other)
    changed = copied(ids, knowledge=memory).logits
    assert gap(changed, plain_logits(copied, adapter, ids, facts)) < 1e-4
    assert torch.equal(model(ids, knowledge=memory).logits, expected)
    attachment.detach()
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(copied(ids, knowledge=memory).logits, changed)
    second.detach()
    third.detach()
    after = state_of(copied)
    for name, module in before["modules"].items():
        assert after["modules"][name][0] == module[0], name
        assert after["modules"][name][2:] == module[2:], name
    assert all(layer.self_attn.config is copied.config for layer in copied.model.layers)


def test_a_copy_of_a_part_of_an_attached_model():
    model, ids = tiny_llama(), random_ids(2, 5)
    attachment = attach(model, tiny_adapter(model, "paper"))
    part = copy.deepcopy(model.model)
    assert torch.equal(part(ids).last_hidden_state, model.model(ids).last_hidden_state)
    attachment.detach()
    assert torch.equal(part(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_copying_an_attachment_copies_model_and_adapter(kind):
    model, ids, facts = tiny_llama(), random_ids(2, 5), random_facts(5)
    adapter = tiny_adapter(model, kind)
    attachment = attach(model, adapter)
    expected = model(ids, knowledge=facts.memory(adapter)).logits
    together = copy.deepcopy({"model": model, "attachment": attachment, "adapter": adapter})
    copied = together["attachment"]
    assert copied.base_model is together["model"] is not model
    assert copied.adapter is together["adapter"] is not adapter
    attachment.detach()
    assert torch.equal(together["model"](ids, knowledge=facts.memory(copied.adapter)).logits, expected)
    copied.detach()
    assert copy.deepcopy(copied).adapter is not copied.adapter


def test_the_other_layers_keep_the_models_own_attention():
    """Only KB layers go through our function."""
    model = tiny_llama()
    adapter = tiny_adapter(model, "paper", kb_layer_frequency=None, kb_layers=[1])
    attachment = attach(model, adapter)
    marked = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    assert marked == ["sdpa", "kblam_ray", "sdpa"]
    assert model.config._attn_implementation == "sdpa"
    attachment.detach()


def test_attention_weights_are_the_texts_share():
    model, ids, facts = tiny_llama(implementation="eager"), random_ids(2, 5), random_facts(5)
    adapter = tiny_adapter(model, "paper")
    attachment = attach(model, adapter)
    weights = model(ids, knowledge=[facts.memory(adapter), None], output_attentions=True).attentions
    text_share = weights[0].sum(-1)
    assert text_share[0].lt(0.99).all()
    torch.testing.assert_close(text_share[1], torch.ones_like(text_share[1]))
    torch.testing.assert_close(weights[1].sum(-1), torch.ones_like(text_share))
    attachment.detach()
