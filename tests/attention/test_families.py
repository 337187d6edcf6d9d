"""One behaviour for every model family and both adapter kinds, against one softmax over [facts | text] in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers as hf
from families import (
    FAMILIES,
    INKLING,
    PLAIN,
    VOCABULARY,
    Facts,
    Family,
    PlainAdapter,
    PlainModel,
    attached,
    random_adapter,
)
from torch import nn

from kblam_ray.attention import BaseShape, KnowledgeAdapter, KnowledgeMemory, attach
from kblam_ray.errors import UnsupportedModelError

EXACT = 5e-5
"""float32 beside float64: the models alone differ by up to 4e-6 in logits of size 1 to 4."""

NEW_TOKENS = 5
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


@dataclass
class Case:
    """A family's model and an adapter of one kind, three prompts and what each of them attends to."""

    family: Family
    kind: str
    models: dict[str, hf.PreTrainedModel] = field(init=False)
    adapter: KnowledgeAdapter = field(init=False)
    plain: PlainModel = field(init=False)

    def __post_init__(self) -> None:
        self.models = {name: self.family.model(implementation=name) for name in ("sdpa", "eager")}
        self.adapter = random_adapter(self.model.config, self.kind, self.family.kb_layers, kb_scale=5.0)
        self.plain = PlainModel(
            self.family.model(dtype=torch.float64, implementation=PLAIN), PlainAdapter.of(self.adapter)
        )

    @property
    def model(self) -> hf.PreTrainedModel:
        return self.models["sdpa"]

    @cached_property
    def greedy_answers(self) -> torch.Tensor:
        """What the plain formula generates for the three prompts, without any cache."""
        return self.plain.generate(**padded("left"), facts=ROW_FACTS, **GREEDY, use_cache=False)

    def memories(self, **options: Any) -> list[KnowledgeMemory | None]:
        return [None if facts is None else facts.memory(self.adapter, **options) for facts in ROW_FACTS]

    def trainable_adapter(self) -> KnowledgeAdapter:
        return KnowledgeAdapter.of_tensors(self.adapter.config, self.adapter.state_dict()).train()


SHARED_FACTS = Facts.random(12, seed=3)
ROW_FACTS = [Facts.random(7, seed=4), None, Facts.random(3, seed=5, has_prior=True)]
"""What each of the three prompts attends to: 7 facts, none, 3 facts with a prior."""

PROMPTS = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(6))
NUM_TOKENS = [9, 7, 5]


def padded(side: str) -> dict[str, torch.Tensor]:
    """The three prompts padded to one length, and their mask."""
    input_ids, mask = torch.zeros_like(PROMPTS), torch.zeros_like(PROMPTS)
    for row, length in enumerate(NUM_TOKENS):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        input_ids[row, place], mask[row, place] = PROMPTS[row, :length], 1
    return {"input_ids": input_ids, "attention_mask": mask}


