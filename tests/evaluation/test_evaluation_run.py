"""A whole evaluation of a tiny random model: what it finds is what asking one question at a time finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_samples import ENCODER, synthetic, tiny_model

from kblam_ray.errors import EncoderMismatchError, InputError
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.outcomes import SCHEMA, System
from kblam_ray.evaluation.own_questions import OwnQuestion
from kblam_ray.evaluation.questions import EvaluationSet
from kblam_ray.evaluation.retrieval import evidence_of
from kblam_ray.evaluation.run import evaluate
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.facts.fact import Fact
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.grounding import reading_message
from kblam_ray.model.refusal import evidence, statistic
from kblam_ray.table.embedded import EmbeddedFacts

FACTS = synthetic(64)
ALONE, WITH = System("attention", False), System("attention", True)
WEIGHTS = {"bias": 0.1, "score": 0.3, "cosine": 2.0, "entity_named": 1.0, "kb_share": -0.5}


def settings(**given) -> EvaluationSettings:
    return EvaluationSettings(**{"num_questions": 3, "max_new_tokens": 4, "grounding": ["off"], **given})


@pytest.fixture(scope="module")
def model():
    # Greedy answers of a random model hang on the last digits.
    model = tiny_model(question_prior=20.0, refusal_weights=WEIGHTS, refusal_threshold=0.5)
    model.base_model.double()
    model.adapter.double()
    return model


@pytest.fixture(scope="module")
def evaluation(model):
    return evaluate(model, FACTS, settings(num_facts=[40], batch_size=5))


def test_a_batch_finds_what_asking_one_by_one_finds(model, evaluation):
    (size,) = evaluation.sizes
    memory = memory_of(model.adapter, size.facts, dtype=None)
    for number, question in enumerate(size.questions):
        messages = list(question.messages)
        retrieved, answered = (size.outcomes[system][number] for system in (WITH, System("attention", True, "off")))
        ids = model.chat.render(messages)
        request = model.prepare(memory, messages)
        one = statistic(model.adapter.config, evidence(model, ids, request, messages))
        assert retrieved.statistic == answered.statistic == pytest.approx(one, abs=1e-6)
        assert retrieved.refused is (one < 0.5)
        answer = model.ask(messages, memory, grounding="off", max_new_tokens=4)
        assert (answered.text, answered.refused) == (answer.text, answer.refused)
        if question.wanted:
            scores = _scores(model, ids, request)
            assert list(retrieved.ranks) == retrieval_ranks(scores, question.wanted)
        else:
            assert retrieved.ranks is None


def test_a_selection_is_asked_as_ask_does(model):
    ways = {"grounding": ["off", "cite", "verbatim"], "baseline": [], "kinds": ["two_entity", "unanswerable"]}
    asked = settings(num_facts=[40], selection="similar:1", prior=True, **ways)
    (size,) = evaluate(model, FACTS, asked).sizes
    memory = memory_of(model.adapter, size.facts, dtype=None)
    left_out = 0
    for number, question in enumerate(size.questions):
        messages = list(question.messages)
        for grounding in asked.grounding:
            answer = model.ask(messages, memory, grounding=grounding, selection="similar:1", max_new_tokens=4)
            outcome = size.outcomes[System("attention", True, grounding)][number]
            assert (outcome.text, outcome.refused) == (answer.text, answer.refused)
        ranks = size.outcomes[WITH][number].ranks or ()
        chosen = model.prior.similar(memory, messages, 1)
        for rank, row in zip(ranks, question.wanted, strict=True):
            assert (rank <= 1) is (size.facts.fact_ids_M[row] in chosen)
            left_out += rank == 40
    assert left_out
    with pytest.raises(ValueError, match="selection"):
        settings(selection="similar:0")


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_verbatim_answers_in_batches_are_those_of_ask(model, monkeypatch, threshold):
    monkeypatch.setattr(model.adapter, "_config", model.adapter.config.changed(refusal_threshold=threshold))
    found = evaluate(model, FACTS, settings(num_facts=[40], grounding=["verbatim"], baseline=[], prior=True))
    (size,) = found.sizes
    memory = memory_of(model.adapter, size.facts)
    ids = size.facts.fact_ids_M
    for question, outcome in zip(size.questions, size.outcomes[System("attention", True, "verbatim")], strict=True):
        answer = model.ask(list(question.messages), memory, grounding="verbatim", max_new_tokens=4)
        assert (outcome.text, outcome.refused) == (answer.text, answer.refused)
        if question.wanted:
            cited = {citation.fact_id for citation in answer.citations}
            assert outcome.is_cited is ({int(ids[row]) for row in question.wanted} <= cited)
    # Words lead to the facts here, whatever the model writes.
    exact = found.summary()["sizes"][0]["results"][1]["answers"]["simple"]["exact_match"]["value"]
    assert exact == 1 if threshold is None else exact is not None


def _scores(model, ids, memory) -> np.ndarray:
    from kblam_ray.attention.trace import retrieval_scores

    return retrieval_scores(model.attachment, torch.tensor([ids]), memory).numpy()


def test_without_the_prior_it_is_attention_alone(model, evaluation):
    (size,) = evaluation.sizes
    memory = memory_of(model.adapter, size.facts)
    for question, alone in zip(size.questions, size.outcomes[ALONE], strict=True):
        if question.wanted:
            scores = _scores(model, model.chat.render(list(question.messages)), memory)
            assert list(alone.ranks) == retrieval_ranks(scores, question.wanted)
    assert size.outcomes[ALONE] != size.outcomes[WITH]
    # It is as it was.
    assert model.adapter.config.question_prior == 20.0


def test_the_baselines(model, evaluation):
    (size,) = evaluation.sizes
    for number, question in enumerate(size.questions[:8]):
        asked = ENCODER.encode([question.text])[0]
        keys = size.facts.keys_MP.astype(np.float32)
        cosines = keys @ asked / np.linalg.norm(keys, axis=1) / np.linalg.norm(asked)
        cosine, dense = (size.outcomes[System(name)][number] for name in ("cosine", "dense"))
        if question.wanted:
            assert list(cosine.ranks) == retrieval_ranks(cosines, question.wanted)
        assert cosine.statistic == pytest.approx(float(cosines.max()), abs=1e-5)
        read = [size.facts.facts[row] for row in np.argsort(-cosines, kind="stable")[:5]]
        facts = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in read]
        messages = [*question.messages[:-1], {"role": "user", "content": reading_message(facts, question.text)}]
        assert dense.text == model.ask(messages, None, max_new_tokens=4).text


def test_the_summary_counts_and_groups(evaluation):
    (size,) = evaluation.summary()["sizes"]
    assert size["num_facts"] == 40
    assert size["num_questions"] == {
        "simple": 3, "paraphrase": 3, "misspelt": 3, "two_entity": 3, "follow_up": 3, "unanswerable": 4,
    }  # fmt: skip
    found = {(part["system"], part["prior"], part["grounding"]): part for part in size["results"]}
    assert list(found) == [
        ("attention", False, None),
        ("attention", False, "off"),
        ("attention", True, None),
        ("attention", True, "off"),
        ("cosine", None, None),
        ("dense", None, None),
    ]
    assert set(found["attention", True, None]) == {
        "system", "prior", "grounding", "retrieval", "refusal", "calibration",
    }  # fmt: skip
    assert set(found["attention", True, "off"]) == {"system", "prior", "grounding", "answers", "refusal"}
    assert found["attention", True, None]["retrieval"]["all"]["@1"]["count"] == 15
    assert found["dense", None, None]["answers"]["simple"]["exact_match"]["count"] == 3
    assert set(found["cosine", None, None]["refusal"]["all"]) == {"area_under_curve"}
    stated = {
        name: (part["calibration"]["threshold"], part["calibration"]["is_probability"])
        for name, part in found.items()
        if "calibration" in part
    }
    assert stated == {
        ("attention", False, None): (0.5, True), ("attention", True, None): (0.5, True),
        ("cosine", None, None): (None, False), ("dense", None, None): (None, False),
    }  # fmt: skip


def test_a_row_for_each_question_and_way_of_answering(evaluation):
    rows = evaluation.rows
    assert rows.schema == SCHEMA
    assert len(rows) == 6 * 19
    first = rows.slice(0, 1).to_pylist()[0]
    assert (first["system"], first["prior"], first["kind"], first["num_facts"]) == ("attention", False, "simple", 40)
    assert first["retrieved_at_5"] is (first["ranks"][0] <= 5)


def test_sizes_are_looked_at_before_any_is_evaluated(model):
    told = []
    with pytest.raises(InputError, match="65 facts of 64"):
        evaluate(model, FACTS, settings(num_facts=[4, 65]), progress=told.append)
    assert not told


def test_a_prior_is_had_or_refused():
    plain = tiny_model()
    found = evaluate(plain, FACTS, settings(retrieval_only=True, kinds=["simple"]))
    assert list(found.sizes[0].outcomes) == [ALONE, System("cosine")]
    assert any("no question prior" in note for note in found.notes)
    assert any("no refusal threshold" in note for note in found.notes)
    assert found.sizes[0].outcomes[ALONE][0].refused is None
    with pytest.raises(InputError, match="no question prior"):
        evaluate(plain, FACTS, settings(prior=True))


def test_no_encoder_is_loaded_where_none_is_needed():
    model = tiny_model()
    model._encoder = "no-such-encoder"
    found = evaluate(model, FACTS, settings(retrieval_only=True, baseline=[], kinds=["simple"]))
    assert list(found.sizes[0].outcomes) == [ALONE]


def test_own_questions_are_asked_of_all_facts(model):
    facts = EmbeddedFacts.embed([Fact("AI", "description", "machines that think"), Fact("Ur", "age", "old")], ENCODER)
    own = [
        OwnQuestion(question="What is AI?", entity="AI", property="description"),
        OwnQuestion(question="And Ur?", context=["What is AI?", "Machines."], value="old"),
        OwnQuestion(question="Who is Zorro?", value=None),
        OwnQuestion(question="Hm?"),
    ]
    found = evaluate(model, facts, settings(prior=True, grounding=["off", "cite"]), own=own)
    (size,) = found.sizes
    assert len(size.facts) == 2
    assert [outcome.is_exact is None for outcome in size.outcomes[System("attention", True, "off")]] == [
        False, False, True, True,
    ]  # fmt: skip
    cited = [outcome.is_cited for outcome in size.outcomes[System("attention", True, "cite")]]
    assert cited[0] is not None
    assert cited[1:] == [None, None, None]
    assert [outcome.ranks is None for outcome in size.outcomes[WITH]] == [False, True, True, True]
    assert found.summary()["sizes"][0]["num_questions"] == {"own": 4}
    with pytest.raises(InputError, match="all facts are used"):
        evaluate(model, facts, settings(num_facts=[1]), own=own)


def test_progress_is_told_and_else_nothing_is_said(model, capfd):
    told = []
    evaluate(
        model, FACTS, settings(retrieval_only=True, baseline=[], prior=False, kinds=["simple"]), progress=told.append
    )
    assert told == ["64 facts, attention alone: 3 of 3 questions"]
    assert capfd.readouterr() == ("", "")


def test_a_model_in_training_goes_on_as_it_was(model):
    layers = model.base_model.model.layers
    model.base_model.train()
    layers[0].eval()
    try:
        evaluate(model, FACTS, settings(retrieval_only=True, baseline=[], prior=False, kinds=["simple"]))
        assert [layer.training for layer in layers[:2]] == [False, True]
        assert all(parameter.grad is None for parameter in model.adapter.parameters())
    finally:
        model.base_model.eval()


def test_facts_of_another_encoder_are_refused(model):
    from kblam_ray.encoders import load_encoder

    other = EmbeddedFacts.embed([Fact("Ur", "age", "old")], load_encoder("hashing:32"))
    with pytest.raises(EncoderMismatchError):
        evaluate(model, other, settings())


def test_the_same_questions_again(model, evaluation):
    drawn = EvaluationSet.draw(FACTS, 40, settings(), refusal=model.adapter.config.refusal_text)
    assert drawn.questions == evaluation.sizes[0].questions


@pytest.mark.parametrize("selection", ["all", "similar:9"])
def test_facts_with_one_key_tie_and_a_tie_is_a_miss(model, monkeypatch, selection):
    """Though the last bits of a product may differ from row to row."""
    keys = FACTS.keys_MP.copy()
    keys[32:] = keys[:32]
    twins = EmbeddedFacts(FACTS.facts, FACTS.fact_ids_M, keys, FACTS.values_MP, ENCODER.spec)

    def rounded_another_way(*given, **options):
        found = evidence_of(*given, **options)
        for one in found:
            one.scores_M.mul_(1 + 1e-6 * torch.arange(len(one.scores_M)))
        return found

    monkeypatch.setattr("kblam_ray.evaluation.attending.evidence_of", rounded_another_way)
    chosen = settings(kinds=["simple"], num_questions=20, retrieval_only=True, selection=selection)
    (size,) = evaluate(model, twins, chosen).sizes
    for system in (ALONE, WITH, System("cosine")):
        ranks = [rank for one in size.outcomes[system] for rank in one.ranks]
        # Every key is there twice; of those selected one may be there without the other.
        assert len(ranks) == 20
        assert min(ranks) >= (2 if selection == "all" or system.name == "cosine" else 1)
        assert selection != "all" or all(rank % 2 == 0 for rank in ranks)
