"""Which decoders are attached to and how: families whose layers are built in their own ways, and those refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from families import (
    INKLING,
    PLAIN,
    VOCABULARY,
    Facts,
    Family,
    PlainAdapter,
    PlainModel,
    attached,
    random_adapter,
    tiny_model,
)
from torch import nn

from kblam_ray.attention import attach
from kblam_ray.attention.decoder import attention_modules, decoder_layer_of, mixes_tokens_later
from kblam_ray.errors import InputError, UnsupportedModelError

EXACT = 5e-5
FACTS = Facts.random(7, seed=4)
PROMPTS = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(6))
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

OTHERS = [
    # Layers that get keyword arguments and give their attention none of them.
    Family("stablelm", hf.StableLmConfig),
    Family("nemotron", hf.NemotronConfig),
    # Take a view of the attention's output, as the library's functions give it.
    Family("afmoe", hf.AfmoeConfig, settings={**MOE, "head_dim": 8, "layer_types": ["full_attention"] * 3}),
    # Calls its output projection the decoder.
    Family("modernbert_decoder", hf.ModernBertDecoderConfig, grouped=False),
    # Only some of its layers have attention; the others are recurrent.
    Family(
        "qwen3_next",
        hf.Qwen3NextConfig,
        kb_layers=(2,),
        settings={
            **MOE,
            **{"head_dim": 8, "shared_expert_intermediate_size": 24},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
]


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
@pytest.mark.parametrize("kind", ["paper", "shared"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_families_of_other_builds_attend_to_facts(family: Family, kind: str, implementation: str):
    torch.manual_seed(0)
    model = family.model(implementation=implementation)
    adapter = random_adapter(model.config, kind, family.kb_layers, kb_scale=5.0)
    exact = family.model(dtype=torch.float64, implementation=PLAIN)
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    plain = PlainModel(exact, PlainAdapter.of(adapter))
    with torch.no_grad():
        base = model(PROMPTS).logits
        expected = plain.logits(PROMPTS, FACTS)
        with attached(model, adapter) as attachment:
            assert torch.equal(model(PROMPTS).logits, base)
            memory = FACTS.memory(adapter)
            assert (model(PROMPTS, knowledge=memory).logits - expected).abs().max() < EXACT
            with attachment.using(memory):
                answer = model.generate(PROMPTS, max_new_tokens=4, do_sample=False)
            assert torch.equal(answer, plain.generate(PROMPTS, FACTS, max_new_tokens=4, do_sample=False))
        assert torch.equal(model(PROMPTS).logits, base)


@pytest.mark.parametrize(
    "keep",
    [
        1,
        4,
        torch.tensor([0, -2]),
        torch.arange(9) % 4 == 1,
        torch.tensor([[1, 8], [0, 3], [5, 4]]),
        torch.eye(3, 9, dtype=torch.bool),
        [2, 7],
    ],
    ids=["last", "last four", "places", "mask", "places per row", "mask per row", "list"],
)
@pytest.mark.parametrize("mixes_later", [False, True], ids=["llama", "convolutions after attention"])
def test_logits_of_some_tokens_however_they_are_named(keep: Any, mixes_later: bool):
    config = Family("llama", hf.LlamaConfig).config()
    if mixes_later:
        config = Family("inkling", hf.InklingTextConfig, settings=INKLING).config()
    model = tiny_model(config)
    adapter = random_adapter(config, "paper", (0, 2))
    with torch.no_grad(), attached(model, adapter):
        memory = FACTS.memory(adapter)
        whole = model(PROMPTS, knowledge=memory).logits
        logits = model(PROMPTS, knowledge=memory, logits_to_keep=keep).logits
    numbers = torch.arange(whole.shape[0] * whole.shape[1]).view(whole.shape[:2])
    if isinstance(keep, int):
        kept = numbers[:, -keep:]
    elif isinstance(keep, torch.Tensor) and keep.dim() == 2:
        kept = numbers[keep] if keep.dtype == torch.bool else numbers.take_along_dim(keep, 1)
    else:
        kept = numbers[:, keep]
    assert torch.allclose(logits, whole.flatten(0, 1)[kept], atol=1e-5)
    layer = decoder_layer_of(model, attention_modules(model)[2])
    assert mixes_tokens_later(layer, layer.self_attn) == mixes_later


def test_cross_attention_is_not_attached_to():
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, add_cross_attention=True
    )
    model = tiny_model(config)
    modules = attention_modules(model)
    assert all(modules[layer] is block.attn for layer, block in enumerate(model.transformer.h))
    adapter = random_adapter(config, "shared", (0, 2))
    with torch.no_grad(), attached(model, adapter):
        changed = model(PROMPTS, knowledge=FACTS.memory(adapter)).logits - model(PROMPTS).logits
        assert changed.abs().mean() > 0.1


class _Looped(nn.Module):
    """Two stacks of layers that count from 0 each."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def test_layers_that_are_not_one_stack_are_refused():
    model = Family("llama", hf.LlamaConfig).model()
    adapter = random_adapter(model.config, "paper", (0, 2))
    layers = model.model.layers
    model.model.layers = nn.ModuleList([_Looped(layers[0], layers[1]), layers[2]])
    layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match="layer 0 has several attentions"):
        attach(model, adapter)


