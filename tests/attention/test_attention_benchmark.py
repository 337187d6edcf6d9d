"""The parts of the attention benchmark: the rival is the paper's formula, estimates hold, nothing is counted wrong."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from kblam_ray.attention import KnowledgeMemory, attach
from kblam_ray.attention.benchmark import AttentionBenchmark, benchmark_attention, refresh, run
from kblam_ray.attention.benchmark.cases import Case, CaseBytes, case_bytes, cases_of, side_by_side
from kblam_ray.attention.benchmark.machine import Machine
from kblam_ray.attention.benchmark.memory_changes import random_embeddings
from kblam_ray.attention.benchmark.published import PublishedMemory, published_attention
from kblam_ray.attention.benchmark.random_model import (
    adapter_config,
    llama_config,
    num_parameters,
    random_adapter,
    random_llama,
)
from kblam_ray.attention.benchmark.settings import auto_rule
from kblam_ray.attention.benchmark.turns import Prompt, Times, measure_in_turns
from kblam_ray.attention.benchmark.ways import NoFacts, get_ready
from kblam_ray.attention.memory import choose_form
from kblam_ray.errors import InputError, MissingDependencyError

CPU = torch.device("cpu")
DIM = 24


@pytest.fixture(scope="module")
def base_model():
    return random_llama(llama_config("tiny"), CPU, torch.float32)


def settings(**given):
    return AttentionBenchmark(shape="tiny", dtype="float32", dim=DIM, prompt_tokens=6, rounds=2, **given)


def adapter(kind, *, dtype=torch.float32, dim=DIM, frequency=3, kb_scale=7.0):
    config = adapter_config(llama_config("tiny"), kind, dim=dim, kb_layer_frequency=frequency, kb_scale=kb_scale)
    return random_adapter(config, CPU, dtype)


def prompt(base_model, *, num_tokens=6, decode_steps=3):
    return Prompt(base_model, Machine("cpu"), num_tokens=num_tokens, decode_steps=decode_steps, seed=0)


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("form", ["latent", "materialized"])
def test_the_rival_computes_what_kind_paper_computes(base_model, form, frequency):
    paper = adapter("paper", frequency=frequency)
    keys_MP, values_MP = random_embeddings(37, DIM, seed=3)
    keys_MP, values_MP = 4 * keys_MP, 4 * values_MP
    tokens_BT = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))
    bare = base_model(tokens_BT).logits
    with published_attention(base_model, PublishedMemory.of(paper, keys_MP, values_MP, torch.float32)):
        rival = base_model(tokens_BT, use_cache=True)
        rival_next = base_model(tokens_BT[:, :1], past_key_values=rival.past_key_values).logits
    assert torch.equal(base_model(tokens_BT).logits, bare)
    attachment = attach(base_model, paper)
    memory = KnowledgeMemory.from_embeddings(paper, keys_MP, values_MP, form=form)
    ours = base_model(tokens_BT, use_cache=True, knowledge=memory)
    ours_next = base_model(tokens_BT[:, :1], past_key_values=ours.past_key_values, knowledge=memory).logits
    attachment.detach()
    assert (ours.logits - bare).abs().max() > 0.1
    torch.testing.assert_close(rival.logits, ours.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(rival_next, ours_next, atol=1e-4, rtol=0)


def test_the_rival_sees_masks_as_the_library_does(base_model):
    paper = adapter("paper")
    facts = PublishedMemory.of(paper, *random_embeddings(5, DIM), torch.float32)
    tokens_BT = torch.randint(256, (1, 7), generator=torch.Generator().manual_seed(1))
    padded_BT = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens_BT], 1)
    mask_BT = (torch.arange(10) >= 3).long()[None]
    with published_attention(base_model, facts):
        expected = base_model(tokens_BT).logits
        padded = base_model(padded_BT, attention_mask=mask_BT, position_ids=(torch.arange(10) - 3).clamp_min(0)[None])
    torch.testing.assert_close(padded.logits[:, 3:], expected, atol=1e-5, rtol=0)


def test_a_random_base_model_is_what_the_library_would_have_made(base_model):
    made = LlamaForCausalLM(llama_config("tiny"))
    assert dict(base_model.named_buffers()).keys() == dict(made.named_buffers()).keys()
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, base_model.get_buffer(name)), name
    assert sum(parameter.numel() for parameter in base_model.parameters()) == num_parameters(llama_config("tiny"))
    for name, parameter in made.named_parameters():
        ours = base_model.get_parameter(name)
        assert ours.shape == parameter.shape
        assert ours.std() > 0 if ours.dim() == 2 else bool((ours == 1).all())
    again = random_llama(llama_config("tiny"), CPU, torch.float32)
    assert torch.equal(again.lm_head.weight, base_model.lm_head.weight)


@pytest.mark.parametrize(("shape", "billions"), [("llama-1b", 1.1), ("llama-8b", 8.0)])
def test_the_large_shapes_have_their_size(shape, billions):
    assert num_parameters(llama_config(shape)) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("num_facts", [1, 900, 20_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_case_holds_is_estimated_well(num_facts, dtype):
    given = settings(num_facts=[num_facts]).model_copy(update={"dtype": dtype})
    keys_MP, values_MP = random_embeddings(num_facts, DIM)
    cases = cases_of(given, num_facts)
    assert [(case.kind, case.form) for case in cases] == [
        ("shared", "latent"),
        ("paper", "latent"),
        ("shared", "materialized"),
        ("paper", "materialized"),
        ("paper", "published"),
    ]
    for case in cases:
        owner = adapter(case.kind, dtype=given.torch_dtype)
        way = get_ready(case, owner, keys_MP, values_MP, given.torch_dtype, given.torch_memory_dtype)
        estimate = case_bytes(case, owner.config, given)
        assert way.nbytes <= estimate.held <= 1.1 * way.nbytes, case
        assert estimate.working > 0


def test_adapters_and_memories_may_have_a_dtype_of_their_own():
    both = settings(num_facts=[9]).model_copy(update={"dtype": "bfloat16"})
    assert (both.torch_adapter_dtype, both.torch_memory_dtype) == (torch.bfloat16, torch.bfloat16)
    assert settings(num_facts=[9]).torch_memory_dtype == torch.float16
    own = both.model_copy(update={"adapter_dtype": "float32", "memory_dtype": "float32", "apply_changes": 0})
    summary = benchmark_attention(own)
    assert len(summary["cases"]) == 5
    nbytes = {(row["kind"], row["form"]): row["nbytes"] for row in summary["cases"]}
    assert nbytes["shared", "latent"] == 9 * (2 * 4 * DIM + 8)
    assert nbytes["paper", "published"] == 9 * 2 * 2 * 64 * 2


def test_cases_share_a_group_while_they_fit_together():
    cases = [Case("paper", "latent", size) for size in range(5)]
    sizes = [CaseBytes(30, 10), CaseBytes(30, 40), CaseBytes(1, 1), CaseBytes(90, 20), CaseBytes(90, 10)]
    groups, skipped = side_by_side(list(zip(cases, sizes, strict=True)), 100)
    assert groups == [cases[:2], [cases[2]], [cases[4]]]
    assert [item.case for item in skipped] == [cases[3]]
    assert "0.0 GB" in skipped[0].reason
    assert side_by_side(list(zip(cases, sizes, strict=True)), None) == ([cases], [])


def test_the_rule_of_auto_is_the_one_that_memories_follow():
    for kind, rule in auto_rule().items():
        owner = adapter(kind)
        if found := re.fullmatch(r"always (\w+)", rule):
            assert {choose_form(owner, 10**power) for power in range(9)} == {found[1]}
        else:
            found = re.fullmatch(r"(\w+) up to ([\d,]+) facts, (\w+) above", rule)
            last = int(found[2].replace(",", ""))
            assert (choose_form(owner, last), choose_form(owner, last + 1)) == (found[1], found[3])


def test_ratios_are_taken_within_each_round():
    times = Times([1.0, 8.0, 3.0], [0.2, 0.4, 0.6], [1.0, 2.0, 1.0], [0.1, 0.1, 0.1], 3_000_000)
    found = times.summary()
    assert (found["prefill_ms"], found["no_kb_prefill_ms"], found["prefill_ratio"]) == (3000, 1000, 3)
    assert (found["decode_ms"], found["no_kb_decode_ms"], found["decode_ratio"]) == (400, 100, 4)
    assert (found["decode_ratio_smallest"], found["decode_ratio_largest"]) == (2, 6)
    assert found["peak_device_mb"] == 3


def test_every_decode_step_is_on_a_cache_of_the_prompts_length(base_model):
    seen = []

    def look(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        seen.append((args[0].shape[1], 0 if cache is None else cache.get_seq_length()))

    hook = base_model.register_forward_pre_hook(look, with_kwargs=True)
    case = Case("shared", "latent", 5)
    way = get_ready(case, adapter("shared"), *random_embeddings(5, DIM), torch.float32, torch.float16)
    (times,) = measure_in_turns(prompt(base_model), [way], 2, Machine("cpu"))
    hook.remove()
    # A turn without facts and one with, first for nothing, then in each of two rounds.
    assert seen == 6 * [(6, 0), (1, 6), (1, 6), (1, 6)]
    assert len(times.prefill_s) == len(times.bare_decode_s) == 2


def test_a_turn_without_facts_is_one_of_the_base_model_alone(base_model):
    with NoFacts().attached(base_model) as knowledge:
        assert knowledge == {}
        assert not base_model._forward_pre_hooks
    way = get_ready(
        Case("shared", "latent", 5), adapter("shared"), *random_embeddings(5, DIM), torch.float32, torch.float16
    )
    with way.attached(base_model):
        assert base_model._forward_pre_hooks
    assert not base_model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["paper", "shared"])
def test_old_versions_that_stay_are_counted(base_model, kind, monkeypatch):
    def measure():
        return refresh.measure_refresh(
            adapter(kind), prompt(base_model), Machine("cpu"), torch.float32, torch.float16,
            num_facts=60, num_applies=45, rounds=2, seed=0,
        )  # fmt: skip

    found = measure()
    assert (found["num_facts"], found["num_applies"], found["old_versions_watched"]) == (60, 45, 45)
    assert (found["old_versions_alive"], found["old_chunks_alive"]) == (0, 0)
    assert found["old_chunks_watched"] > 0
    assert len(found["decode_ratios"]) == 2
    assert found["bytes"]["ratio"] == pytest.approx(found["bytes"]["after"] / found["bytes"]["fresh"], abs=1e-3)

    kept = []
    apply = refresh.apply_one_by_one
    monkeypatch.setattr(refresh, "apply_one_by_one", lambda memory, *rest: kept.append(memory) or apply(memory, *rest))
    found = measure()
    assert found["old_versions_alive"] == 45
    assert found["old_chunks_alive"] == found["old_chunks_watched"] > 0


def test_the_fresh_load_holds_the_same_facts(base_model):
    memory = KnowledgeMemory.from_embeddings(adapter("paper"), *random_embeddings(50, DIM), version=0)
    after = refresh.apply_one_by_one(memory, 20)
    fresh = refresh._fresh(after)
    assert len(fresh.views) == 1 < len(after.views)
    assert fresh.fact_ids.tolist() == after.fact_ids.tolist()
    attachment = attach(base_model, after.adapter)
    tokens_BT = torch.arange(6)[None]
    logits = [base_model(tokens_BT, knowledge=one).logits for one in (fresh, after, memory)]
    attachment.detach()
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert not torch.allclose(logits[0], logits[2], atol=1e-5, rtol=0)


def test_a_case_that_the_device_cannot_hold_is_skipped_and_the_others_are_measured(monkeypatch):
    measure = run.measure_in_turns
    together = []

    def measure_or_fail(prompt_, ways, *rest):
        together.append(len(ways))
        if any(way.nbytes > 100_000 for way in ways):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(prompt_, ways, *rest)

    monkeypatch.setattr(run, "measure_in_turns", measure_or_fail)
    given = settings(num_facts=[300], kind=["paper"], apply_changes=0)
    summary = benchmark_attention(given)
    assert together == [3, 1, 1, 1]
    assert [row["form"] for row in summary["cases"]] == ["latent"]
    assert [(row["form"], row["reason"]) for row in summary["skipped"]] == [
        ("materialized", "the device ran out of memory"),
        ("published", "the device ran out of memory"),
    ]


def test_too_little_memory_for_the_base_model_is_said_before_it_is_made(monkeypatch):
    monkeypatch.setattr(Machine, "free_bytes", lambda self: 10_000)
    with pytest.raises(InputError, match=r"the base model takes 0.0 GB") as error:
        benchmark_attention(settings(num_facts=[3]))
    assert error.value.where == "--shape"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--plan"):
        benchmark_attention(settings(num_facts=[3], device="cuda"))


def test_files_without_matplotlib_are_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(run, "_Run", None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        benchmark_attention(settings(num_facts=[3], output=str(tmp_path)))