def prompt(row: int) -> dict[str, torch.Tensor]:
    input_ids = PROMPTS[row : row + 1, : NUM_TOKENS[row]]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.fixture(
    scope="module",
    params=[(family, kind) for family in FAMILIES for kind in ("paper", "shared")],
    ids=lambda param: f"{param[0].name}-{param[1]}",
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_knowledge_it_is_the_base_model_to_the_bit(case: Case, implementation: str):
    model = case.models[implementation]
    inputs = padded("left")

    def outputs(context: Callable = nullcontext, knowledge: Any = None) -> list[torch.Tensor]:
        with torch.no_grad(), context(knowledge):
            generated = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
            return [model(**inputs).logits, generated.sequences, *generated.logits]

    expected = outputs()
    with attached(model, case.adapter) as attachment, torch.no_grad():
        empty = Facts.random(0).memory(case.adapter)
        assert _equal(outputs(), expected)
        assert _equal(outputs(attachment.using, [None, empty, None]), expected)
        for knowledge in (None, empty, [None, empty, None]):
            assert torch.equal(model(**inputs, knowledge=knowledge).logits, expected[0])
        knowledge = SHARED_FACTS.memory(case.adapter)
        assert (model(**inputs, knowledge=knowledge).logits - expected[0]).abs().mean() > 0.1
    assert _equal(outputs(), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_without_knowledge_in_a_mixed_batch_are_the_base_models_to_the_bit(case: Case, implementation: str):
    model, inputs = case.models[implementation], padded("left")
    memory = SHARED_FACTS.memory(case.adapter)
    with torch.no_grad():
        expected = model(**inputs).logits
        with attached(model, case.adapter):
            logits = model(**inputs, knowledge=[None, memory, Facts.random(0).memory(case.adapter)]).logits
    # Experts multiply the tokens that chose them together, so that the last bits depend on the other rows there.
    same = _close if hasattr(model.config, "num_experts_per_tok") else torch.equal
    assert same(logits[[0, 2]], expected[[0, 2]])
    assert (logits[1] - expected[1]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("implementation", "form", "side"),
    [
        ("sdpa", "latent", "left"),
        ("sdpa", "materialized", "right"),
        ("eager", "latent", "right"),
        ("eager", "materialized", "left"),
    ],
)
def test_logits_are_those_of_one_softmax_over_facts_and_text(case: Case, implementation: str, form: str, side: str):
    model, inputs = case.models[implementation], padded(side)
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad(), attached(model, case.adapter):
        for facts, memory in (
            (SHARED_FACTS, SHARED_FACTS.memory(case.adapter, form=form, chunk_rows=5)),
            (ROW_FACTS, case.memories(form=form)),
        ):
            expected = case.plain.logits(**inputs, facts=facts)
            logits = model(**inputs, knowledge=memory).logits
            assert _close(logits[tokens], expected[tokens])
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize("form", ["latent", "materialized"])
def test_generation_is_the_same_with_any_cache_and_with_none(case: Case, form: str):
    inputs = padded("left")
    expected = case.greedy_answers
    assert not torch.equal(expected, case.model.generate(**inputs, **GREEDY))
    with attached(case.model, case.adapter) as attachment, attachment.using(case.memories(form=form)):
        assert torch.equal(case.model.generate(**inputs, **GREEDY), expected)
        assert torch.equal(case.model.generate(**inputs, **GREEDY, use_cache=False), expected)
        assert torch.equal(case.model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


def test_a_row_alone_generates_what_it_generates_in_a_batch(case: Case):
    memories = case.memories()
    with attached(case.model, case.adapter) as attachment:
        for row, memory in enumerate(memories):
            with attachment.using(memory):
                alone = case.model.generate(**prompt(row), **GREEDY)[0, NUM_TOKENS[row] :]
            assert torch.equal(alone, case.greedy_answers[row, PROMPTS.shape[1] :])


def test_beam_search_keeps_each_rows_knowledge(case: Case):
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    memories = case.memories()
    with attached(case.model, case.adapter) as attachment:
        with attachment.using(memories):
            together = case.model.generate(**padded("left"), **options)[:, PROMPTS.shape[1] :]
        for row, memory in enumerate(memories):
            with attachment.using(memory):
                alone = case.model.generate(**prompt(row), **options)[:, NUM_TOKENS[row] :]
            assert torch.equal(together[2 * row : 2 * row + 2], alone)
    expected = case.plain.generate(**padded("left"), facts=ROW_FACTS, **options)
    assert torch.equal(together, expected[:, PROMPTS.shape[1] :])


def test_several_samples_of_a_prompt_share_its_knowledge(case: Case):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with attached(case.model, case.adapter) as attachment, attachment.using(case.memories()):
        samples = case.model.generate(**padded("left"), **options)
    # With one candidate per token a sample is the greedy answer.
    assert torch.equal(samples, case.greedy_answers.repeat_interleave(2, 0))


def test_bfloat16_is_as_close_as_the_base_model_is_in_bfloat16(case: Case):
    """A number of bfloat16 is rounded by up to 1/256 of itself. How much of that arrives in the logits depends on the
    model, so the yardstick is the base model's own error beside float64, on the same prompts and weights: attending to
    facts adds two rounded products per KB layer to the dozens that each layer has, and may not double it."""
    inputs, tokens = padded("left"), padded("left")["attention_mask"].bool()
    model = case.family.model(dtype=torch.bfloat16)
    exact = case.family.model(dtype=torch.float64, implementation=PLAIN)
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    adapter = KnowledgeAdapter.of_tensors(
        case.adapter.config, {name: tensor.bfloat16() for name, tensor in case.adapter.state_dict().items()}
    )
    plain = PlainModel(exact, PlainAdapter.of(adapter))
    facts = Facts(SHARED_FACTS.keys_MP.bfloat16(), SHARED_FACTS.values_MP.bfloat16())

    def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
        # The median: an expert chosen otherwise because of a rounding changes its token altogether.
        return (logits.double() - expected)[tokens].abs().median().item()

    with torch.no_grad(), attached(model, adapter):
        of_base_model = error(model(**inputs).logits, plain.logits(**inputs, facts=None))
        expected = plain.logits(**inputs, facts=facts)
        for form in ("latent", "materialized"):
            logits = model(**inputs, knowledge=facts.memory(adapter, form=form)).logits
            assert logits.dtype == torch.bfloat16
            assert error(logits, expected) < 2 * of_base_model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_reach_the_adapter_with_and_without_checkpointing(case: Case, is_checkpointed: bool):
    inputs, labels = padded("right"), _labels(padded("right"))
    plain_adapter = PlainAdapter.of(case.adapter, requires_grad=True)
    plain = PlainModel(case.family.model(dtype=torch.float64, implementation=PLAIN), plain_adapter)
    plain.facts = ROW_FACTS
    expected = plain.base_model(**inputs, labels=labels).loss
    expected.backward()

    model, adapter = case.family.model().train(), case.trainable_adapter()
    runs: list[None] = []
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    attention.register_forward_hook(lambda *_: runs.append(None))
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with attached(model, adapter):
        memories = [None if facts is None else facts.memory(adapter) for facts in ROW_FACTS]
        loss = model(**inputs, labels=labels, use_cache=False, knowledge=memories).loss
        loss.backward()
    assert len(runs) == 1 + is_checkpointed
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in adapter.named_parameters():
        exact = plain_adapter.tensors[name].grad
        assert exact.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", ["paper", "shared"])
def test_reentrant_checkpointing_which_loses_gradients_is_refused(kind: str):
    case = Case(FAMILIES[0], kind)
    model, adapter = case.family.model().train(), case.trainable_adapter()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    inputs = padded("right")
    with attached(model, adapter), pytest.raises(UnsupportedModelError, match="use_reentrant"):
        model(**inputs, labels=_labels(inputs), use_cache=False, knowledge=SHARED_FACTS.memory(adapter))


def test_inference_mode_gives_the_same_and_leaves_nothing_behind_that_training_cannot_use(case: Case):
    inputs, tokens = padded("left"), padded("left")["attention_mask"].bool()
    adapter = case.trainable_adapter()
    with attached(case.model, adapter):
        with torch.inference_mode():
            memories = [
                SHARED_FACTS.memory(adapter, form=form, chunk_rows=5).select(range(9))
                for form in ("latent", "materialized")
            ]
            inferred = [case.model(**inputs, knowledge=memory).logits for memory in memories]
        for memory, logits in zip(memories, inferred, strict=True):
            with torch.no_grad():
                assert torch.equal(case.model(**inputs, knowledge=memory).logits, logits)
            trained = case.model(**inputs, knowledge=memory, use_cache=False).logits
            assert _close(trained[tokens], logits[tokens])
            trained.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapter.parameters())


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
UNSUPPORTED = {
    "soft-capping": (hf.Gemma2Config(**SIZES, head_dim=8), "capped"),
    "sinks": (hf.GptOssConfig(**SIZES, head_dim=8), "sinks"),
    "sinks of each token": (hf.Inkling2TextConfig(**SIZES, **INKLING), "sinks"),
    "a head dimension of each layer": (
        hf.Gemma4TextConfig(
            **SIZES,
            head_dim=8,
            global_head_dim=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
        "head_dim of their own",
    ),
    "encoder-decoder": (
        hf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4),
        "decoder",
    ),
    "values of another width": (
        hf.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4},
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=24,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "head",
    ),
    "no attention interface": (
        hf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
        "attention interface",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_attention_that_cannot_be_merged_with_is_refused_when_attaching(name: str):
    config, reason = UNSUPPORTED[name]
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model = auto.from_config(config)
    shape = BaseShape(model_type=config.model_type, hidden_size=32, num_layers=3, num_heads=4, head_dim=8)
    before = _state(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        attach(model, random_adapter(shape, "shared", (0, 2)))
    assert _state(model) == before


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager"])
def test_implementations_without_a_log_sum_exp_are_refused_when_attaching(implementation: str):
    model = FAMILIES[0].model()
    # As the library does when it loads a model so; its flash kernels are not needed to see that.
    model.config._attn_implementation = implementation
    with pytest.raises(UnsupportedModelError, match=re.escape(repr(implementation))) as raised:
        attach(model, random_adapter(model.config, "paper", (0, 2)))
    assert "sdpa" in raised.value.help


def test_terms_of_a_softmax_that_are_not_in_its_log_sum_exp_are_refused():
    config = hf.InklingTextConfig(**SIZES, **INKLING, eos_token_id=None)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    adapter = random_adapter(model.config, "paper", (0, 2))
    with attached(model, adapter), torch.no_grad():
        before = model(PROMPTS).logits
        with pytest.raises(UnsupportedModelError, match="position_bias"):
            model(PROMPTS, knowledge=SHARED_FACTS.memory(adapter))
        assert torch.equal(model(PROMPTS).logits, before)


def _labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)


def _state(model: nn.Module) -> list[tuple]:
    """What attaching changes in modules: hooks and configurations."""
    return [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks), id(getattr(module, "config", None)))
        for name, module in model.named_modules()
    ]


def _equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found.double() - expected.double()).abs().max().item() < EXACT