def test_a_layer_that_runs_twice_in_one_pass_is_refused():
    model = Family("llama", hf.LlamaConfig).model()
    adapter = random_adapter(model.config, "paper", (0, 2))
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 4
    with torch.no_grad():
        base = model(PROMPTS, use_cache=False).logits
        model.config.num_hidden_layers = 3
        attachment = attach(model, adapter)
        model.config.num_hidden_layers = 4
        with pytest.raises(UnsupportedModelError, match="several times in one pass"):
            model(PROMPTS, knowledge=FACTS.memory(adapter), use_cache=False)
        assert torch.equal(model(PROMPTS, use_cache=False).logits, base)
        attachment.detach()


def test_a_layer_that_sees_other_tokens_than_were_given_is_refused():
    model = Family("gpt_neox", hf.GPTNeoXConfig, grouped=False).model()
    adapter = random_adapter(model.config, "shared", (0, 2))
    seen = model.gpt_neox.layers[2].input_layernorm
    seen.register_forward_hook(lambda _, args, out: out[:1])
    memory = FACTS.memory(adapter)
    with torch.no_grad(), attached(model, adapter), pytest.raises(UnsupportedModelError, match="9 tokens of the 27"):
        model(PROMPTS, knowledge=memory, use_cache=False)


def test_guesses_made_by_the_first_layers_are_judged_by_all():
    model = Family("llama", hf.LlamaConfig).model()
    adapter = random_adapter(model.config, "paper", (0, 2))
    options = {"max_new_tokens": 6, "do_sample": False}
    with attached(model, adapter) as attachment, attachment.using(FACTS.memory(adapter)):
        expected = model.generate(PROMPTS[:1], **options)
        assert torch.equal(model.generate(PROMPTS[:1], assistant_early_exit=1, **options), expected)
        assert torch.equal(model.generate(PROMPTS[:1], prompt_lookup_num_tokens=2, **options), expected)


def test_what_is_no_model_or_no_adapter_is_refused():
    model = Family("llama", hf.LlamaConfig).model()
    adapter = random_adapter(model.config, "shared", (0, 2))
    wrong: list[tuple[Any, Any]] = [(torch.compile(model), adapter), (nn.Linear(2, 2), adapter), (model, "adapter")]
    for given in wrong:
        with pytest.raises(InputError, match=r"is no (PreTrainedModel|KnowledgeAdapter) \(attach\)"):
            attach(*given)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_base_model_attends_to_facts():
    """On a GPU, `generate` compiles by itself when its cache is static."""
    model = Family("llama", hf.LlamaConfig).model()
    adapter = random_adapter(model.config, "shared", (0, 2))
    options = {"max_new_tokens": 4, "do_sample": False}
    compile_config = hf.CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    compiled = torch.compile(model, backend="eager")
    try:
        with torch.no_grad(), attached(model, adapter) as attachment:
            memory, base = FACTS.memory(adapter), model(PROMPTS).logits
            expected = model(PROMPTS, knowledge=memory).logits
            assert torch.allclose(compiled(PROMPTS, knowledge=memory).logits, expected, atol=1e-6)
            assert torch.allclose(compiled(PROMPTS).logits, base, atol=1e-6)
            with attachment.using([memory, None, memory]):
                answer = model.generate(PROMPTS, **options)
                options |= {"cache_implementation": "static", "compile_config": compile_config}
                assert torch.equal(model.generate(PROMPTS, **options), answer)
    finally:
        torch.compiler.reset()
