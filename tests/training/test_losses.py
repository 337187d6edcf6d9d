"""The losses equal their formulas, their sums add up over any division of a batch, and their gradients are right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention.tiny import (
    KINDS,
    PlainFacts,
    plain_kb_part,
    plain_logits,
    random_facts,
    random_ids,
    tiny_adapter,
    tiny_llama,
)

from kblam_ray.attention import stacking
from kblam_ray.attention.attach import attach
from kblam_ray.errors import InputError
from kblam_ray.training.losses import TERMS, Losses, loss_counts, training_loss
from kblam_ray.training.mix import LossSettings
from kblam_ray.training.mix.batches import TrainingBatch

SETTINGS = LossSettings(next_token=0.7, retrieval=0.9, refusal=0.4, divergence=1.3, refusal_margin=0.5)
LENGTH = 9
ANSWER_START = (4, 3, 6, 2, 5, 4)
LENGTHS = (9, 7, 9, 6, 8, 9)
KINDS_OF_ROWS = ("simple", "unanswerable", "two_entity", "text", "open_ended", "text")
WANTED = (
    *((0, 3, 2), (0, 4, 2), (0, 5, 2)),
    *((2, 5, 0), (2, 6, 0), (2, 7, 4)),
    *((4, 4, 1), (4, 4, 3), (4, 4, 2), (4, 5, 1), (4, 6, 3)),
)
"""Row, position, place of the right fact; the first position of each row is its last prompt token."""


def batch_of(rows=range(6), *, sizes=(5, 5, 6, 4, 5, 3), shared: bool = False, dtype=torch.float64) -> TrainingBatch:
    """Some rows of a batch by hand: questions of several kinds, and texts."""
    rows = list(rows)
    ids_BT = random_ids(6, LENGTH)
    labels_BT = torch.full_like(ids_BT, -100)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (start, length, kind) in enumerate(zip(ANSWER_START, LENGTHS, KINDS_OF_ROWS, strict=True)):
        mask_BT[row, :length] = 1
        if kind != "text":
            labels_BT[row, start:length] = ids_BT[row, start:length]
    pairs = [(rows.index(row), at, place) for row, at, place in WANTED if row in rows]
    parts = [1 / sum(pair[:2] == other[:2] for other in pairs) for pair in pairs]
    bases = [random_facts(6 if shared else sizes[row], seed=0 if shared else row, dtype=dtype) for row in rows]
    bases = bases[:1] if shared else bases
    row_W, at_W, place_W = torch.tensor(pairs or [(0, 0, 0)], dtype=torch.int64)[: len(pairs)].T
    return TrainingBatch(
        numbers=tuple(rows),
        kinds=tuple(KINDS_OF_ROWS[row] for row in rows),
        input_ids_BT=ids_BT[rows],
        attention_mask_BT=mask_BT[rows],
        labels_BT=labels_BT[rows],
        answer_start_B=torch.tensor(ANSWER_START)[rows],
        is_text_B=torch.tensor([KINDS_OF_ROWS[row] == "text" for row in rows]),
        is_unanswerable_B=torch.tensor([KINDS_OF_ROWS[row] == "unanswerable" for row in rows]),
        keys_MP=tuple(facts.keys_MP for facts in bases),
        values_MP=tuple(facts.values_MP for facts in bases),
        wanted_row_W=row_W,
        wanted_at_W=at_W,
        wanted_place_W=place_W,
        wanted_part_W=torch.tensor(parts, dtype=torch.float64),
    )


def model_of(kind: str, *, dtype=torch.float64, **settings):
    base = tiny_llama(dtype=dtype)
    base.requires_grad_(False)
    adapter = tiny_adapter(base, kind, dtype=dtype, **settings)
    return base, adapter, attach(base, adapter)


def hidden_states(base, batch, adapter, layers) -> dict[int, torch.Tensor]:
    """What the attention of some layers receives, [B, T, hidden], with the facts attended to."""
    found = {}
    hooks = [
        base.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: found.update(
                {layer: (args[0] if args else kwargs["hidden_states"]).detach()}
            ),
            with_kwargs=True,
        )
        for layer in layers
    ]
    with torch.no_grad():
        plain_logits(base, adapter, batch.input_ids_BT, facts_of(batch))
    for hook in hooks:
        hook.remove()
    return found


def facts_of(batch: TrainingBatch):
    facts = [PlainFacts(keys_MP, values_MP) for keys_MP, values_MP in zip(batch.keys_MP, batch.values_MP, strict=True)]
    return facts * len(batch) if batch.is_shared else facts


def by_definition(base, adapter, batch: TrainingBatch) -> dict[str, float]:
    """The sums, from logits and scores of every token."""
    with torch.no_grad():
        logits_BTV = plain_logits(base, adapter, batch.input_ids_BT, facts_of(batch))
        own_BTV = base(batch.input_ids_BT, use_cache=False).logits
    next_token = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    divergence = 0.0
    for row in batch.is_text_B.nonzero().flatten().tolist():
        for at in range(int(batch.attention_mask_BT[row].sum())):
            own, with_facts = own_BTV[row, at].log_softmax(-1), logits_BTV[row, at].log_softmax(-1)
            divergence += float((own.exp() * (own - with_facts)).sum())
    retrieval = refusal = 0.0
    layers = adapter.config.retrieval_layers
    hidden = hidden_states(base, batch, adapter, layers)
    shift = math.log(adapter.config.kb_scale) if adapter.config.kb_scale else 0.0
    for layer in layers:
        for row, facts in enumerate(facts_of(batch)):
            logits_NTM, _ = plain_kb_part(adapter, layer, hidden[layer][row], facts)
            shares_TM = logits_NTM.softmax(-1).mean(0)
            scores_NTM = logits_NTM
            if adapter.config.kb_scale:
                scores_NTM = logits_NTM - shift + math.log(len(facts))
            if adapter.config.kind == "shared":
                gates = hidden[layer][row] @ adapter.gates[str(layer)].weight.T + adapter.gates[str(layer)].bias
                scores_NTM = scores_NTM - gates.T[..., None]
            wanted = [(at, place) for at, place in pairs_of(batch, row)]
            for at in {at for at, _ in wanted}:
                right = [place for other, place in wanted if other == at]
                weight = SETTINGS.last_prompt_token if at == int(batch.answer_start_B[row]) - 1 else 1.0
                for place in right:
                    retrieval += weight / len(right) * (-math.log(len(right)) - float(shares_TM[at, place].log()))
            if not batch.is_text_B[row]:
                last = int(batch.answer_start_B[row]) - 1
                evidence = scores_NTM[:, last].logsumexp(-1).mean() - math.log(len(facts)) - SETTINGS.refusal_margin
                sign = 1 if batch.is_unanswerable_B[row] else -1
                refusal += float(F.softplus(sign * evidence))
    return {
        "next_token": float(next_token),
        "retrieval": retrieval / len(layers),
        "refusal": refusal / len(layers),
        "divergence": divergence,
    }


def pairs_of(batch, row):
    mine = batch.wanted_row_W == row
    return zip(batch.wanted_at_W[mine].tolist(), batch.wanted_place_W[mine].tolist(), strict=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_term_is_what_its_formula_says(kind, shared):
    base, adapter, attachment = model_of(kind)
    batch = batch_of(shared=shared)
    losses = training_loss(attachment, batch, SETTINGS)
    expected = by_definition(base, adapter, batch)
    for term, found in zip(TERMS, losses.sums.tolist(), strict=True):
        assert found == pytest.approx(expected[term], rel=1e-9), term
    expected_counts = [
        sum(
            length - start
            for length, start, of in zip(LENGTHS, ANSWER_START, KINDS_OF_ROWS, strict=True)
            if of != "text"
        ),
        3 * SETTINGS.last_prompt_token + 6,
        4,
        6 + 9,
    ]
    assert losses.counts.tolist() == pytest.approx(expected_counts)
    weights = {term: getattr(SETTINGS, term) for term in TERMS}
    counts = dict(zip(TERMS, losses.counts.tolist(), strict=True))
    objective = sum(weights[term] * expected[term] / counts[term] for term in TERMS)
    assert losses.objective(SETTINGS).item() == pytest.approx(objective, rel=1e-9)
    assert losses.means()["refusal"] == pytest.approx(expected["refusal"] / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one_it_is_the_same(kind, monkeypatch):
    """Without autograd large knowledge bases are not stacked: another path through the attention."""
    _base, _, attachment = model_of(kind)
    batch = batch_of()
    with_gradient = training_loss(attachment, batch, SETTINGS).sums.detach()
    with torch.no_grad():
        assert torch.allclose(training_loss(attachment, batch, SETTINGS).sums, with_gradient, rtol=1e-12)
        monkeypatch.setattr(stacking, "NUMBERS_COPIED", 0)
        assert torch.allclose(training_loss(attachment, batch, SETTINGS).sums, with_gradient, rtol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind, shared):
    _, adapter, attachment = model_of(kind)
    batch = batch_of(shared=shared)
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]

    def objective(*_: torch.Tensor) -> torch.Tensor:
        return training_loss(attachment, batch, SETTINGS).objective(SETTINGS)

    assert torch.autograd.gradcheck(objective, parameters, fast_mode=True, atol=1e-7)
    for term in TERMS:
        alone = LossSettings(**{other: float(other == term) for other in TERMS}, refusal_margin=0.5)

        def one(*_: torch.Tensor, alone: LossSettings = alone) -> torch.Tensor:
            return training_loss(attachment, batch, alone).objective(alone)

        assert torch.autograd.gradcheck(one, parameters, fast_mode=True, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_gradients_add_up_over_micro_batches(kind):
    _, adapter, attachment = model_of(kind)
    whole = training_loss(attachment, batch_of(), SETTINGS)
    whole.objective(SETTINGS).backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    for division in (
        [[0, 1, 2, 3, 4, 5]],
        [[0, 3], [1, 2], [4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[3, 5], [0, 1, 2, 4]],
    ):
        adapter.zero_grad()
        parts = [batch_of(rows) for rows in division]
        counts = sum(loss_counts(part, SETTINGS) for part in parts)
        assert torch.allclose(counts, whole.counts, rtol=1e-14)
        total = Losses(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
        for part in parts:
            losses = training_loss(attachment, part, SETTINGS)
            losses.objective(SETTINGS, counts).backward()
            total = total + losses.detach()
        assert torch.allclose(total.sums, whole.sums.detach(), rtol=1e-12)
        for name, parameter in adapter.named_parameters():
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-13), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    base, adapter, attachment = model_of(kind)
    batch = batch_of()
    plain = training_loss(attachment, batch, SETTINGS)
    plain.objective(SETTINGS).backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    adapter.zero_grad()
    base.train()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = training_loss(attachment, batch, SETTINGS)
    again.objective(SETTINGS).backward()
    assert torch.allclose(again.sums, plain.sums, rtol=1e-12)
    for name, parameter in adapter.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-10), name


def test_the_base_model_is_frozen_and_records_nothing_below_the_first_kb_layer():
    base, adapter, attachment = model_of("shared", kb_layers=[1], retrieval_layers=[1])
    wants = {}
    for number, layer in enumerate(base.model.layers):
        layer.register_forward_hook(
            lambda module, args, output, number=number: wants.update(
                {number: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
    losses = training_loss(attachment, batch_of(range(3)), SETTINGS)
    assert wants == {0: False, 1: True, 2: True}
    losses.objective(SETTINGS).backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    base.model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"not frozen \(model.norm.weight\)"):
        training_loss(attachment, batch_of(), SETTINGS)


def test_logits_are_made_for_the_tokens_that_count_only():
    base, _, attachment = model_of("shared")
    seen = []
    base.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:-1])))
    batch = batch_of()
    losses = training_loss(attachment, batch, SETTINGS)
    answer_tokens, _, _, text_tokens = map(int, losses.counts.tolist())
    assert seen == [(1, answer_tokens + text_tokens), (1, text_tokens)]
    assert base(batch.input_ids_BT).logits.shape[:2] == batch.input_ids_BT.shape  # and afterwards all of them
    no_texts = LossSettings(divergence=0)
    training_loss(attachment, batch, no_texts)
    assert seen[3:] == [(1, answer_tokens)]


def test_terms_of_weight_zero_and_terms_without_examples():
    _, adapter, attachment = model_of("shared")
    only = LossSettings(next_token=1, retrieval=0, refusal=0, divergence=0)
    losses = training_loss(attachment, batch_of(), only)
    assert losses.sums[1:].tolist() == [0, 0, 0]
    # A micro-batch of texts alone, and one of questions alone.
    texts = training_loss(attachment, batch_of([3, 5]), SETTINGS)
    assert texts.sums[:3].tolist() == [0, 0, 0]
    assert set(texts.means()) == {"divergence"}
    texts.objective(SETTINGS).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapter.parameters() if parameter.grad is not None)
    questions = training_loss(attachment, batch_of([0, 1]), SETTINGS)
    assert set(questions.means()) == {"next_token", "retrieval", "refusal"}
    assert torch.isfinite(questions.objective(SETTINGS))


def test_a_base_model_in_16_bits():
    """Its scores are rounded; the losses are near those of 32 bits, and no share comes out above 1."""
    base, adapter, attachment = model_of("shared", dtype=torch.float32)
    batch = batch_of(dtype=torch.float32)
    exact = training_loss(attachment, batch, SETTINGS).means()
    base.to(torch.bfloat16)
    losses = training_loss(attachment, batch, SETTINGS)
    assert losses.sums.dtype == torch.float32
    for term, mean in losses.means().items():
        assert mean == pytest.approx(exact[term], rel=0.1, abs=0.02)
    losses.objective(SETTINGS).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())
    with torch.no_grad():
        for layer in adapter.config.layers:  # so sharp that every right fact has all of the share
            adapter.query_heads[str(layer)].weight.mul_(50)
    assert min(training_loss(attachment, batch, SETTINGS).sums.tolist()) > -1e-2


def test_descending_finds_the_right_facts():
    """A few steps on one batch: every term falls, and the right facts get the share."""
    _base, adapter, attachment = model_of("shared", dtype=torch.float32)
    batch = batch_of(dtype=torch.float32)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    first = training_loss(attachment, batch, SETTINGS).means()
    for _ in range(40):
        optimizer.zero_grad()
        losses = training_loss(attachment, batch, SETTINGS)
        losses.objective(SETTINGS).backward()
        optimizer.step()
    last = losses.means()
    for term in ("next_token", "retrieval", "refusal"):
        assert last[term] < 0.7 * first[term], term
