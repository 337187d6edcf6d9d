"""Whatever the chunks, versions, selections, priors and neighbours in a batch: one softmax over [facts | text]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    DIM,
    FORMS,
    KINDS,
    PlainFacts,
    plain_logits,
    random_facts,
    random_ids,
    small_blocks,
    tiny_adapter,
    tiny_llama,
)

from kblam_ray.attention import KnowledgeMemory, attach, softmax
from kblam_ray.attention.batch import ForwardPass, Segment, segments_of_rows
from kblam_ray.errors import InputError

HIDDEN = float("-inf")
DOUBLE = torch.float64


@dataclass(frozen=True)
class Stage:
    """A tiny model for each attention implementation, with an adapter of each kind attached to both.

    In float64, but for "eager": of its softmax in float32, hidden tokens of float64 are too small.
    """

    models: dict
    adapters: dict


@pytest.fixture(scope="module")
def stage():
    models = {"sdpa": tiny_llama(dtype=DOUBLE), "eager": tiny_llama(implementation="eager")}
    adapters = {kind: tiny_adapter(models["sdpa"], kind, dtype=DOUBLE) for kind in KINDS}
    attachments = [attach(model, adapter) for model in models.values() for adapter in adapters.values()]
    yield Stage(models, adapters)
    for attachment in attachments:
        attachment.detach()


def changes(upserts: dict[int, tuple[torch.Tensor, torch.Tensor]], deleted: list[int], version: int = 0):
    keys, values = (np.array([pair[part].numpy() for pair in upserts.values()]).reshape(-1, DIM) for part in (0, 1))
    table = pa.table({"fact_id": pa.array(list(upserts), pa.int64())})
    parts = SimpleNamespace(facts=table, key_embeddings_MP=keys, value_embeddings_MP=values)
    return SimpleNamespace(
        from_version=version, to_version=version + 1, upserts=parts, deleted_ids=np.array(deleted, np.int64)
    )


@st.composite
def knowledge(draw, most: int = 12):
    """A function of an adapter and a form that gives a memory, and the same facts as plain matrices."""
    num_facts = draw(st.integers(0, most))
    seed = draw(st.integers(0, 2**16))
    facts = random_facts(num_facts, seed=seed, dtype=DOUBLE)
    order = draw(st.permutations(range(num_facts)))
    sizes = draw(st.lists(st.integers(0, most), max_size=4))
    chosen = st.lists(st.booleans(), min_size=num_facts, max_size=num_facts)
    changed = draw(st.one_of(st.none(), st.tuples(chosen, chosen, st.integers(0, 3))))
    selected = draw(st.one_of(st.none(), chosen))
    prior_kind = draw(st.sampled_from(["none", "some", "all hidden"]))
    prior_draw = torch.randn(num_facts + 3, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    hidden = draw(st.lists(st.booleans(), min_size=num_facts + 3, max_size=num_facts + 3))
    prior_M = prior_draw.masked_fill(torch.tensor(hidden), HIDDEN).float() if prior_kind == "some" else prior_draw * 0
    prior_M = prior_M + HIDDEN if prior_kind == "all hidden" else prior_M

    def make(adapter, form: str) -> tuple[KnowledgeMemory, PlainFacts]:
        # Fact i of `rows` has the id 5 i - 7: neither ascending in memory nor its position.
        memory = facts.take(order).memory(adapter, form, sizes=sizes, fact_ids=[5 * i - 7 for i in order])
        keys, values = list(facts.keys_MP), list(facts.values_MP)
        live = set(range(num_facts))
        if changed is not None:
            gone, replaced, num_new = changed
            fresh = random_facts(num_facts + num_new, seed=seed + 1, dtype=DOUBLE)
            upserted = [i for i in range(num_facts) if replaced[i]] + list(range(num_facts, num_facts + num_new))
            deleted = [i for i in range(num_facts) if gone[i]]
            upserts = {5 * i - 7: (fresh.keys_MP[i], fresh.values_MP[i]) for i in upserted}
            memory = memory.apply(changes(upserts, [5 * i - 7 for i in deleted]))
            keys += [None] * num_new
            values += [None] * num_new
            for i in upserted:
                keys[i], values[i] = fresh.keys_MP[i], fresh.values_MP[i]
            live = (live - set(deleted)) | set(upserted)
        num_counted = len(live)
        if selected is not None:
            live = {i for i in live if i >= num_facts or selected[i]}
            memory = memory.select(np.array([5 * i - 7 for i in live], np.int64))
        rows = sorted(live)
        plain = PlainFacts(
            torch.stack([keys[i] for i in rows]) if rows else torch.zeros(0, DIM, dtype=DOUBLE),
            torch.stack([values[i] for i in rows]) if rows else torch.zeros(0, DIM, dtype=DOUBLE),
            num_counted=num_counted,
        )
        if prior_kind != "none":
            plain = replace(plain, prior_M=prior_M[rows].float())
            memory = memory.with_prior(prior_M[(torch.tensor(memory.fact_ids) + 7) // 5])
        assert sorted(memory.fact_ids.tolist()) == [5 * i - 7 for i in rows]
        return memory, plain

    return make


def sees_nothing(plain: PlainFacts | None) -> bool:
    return plain is None or not len(plain) or (plain.prior_M is not None and bool(plain.prior_M.eq(HIDDEN).all()))


@given(knowledge(), st.sampled_from(KINDS), st.sampled_from(FORMS), st.booleans(), st.booleans(), st.integers(1, 20))
@settings(max_examples=120)
def test_any_facts_in_any_chunks(stage, make, kind, form, with_blocks, with_grad, num_tokens):
    model, adapter = stage.models["sdpa"], stage.adapters[kind]
    memory, plain = make(adapter, form)
    ids = random_ids(2, num_tokens)
    with small_blocks() if with_blocks else torch.set_grad_enabled(with_grad), torch.set_grad_enabled(with_grad):
        logits = model(ids, knowledge=memory).logits
    with torch.no_grad():
        if sees_nothing(plain):
            assert torch.equal(logits, model(ids).logits)
        else:
            torch.testing.assert_close(logits.detach(), plain_logits(model, adapter, ids, plain), rtol=0, atol=1e-9)


@st.composite
def batches(draw):
    """Per row: one of a few knowledge bases or None, perhaps under a prior of its own, and padding on the left."""
    bases = draw(st.lists(knowledge(most=6), min_size=1, max_size=2))
    row = st.tuples(
        st.one_of(st.none(), st.integers(0, len(bases) - 1)),
        st.sampled_from(FORMS),
        st.integers(0, 5),  # padding
        st.one_of(st.none(), st.integers(0, 3)),  # the seed of a prior of its own
    )
    return bases, draw(st.lists(row, min_size=1, max_size=4))


@given(batches(), st.sampled_from(KINDS), st.sampled_from(["sdpa", "eager"]), st.booleans(), st.booleans())
@settings(max_examples=80)
def test_every_row_has_its_own(stage, batch, kind, implementation, with_blocks, with_grad):
    bases, rows = batch
    model, adapter = stage.models[implementation], stage.adapters[kind]
    made = {(base, form): bases[base](adapter, form) for base, form, _, _ in rows if base is not None}
    num_tokens = 5
    ids = random_ids(len(rows), num_tokens)
    mask = torch.ones_like(ids)
    memories, plains = [], []
    for row, (base, form, padding, prior_seed) in enumerate(rows):
        mask[row, :padding] = 0  # 5 is a row of padding only
        memory, plain = (None, None) if base is None else made[base, form]
        if base is not None and prior_seed is not None and len(plain):
            # A prior by the fact, not by its place: both sides must hide and favour the same ones.
            favour_P = torch.randn(DIM, generator=torch.Generator().manual_seed(prior_seed), dtype=DOUBLE)
            place = {tuple(key): at for at, key in enumerate(plain.keys_MP.tolist())}
            keys_MP = torch.cat([view.live_rows(view.chunk.keys_MP) for view in memory.views])
            plain_prior_M = (plain.keys_MP @ favour_P).float()
            memory = memory.with_prior(plain_prior_M[[place[tuple(key)] for key in keys_MP.tolist()]])
            plain = replace(plain, prior_M=plain_prior_M)
        memories.append(memory)
        plains.append(plain)
    with small_blocks() if with_blocks else torch.set_grad_enabled(with_grad), torch.set_grad_enabled(with_grad):
        logits = model(ids, attention_mask=mask, knowledge=memories).logits
        without = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    with torch.no_grad():
        expected = plain_logits(
            model, adapter, ids, [None if sees_nothing(p) else p for p in plains], attention_mask=mask
        )
    for row, plain in enumerate(plains):
        if sees_nothing(plain):
            assert torch.equal(logits[row], without[row])
        real = mask[row].bool()
        atol = 1e-9 if implementation == "sdpa" else 1e-4
        torch.testing.assert_close(logits[row, real].detach(), expected[row, real], rtol=0, atol=atol)


@given(batches(), st.sampled_from(KINDS))
@settings(max_examples=25)
def test_padding_and_empty_rows_have_finite_gradients(stage, batch, kind):
    bases, rows = batch
    model = stage.models["sdpa"]
    adapter = stage.adapters[kind]
    memories = [None if base is None else bases[base](adapter, form)[0] for base, form, _, _ in rows]
    ids = random_ids(len(rows), 5)
    mask = torch.ones_like(ids)
    for row, (_, _, padding, _) in enumerate(rows):
        mask[row, :padding] = 0
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    leaves = [embeds, *adapter.parameters()]
    # The loss of every position, padding included: nothing may hide a NaN.
    loss = model(inputs_embeds=embeds, attention_mask=mask, knowledge=memories).logits.square().sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert gradients[0] is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_facts", [0, 1])
def test_none_and_one_fact(stage, kind, num_facts):
    model, adapter = stage.models["sdpa"], stage.adapters[kind]
    facts, ids = random_facts(num_facts, dtype=DOUBLE), random_ids(2, 4)
    with torch.no_grad():
        without = model(ids).logits
        for form in FORMS:
            logits = model(ids, knowledge=facts.memory(adapter, form)).logits
            if num_facts:
                expected = plain_logits(model, adapter, ids, facts)
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
            else:
                assert torch.equal(logits, without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_all_facts_of_a_chunk_deleted(stage, kind, form):
    model, adapter = stage.models["sdpa"], stage.adapters[kind]
    facts, ids = random_facts(9, dtype=DOUBLE), random_ids(1, 4)
    memory = facts.memory(adapter, form, sizes=[3, 3])
    after = memory.apply(changes({}, [3, 4, 5]))
    assert len(after.views) == 2
    with torch.no_grad():
        logits = model(ids, knowledge=after).logits
        torch.testing.assert_close(
            logits, plain_logits(model, adapter, ids, facts.take([0, 1, 2, 6, 7, 8])), rtol=0, atol=1e-9
        )
        before = plain_logits(model, adapter, ids, facts)
        torch.testing.assert_close(model(ids, knowledge=memory).logits, before, rtol=0, atol=1e-9)
        nothing_left = after.apply(changes({}, [0, 1, 2, 6, 7, 8], version=1))
        assert torch.equal(model(ids, knowledge=nothing_left).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counted", ["whole", "selection"])
def test_the_m_of_a_selection_is_what_the_adapter_says(stage, kind, counted):
    model = stage.models["sdpa"]
    adapter = tiny_adapter(model, kind, dtype=DOUBLE, selection_log_m=counted)
    facts, ids = random_facts(9, dtype=DOUBLE), random_ids(1, 4)
    attachment = attach(model, adapter)
    with torch.no_grad():
        logits = model(ids, knowledge=facts.memory(adapter).select(np.array([1, 4]))).logits
    attachment.detach()
    taken = replace(facts.take([1, 4]), num_counted=9 if counted == "whole" else 2)
    with torch.no_grad():
        torch.testing.assert_close(logits, plain_logits(model, adapter, ids, taken), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_two_adapters_in_one_batch(stage, kind):
    model = stage.models["sdpa"]
    other = tiny_adapter(model, kind, dtype=DOUBLE, kb_layers=[1], kb_layer_frequency=None, seed=9, kb_scale=None)
    adapters = [stage.adapters["paper"], other, stage.adapters["shared"]]
    facts, ids = random_facts(5, dtype=DOUBLE), random_ids(4, 6)
    attachment = attach(model, other)
    with torch.no_grad():
        logits = model(ids, knowledge=[*(facts.memory(adapter) for adapter in adapters), None]).logits
        for row, adapter in enumerate(adapters):
            expected = plain_logits(model, adapter, ids[row : row + 1], facts)
            torch.testing.assert_close(logits[row], expected[0], rtol=0, atol=1e-9)
        assert torch.equal(logits[3], model(ids).logits[3])
    attachment.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [1, 3, 6, torch.tensor([0, 4]), torch.tensor([-1, 2])], ids=str)
def test_logits_of_some_tokens_are_those_of_all(stage, kind, implementation, keep):
    """The last layer looks at the facts only where that can be seen."""
    model = stage.models[implementation]
    adapter = tiny_adapter(model, kind, dtype=DOUBLE, kb_layers=[0, 2], kb_layer_frequency=None)
    facts, ids = random_facts(5, dtype=DOUBLE), random_ids(3, 6)
    attachment = attach(model, adapter)
    knowledge = [facts.memory(adapter), None, facts.memory(adapter, "materialized")]
    with torch.no_grad():
        whole = model(ids, knowledge=knowledge, output_hidden_states=True, output_attentions=implementation == "eager")
        some = model(ids, knowledge=knowledge, logits_to_keep=keep)
        wanted = slice(-keep, None) if isinstance(keep, int) else keep
        atol = 1e-12 if implementation == "sdpa" else 2e-5
        torch.testing.assert_close(some.logits, whole.logits[:, wanted], rtol=0, atol=atol)
        assert torch.equal(some.logits[1], model(ids, logits_to_keep=keep).logits[1])
        states = model(ids, knowledge=knowledge, logits_to_keep=keep, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-1], whole.hidden_states[-1], rtol=0, atol=atol)
        loss = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(model(ids, knowledge=knowledge, labels=ids).loss, loss.float())
        if implementation == "eager":
            weights = model(ids, knowledge=knowledge, logits_to_keep=keep, output_attentions=True).attentions
            torch.testing.assert_close(weights[-1], whole.attentions[-1], rtol=0, atol=atol)
    attachment.detach()


def test_rows_that_attend_to_the_same_facts_are_worked_on_together(stage):
    adapter = stage.adapters["paper"]
    memory = random_facts(5, dtype=DOUBLE).memory(adapter)
    priors = [memory.with_prior(torch.randn(5)) for _ in range(2)]
    other = random_facts(5, dtype=DOUBLE).memory(adapter)
    selected = memory.select(memory.fact_ids[:2])
    rows = [memory, priors[0], None, other, priors[1], memory, priors[0], selected]
    forward = ForwardPass(segments_of_rows(rows, len(rows), 2), torch.device("cpu"))
    tokens = [group.tokens.tolist() for group in forward.groups]
    assert tokens == [[0, 1, 2, 3, 8, 9, 10, 11, 12, 13], [6, 7], [14, 15]]
    # One row of log weights for each distinct prior, whatever the number of tokens.
    assert forward.groups[0].log_weights[0].weights_KM.shape == (3, 5)
    assert forward.groups[1].log_weights == (None,)


def test_one_memory_for_all_rows_is_not_taken_apart(stage):
    memory = random_facts(5, dtype=DOUBLE).memory(stage.adapters["paper"])
    forward = ForwardPass(segments_of_rows(memory, 3, 2), torch.device("cpu"))
    assert [group.tokens for group in forward.groups] == [None]


def test_segments_of_rows(stage):
    first, second = (random_facts(2, dtype=DOUBLE).memory(stage.adapters["paper"]) for _ in range(2))
    assert segments_of_rows(None, 2, 3) == [Segment(None, 0, 6)]
    assert segments_of_rows([first, None], 2, 3) == [Segment(first, 0, 3), Segment(None, 3, 6)]
    # Beams and several answers per prompt: a prompt's rows stand side by side.
    assert [part.memory for part in segments_of_rows((first, second), 4, 1)] == [first, first, second, second]
    for rows in ([], [first, second, first], [first] * 5):
        with pytest.raises(InputError, match=f"{len(rows)} knowledge memories for a batch of 4 rows"):
            segments_of_rows(rows, 4, 1)
    for stranger in ("kb/world", 3, [first, "kb/world"], {"a": first}):
        with pytest.raises(InputError, match="is no knowledge memory"):
            segments_of_rows(stranger, 2, 1)


@pytest.mark.parametrize("wants_gradient", ["nothing", "adapter", "embeddings"])
def test_facts_are_worked_on_in_blocks_unless_something_wants_a_gradient(monkeypatch, wants_gradient):
    model = tiny_llama().requires_grad_(False)
    adapter = tiny_adapter(model, "paper").requires_grad_(wants_gradient == "adapter")
    keys_MP, values_MP = torch.randn(2, 9, DIM)
    memory = KnowledgeMemory.from_embeddings(adapter, keys_MP.requires_grad_(wants_gradient == "embeddings"), values_MP)
    in_blocks = []
    in_place = softmax._softmax_in_place
    monkeypatch.setattr(softmax, "_softmax_in_place", lambda *args: in_blocks.append(1) or in_place(*args))
    attachment = attach(model, adapter)
    logits = model(random_ids(1, 5), knowledge=memory).logits
    attachment.detach()
    assert logits.requires_grad == (wants_gradient != "nothing")
    assert bool(in_blocks) == (wants_gradient == "nothing")
