"""Adapters in closed form for a tiny random Llama: they find facts, of both kinds, whoever runs the passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_form_samples import SMALL, base, chat, facts
from model_samples import tiny_llama

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape
from kblam_ray.attention.projections import materialize
from kblam_ray.attention.trace import retrieval_scores
from kblam_ray.errors import InputError, UnsupportedModelError
from kblam_ray.facts.questions import REFUSAL, QuestionMaker
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.training.closed_form import ClosedFormSettings, operation_count
from kblam_ray.training.closed_form.assemble import Regressions, adapter_tensors
from kblam_ray.training.closed_form.collect import Passes
from kblam_ray.training.closed_form.cost import GATE_PASSES
from kblam_ray.training.closed_form.fit import _Fit, fit, fit_closed_form
from kblam_ray.training.closed_form.sharded import sharded_statistics
from kblam_ray.training.closed_form.statistics import Statistics
from kblam_ray.training.closed_form.watching import WatchedModel


def passes(block_questions: int = 16) -> Passes:
    return Passes(
        chat=chat(),
        facts=facts(),
        key_mean_P=np.asarray(facts().keys_MP, np.float64).mean(0),
        layers=(0, 1),
        mix={"simple": 0.7, "two_entity": 0.3},
        refusal=REFUSAL,
        seed=0,
        block_questions=block_questions,
        batch_tokens=2_000,
    )


@pytest.fixture(scope="module", params=["shared", "paper"])
def fitted(request):
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = fit(model, chat(), facts(), SMALL, kind=request.param, kb_layers=[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return model, found


def test_an_adapter_finds_facts_that_it_was_not_fitted_on(fitted):
    model, found = fitted
    _, held_out = facts().split(SMALL.held_out, SMALL.seed)
    memory = memory_of(found.adapter, held_out)
    knowing = KnowledgeModel(model, found.adapter, chat().tokenizer)
    maker, places = QuestionMaker(held_out.facts, 9), []
    for number in range(60):
        question = maker.make("simple", number)
        ids = torch.tensor([chat().render(question.messages)])
        scores_M = retrieval_scores(knowing.attachment, ids, memory)
        places.append((scores_M > scores_M[question.facts[0]]).double().mean().item())
    knowing.detach()
    # At random a fact stands in the middle, give or take 0.04. The tests' tokenizer spells: not much more can be had.
    assert sum(places) / len(places) < 0.4


def test_the_report_says_what_was_chosen(fitted):
    _, found = fitted
    report, config = found.report, found.adapter.config
    assert config.kind == report["kind"]
    assert list(config.layers) == report["kb_layers"]
    assert set(report["retrieval_layers"]) <= set(config.layers)
    assert report["num_questions"] == SMALL.num_questions
    assert report["num_tokens"] > 0
    assert report["answer_loss"] <= report["answer_loss_without_facts"] + 0.05
    assert math.isfinite(report["answer_loss"])
    assert config.refusal_text == REFUSAL
    assert config.encoder is not None
    assert config.encoder.revision == facts().encoder.revision
    assert not found.adapter.training


def test_settings_of_the_adapter_are_kept():
    adapter = fit_closed_form(
        base(), chat(), facts(), SMALL, kb_layers=[0, 1], kb_scale=50.0, retrieval_layers=[0], refusal_text="No."
    )
    config = adapter.config
    assert (config.kb_layers, config.retrieval_layers) == ([0, 1], [0])
    assert (config.kb_scale, config.refusal_text) == (50.0, "No.")


def test_without_kb_layers_the_retrieval_layer_and_the_last_ones_are_taken():
    work = _Fit(tiny_llama(num_layers=12), chat(), facts(), SMALL, "shared", print)
    assert work._candidates() == (0, 2, 3, 5, 6, 8, 9, 10, 11)
    config = work._config(work._given_config(None, None, {}), 5, {})
    assert (config.kb_layers, config.retrieval_layers) == ([5, 10, 11], [5])
    assert work._config(None, 11, {}).kb_layers == [10, 11]
    paper = _Fit(tiny_llama(num_layers=12), chat(), facts(), SMALL, "paper", print)._given_config(None, None, {})
    assert paper is not None
    assert paper.layers == (0, 3, 6, 9)


def test_what_cannot_be_fitted_is_named():
    with pytest.raises(InputError, match="held out"):
        fit(base(), chat(), facts().take([0]), SMALL)
    with pytest.raises(InputError, match="only questions without an answer"):
        fit(base(), chat(), facts(), SMALL.model_copy(update={"question_mix": {"unanswerable": 1.0}}))
    with pytest.raises(InputError, match="retrieval layers without KB layers"):
        fit(base(), chat(), facts(), SMALL, retrieval_layers=[1])
    with pytest.raises(UnsupportedModelError, match="layer 7"):
        WatchedModel(base(), [7])


def test_blocks_add_up_to_the_whole():
    model, whole = base(), passes().statistics(base(), range(4), 60)
    parts = [passes().statistics(model, blocks, 60) for blocks in ([0, 1], [2], [3])]
    assert_equal(parts[0] + parts[1] + parts[2], whole)
    assert whole.num_questions == 60
    assert whole.get("value_square")[-1, -1] == whole.num_values >= 60


def test_the_passes_leave_no_trace_on_the_model():
    model = base()
    configs = [layer.self_attn.config for layer in model.model.layers]
    ids_BT = torch.tensor([[5, 6, 7]])
    before = model(ids_BT).logits
    model.train()
    passes().statistics(model, [0], 8)
    assert model.training
    assert [layer.self_attn.config for layer in model.model.layers] == configs
    assert torch.equal(model.eval()(ids_BT).logits, before)


def assert_equal(found: Statistics, wanted: Statistics) -> None:
    assert found.sums.tensors.keys() == wanted.sums.tensors.keys()
    for name, tensor in wanted.sums.tensors.items():
        torch.testing.assert_close(found.sums.tensors[name], tensor, rtol=1e-11, atol=1e-11)
    assert (found.num_questions, found.num_tokens) == (wanted.num_questions, wanted.num_tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_workers_give_what_one_process_gives(tmp_path):
    model, told = base(), []
    found = sharded_statistics(passes(), model, 60, 2, progress=told.append)
    # The workers run with threads of their own number: matrix products round differently.
    whole = passes().statistics(model, range(4), 60)
    for name, tensor in whole.sums.tensors.items():
        scale = tensor.abs().max().clamp_min(1)
        assert (found.sums.tensors[name] - tensor).abs().max() < 1e-5 * scale, name
    assert found.num_questions == 60
    assert told[-1].endswith("60 of 60 questions")
    model.save_pretrained(tmp_path)
    chat().tokenizer.save_pretrained(tmp_path)
    again = sharded_statistics(passes(), model, 60, 1, base_source=str(tmp_path))
    for name, tensor in found.sums.tensors.items():
        assert (again.sums.tensors[name] - tensor).abs().max() < 1e-9 * tensor.abs().max().clamp_min(1), name


def test_the_papers_form_gives_the_shared_score_as_far_as_its_rank_goes():
    """Six directions fit into seven numbers: then its logits are the score plus the gate, but for the LayerNorm."""
    shape = BaseShape(model_type="llama", hidden_size=20, num_layers=4, num_heads=4, head_dim=8)
    config = AdapterConfig(kind="paper", base_shape=shape, dim=12, kb_layers=[1, 3], slots=3)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    keys_MP = draw(50, 12) * 0.3 + 0.2
    centred_MP = keys_MP - keys_MP.mean(0)
    queries = {layer: torch.cat([draw(12, 6) @ draw(6, 20), torch.zeros(12, 1)], 1) for layer in (1, 3)}
    gates = {layer: torch.cat([draw(4, 20), torch.zeros(4, 1)], 1) for layer in (1, 3)}
    found = Regressions(
        key_mean_P=keys_MP.mean(0),
        key_scale=1.0,
        key_covariance_PP=centred_MP.T @ centred_MP / 50,
        queries=queries,
        hidden_squares={layer: torch.eye(20, dtype=torch.float64) for layer in (1, 3)},
        values={layer: draw(32, 13) for layer in (1, 3)},
    )
    adapter = KnowledgeAdapter.of_tensors(config, adapter_tensors(config, found, gates))
    hidden_TX = draw(9, 20)
    for layer in (1, 3):
        keys_NMH, values_NMH = materialize(adapter, layer, keys_MP.float(), keys_MP.float(), torch.float32)
        query_TX = hidden_TX.float() @ adapter.query_heads[str(layer)].weight.T
        logits_NTM = query_TX.unflatten(1, (4, 8)).transpose(0, 1) @ keys_NMH.transpose(1, 2) / 8**0.5
        score_TM = hidden_TX @ queries[layer][:, :-1].T @ centred_MP.T
        gate_NT = gates[layer][:, :-1] @ hidden_TX.T
        wanted_NTM = score_TM[None] + gate_NT[..., None]
        error_NTM = (logits_NTM - wanted_NTM).abs() / wanted_NTM.abs().clamp_min(1)
        assert error_NTM.max() < 0.05
        value_M = found.values[layer][:8] @ torch.cat([keys_MP[0], torch.ones(1, dtype=torch.float64)])
        torch.testing.assert_close(values_NMH[0, 0].double(), value_M, rtol=1e-4, atol=1e-4)


def test_the_cost_of_a_fit_is_what_its_parts_take():
    config, settings = base().config, ClosedFormSettings(num_questions=10, num_gate_questions=1)
    count = operation_count(config, settings, tokens_per_question=7, dim=64)
    weights = sum(
        parameter.numel() for name, parameter in base().named_parameters() if "layers" in name and "norm" not in name
    )
    attention = 2 * 4 * 7 * 4 * 24
    assert count.passes == 10 * 7 * (2 * weights + attention)
    assert count.gates > GATE_PASSES * 7 * 2 * weights
    statistics = passes().statistics(base(), range(4), 60)
    held = sum(tensor.nbytes for name, tensor in statistics.sums.tensors.items() if len(name) > 1 and name[1] in (0, 1))
    assert 0.8 * held < count.sums_bytes < 1.5 * held
    assert "PFLOP" in count.sentence("A fit", 1e13)
    assert count.total == pytest.approx(count.passes + count.products + count.solutions + count.gates)
