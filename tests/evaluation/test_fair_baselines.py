"""The baselines are fair: one wording, one way of decoding, and searches that equal comparing every fact."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from evaluation_samples import ENCODER, synthetic, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from model_samples import llama_tokenizer, tiny_adapter, tiny_llama

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.evaluation.baselines import answering
from kblam_ray.evaluation.baselines.bm25 import WordSearch
from kblam_ray.evaluation.baselines.cosine import KeySearch
from kblam_ray.evaluation.baselines.prompts import InContext, reading_messages, reading_prompt
from kblam_ray.evaluation.baselines.run import baseline_outcomes
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.outcomes import System
from kblam_ray.evaluation.question_embeddings import RememberingEncoder
from kblam_ray.evaluation.questions import Asked, EvaluationSet
from kblam_ray.evaluation.run import evaluate
from kblam_ray.evaluation.settings import ALL_BASELINES, EvaluationSettings
from kblam_ray.evaluation.task import Task
from kblam_ray.model import KnowledgeModel
from kblam_ray.model.grounding import reading_message
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.table.embedded import EmbeddedFacts

FACTS = synthetic(48, seed=3)
READERS = ("in_context", "dense", "bm25")
MOST = 4


def settings(**given) -> EvaluationSettings:
    chosen = {"num_questions": 2, "num_facts": [24], "max_new_tokens": MOST, "read_facts": 3, "batch_size": 3}
    return EvaluationSettings(**{**chosen, "grounding": ["off"], "baseline": list(ALL_BASELINES), **given})


def roomy_model(max_positions: int = 8_192, **adapter) -> KnowledgeModel:
    base = tiny_llama(0, max_position_embeddings=max_positions)
    model = KnowledgeModel(base, tiny_adapter(base, "shared", **adapter), llama_tokenizer(), ENCODER)
    # Greedy answers of a random model hang on the last digits.
    model.base_model.double()
    model.adapter.double()
    return model


def task_of(model: KnowledgeModel, chosen: EvaluationSettings) -> Task:
    drawn = EvaluationSet.draw(FACTS, chosen.num_facts[0], chosen, refusal=model.adapter.config.refusal_text)
    return Task.of(model, drawn, chosen, RememberingEncoder(ENCODER), None)


def outcomes_of(task: Task, left_out: dict[str, str] | None = None):
    return baseline_outcomes(task, QuestionPrior.of(task.model.adapter.config, task.encoder), left_out)


@pytest.fixture(scope="module")
def model():
    return roomy_model(question_prior=20.0)


@pytest.fixture(scope="module")
def task(model):
    return task_of(model, settings())


@pytest.fixture(scope="module")
def asked(task):
    """Outcomes, and by baseline the prompts that the base model was given, in the order of the questions."""
    given: dict[str, list] = {}
    plain_written = answering.written

    def written(task, what, prompts):
        given[what] = list(prompts)
        return plain_written(task, what, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kblam_ray.evaluation.baselines.run.written", written)
        outcomes = outcomes_of(task)
    return outcomes, given


def conversation(question: Asked, facts) -> list[dict[str, str]]:
    rows = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in facts]
    return [*question.messages[:-1], {"role": "user", "content": reading_message(rows, question.text)}]


def line(fact) -> str:
    return f"- the {fact.property} of {fact.entity}: {fact.value}\n"


def test_prompts_differ_in_the_facts_listed_and_in_nothing_else(model, task, asked):
    _, given = asked
    assert set(given) == {"zero_shot", *READERS}
    lines = [line(fact) for fact in task.facts.facts]
    for number, question in enumerate(task.questions):
        frames = set()
        for name in READERS:
            text = model.tokenizer.decode(given[name][number])
            listed = [one for one in lines if one in text]
            assert len(listed) == (24 if name == "in_context" else 3)
            for one in listed:
                assert text.count(one) == 1
                text = text.replace(one, "")
            frames.add(text)
        bare = model.tokenizer.decode(given["zero_shot"][number])
        assert frames == {bare.replace(question.text, f"Facts:\nQuestion: {question.text}")}
        assert given["zero_shot"][number] == model.chat.render(question.messages)


def test_all_facts_stand_in_the_prompt_in_the_order_of_the_table(task, asked, model):
    _, given = asked
    listing = "".join(map(line, task.facts.facts))
    assert all(listing in model.tokenizer.decode(prompt) for prompt in given["in_context"])


def test_answers_are_those_of_ask_and_of_generate(model, task, asked):
    outcomes, given = asked
    for name in ("zero_shot", *READERS):
        for number, (question, outcome) in enumerate(zip(task.questions, outcomes[System(name)], strict=True)):
            if name == "zero_shot":
                messages = list(question.messages)
            else:
                text = model.tokenizer.decode(given[name][number])
                at = {fact: text.index(line(fact)) for fact in task.facts.facts if line(fact) in text}
                messages = conversation(question, sorted(at, key=at.__getitem__))
            assert given[name][number] == model.chat.render(messages)
            assert outcome.text == model.ask(messages, None, grounding="off", max_new_tokens=MOST).text
    prompt = torch.tensor([given["dense"][0]])
    ids = model.base_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MOST, do_sample=False
    )
    written = model.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    assert outcomes[System("dense")][0].text == written


def test_without_facts_it_is_the_bare_base_model_bit_for_bit(model, task, asked):
    outcomes, given = asked
    bare = tiny_llama(0, max_position_embeddings=8_192).double()
    assert not torch.equal(model(torch.tensor([given["zero_shot"][0]]), knowledge=task.memory).logits,
                           bare(torch.tensor([given["zero_shot"][0]])).logits)  # fmt: skip
    for prompt, outcome in zip(given["zero_shot"], outcomes[System("zero_shot")], strict=True):
        ids = torch.tensor([prompt])
        assert torch.equal(model(ids).logits, bare(ids).logits)
        written = bare.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False)
        assert outcome.text == llama_tokenizer().decode(written[0, len(prompt) :], skip_special_tokens=True).strip()


def brute_force_cosines(question: str, keys_MP: np.ndarray) -> np.ndarray:
    asked = ENCODER.encode([question])[0].astype(np.float64)
    # Row by row: equal keys have equal cosines.
    return np.array(
        [float(key @ asked) / float(np.linalg.norm(key) * np.linalg.norm(asked)) for key in keys_MP.astype(np.float64)]
    )


def random_keys(num_facts: int, seed: int = 0) -> EmbeddedFacts:
    """Facts with keys that no question is equally near to, but for pairs that are one key."""
    keys = np.random.default_rng(seed).standard_normal((num_facts, 64)).astype(np.float16)
    keys[num_facts // 2 :] = keys[: num_facts - num_facts // 2]
    facts = FACTS.take(range(num_facts))
    return EmbeddedFacts(facts.facts, facts.fact_ids_M, keys, facts.values_MP, ENCODER.spec)


@pytest.mark.parametrize("block", [5, 4_096])
def test_cosine_and_dense_are_brute_force(model, monkeypatch, block):
    monkeypatch.setitem(sys.modules["kblam_ray.model.prior"].BLOCK_ROWS, "cpu", block)
    chosen = settings(baseline=["cosine", "dense"], num_facts=[30])
    drawn = EvaluationSet.draw(random_keys(30), None, chosen, refusal="")
    task = Task.of(model, drawn, chosen, RememberingEncoder(ENCODER), None)
    outcomes = outcomes_of(task)
    for number, question in enumerate(drawn.questions):
        cosines = brute_force_cosines(question.text, drawn.facts.keys_MP)
        cosine, dense = (outcomes[System(name)][number] for name in ("cosine", "dense"))
        if question.wanted:
            assert list(cosine.ranks) == retrieval_ranks(cosines, question.wanted)
            # Every key is there twice: nothing stands alone in the first place.
            assert min(cosine.ranks) >= 2
        assert cosine.statistic == dense.statistic == pytest.approx(cosines.max(), abs=1e-5)
        read = [drawn.facts.facts[row] for row in np.argsort(-cosines, kind="stable")[:3]]
        assert dense.text == model.ask(conversation(question, read), None, max_new_tokens=MOST).text


def test_the_question_that_is_searched_for_is_the_one_that_the_prior_reads():
    question = Asked("own", ({"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Hm."},
                             {"role": "user", "content": "Its capital?"}), None)  # fmt: skip
    found = {}
    for context in ("last", "last_two"):
        prior = QuestionPrior(ENCODER, context=context)
        (found[context],) = KeySearch(prior, FACTS).scores([question])
        text = {"last": "Its capital?", "last_two": "Peru?\nIts capital?"}[context]
        np.testing.assert_allclose(found[context], brute_force_cosines(text, FACTS.keys_MP), atol=1e-5)
    assert not np.array_equal(found["last"], found["last_two"])


def test_all_facts_are_left_out_at_the_first_size_that_does_not_fit(model, monkeypatch):
    config = model.base_model.config
    for num_facts in (3, 4, 5):
        task = task_of(model, settings(baseline=["in_context"], num_facts=[num_facts]))
        longest = max(len(model.chat.render(conversation(one, task.facts.facts))) for one in task.questions)
        monkeypatch.setattr(config, "max_position_embeddings", longest + MOST)
        left_out: dict[str, str] = {}
        assert list(outcomes_of(task, left_out)) == [System("in_context")]
        assert not left_out
        monkeypatch.setattr(config, "max_position_embeddings", longest + MOST - 1)
        assert not outcomes_of(task, left_out)
        assert list(left_out) == ["in_context"]
        assert f"{longest + MOST - 1:,}" in left_out["in_context"]
        made = InContext.of(model, task.questions, task.facts.facts, MOST)
        assert made.prompts is None
        assert longest + MOST - 1 < made.num_tokens + MOST <= longest + MOST
        assert f"{made.num_tokens + MOST:,} tokens" in left_out["in_context"]


def test_what_does_not_fit_is_named_in_the_summary(model, monkeypatch):
    monkeypatch.setattr(model.base_model.config, "max_position_embeddings", 256)
    chosen = settings(num_facts=[2, 24], baseline=["in_context"], kinds=["simple"], prior=False)
    small, large = evaluate(model, FACTS, chosen).summary()["sizes"]
    assert "in_context" in [part["system"] for part in small["results"]]
    assert "in_context" not in small["left_out"]
    assert "in_context" not in [part["system"] for part in large["results"]]
    assert "256" in large["left_out"]["in_context"]


def test_facts_are_read_as_far_as_they_fit(model, monkeypatch):
    facts = FACTS.facts[:6]
    question = Asked("own", ({"role": "user", "content": "Who?"},), None)
    length = [len(model.chat.render(reading_messages(question, facts[:num]))) for num in range(7)]
    assert sorted(set(length)) == length
    for num in range(7):
        for spare in (0, length[min(num + 1, 6)] - length[num] - 1):
            monkeypatch.setattr(model.base_model.config, "max_position_embeddings", length[num] + MOST + spare)
            prompt = reading_prompt(model, question, facts, MOST)
            assert prompt == model.chat.render(reading_messages(question, facts[:num]))
            if num == 6:
                break


def test_answers_are_judged_and_refused_by_their_text(model, task, monkeypatch):
    refusal = model.adapter.config.refusal_text

    def written(task, what, prompts):
        values = [" and ".join(question.values) for question in task.questions]
        return [value if number % 2 and value else refusal for number, value in enumerate(values)]

    monkeypatch.setattr("kblam_ray.evaluation.baselines.run.written", written)
    found = outcomes_of(task)
    for name in ("zero_shot", *READERS):
        assert [one.refused for one in found[System(name)]] == [
            not (number % 2 and question.values) for number, question in enumerate(task.questions)
        ]
        exact = [one.is_exact for one in found[System(name)]]
        assert exact == [
            bool(number % 2) if question.values else None for number, question in enumerate(task.questions)
        ]
    statistics = {name: [one.statistic for one in found[System(name)]] for name in ALL_BASELINES}
    assert statistics["dense"] == statistics["cosine"]
    assert set(statistics["zero_shot"]) == set(statistics["in_context"]) == {None}
    assert None not in statistics["bm25"]


def test_without_answers_there_are_the_searches_alone(model):
    task = task_of(model, settings(retrieval_only=True))
    found = outcomes_of(task)
    assert list(found) == [System("cosine"), System("bm25")]
    assert all(one.text is None for outcomes in found.values() for one in outcomes)
    # The search by words is a way to answer and one to retrieve.
    assert [one.ranks is None for one in found[System("bm25")]] == [not one.wanted for one in task.questions]


@pytest.mark.parametrize("baseline", [["zero_shot", "in_context", "bm25"], []])
def test_no_encoder_is_loaded_where_no_baseline_embeds(baseline):
    plain = tiny_model()
    plain._encoder = "no-such-encoder"
    chosen = settings(baseline=baseline, kinds=["simple"], num_facts=[2], max_new_tokens=1)
    (size,) = evaluate(plain, FACTS, chosen).sizes
    assert {system.name for system in size.outcomes} == {"attention", *baseline}
    assert not size.left_out
    with pytest.raises(InputError, match="no encoder"):
        baseline_outcomes(task_of(plain, settings(baseline=["cosine"])), None)


def test_a_missing_package_is_told_before_any_question_is_asked(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    told = []
    with pytest.raises(MissingDependencyError, match="bm25s"):
        evaluate(model, FACTS, settings(baseline=["bm25"]), progress=told.append)
    assert not told


@given(st.lists(st.integers(1, 5_000), max_size=40), st.integers(1, 9), st.integers(1, 20_000))
def test_batches_hold_every_prompt_once_within_their_bounds(lengths, batch_size, most_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "TOKENS_PER_BATCH", most_tokens)
        patch.setattr(answering, "PAIRS_PER_BATCH", most_tokens * 100)
        batches = list(answering.bounded_batches(lengths, batch_size))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or (
            len(batch) <= batch_size
            and len(batch) * longest <= most_tokens
            and len(batch) * longest * longest <= most_tokens * 100
        )
    assert all(len(batch) > 0 for batch in batches)


@pytest.mark.parametrize("context", ["last", "last_two"])
def test_both_searches_read_as_many_turns_as_the_prior(context):
    model = roomy_model(prior_context=context)
    task = task_of(model, settings(kinds=["follow_up"], retrieval_only=True))
    found = outcomes_of(task)
    turns = {"last": 1, "last_two": 2}[context]
    words = WordSearch(task.facts.facts, turns).scores(task.questions)
    assert [one.statistic for one in found[System("bm25")]] == words.max(1).tolist()
    for question, one in zip(task.questions, found[System("cosine")], strict=True):
        said = [message["content"] for message in question.messages if message["role"] == "user"]
        cosines = brute_force_cosines("\n".join(said[-turns:]), task.facts.keys_MP)
        assert one.statistic == pytest.approx(cosines.max(), abs=1e-5)


def test_a_beginning_that_prompts_share_is_read_once(model, task, monkeypatch):
    """And the answers are those to each prompt by itself, tokens of the beginning in them or not."""
    questions = [one for one in task.questions if one.kind != "follow_up"]
    prompts = [model.chat.render(conversation(question, task.facts.facts)) for question in questions]
    prompts += [prompts[0][:-1], model.chat.render(task.questions[0].messages), prompts[1]]
    lengths: list[int] = []
    plain = answering.Beginning.__init__

    def reads(self, model, ids):
        lengths.append(len(ids))
        plain(self, model, ids)

    monkeypatch.setattr(answering.Beginning, "__init__", reads)
    found = answering.written(task, "in_context", prompts)
    # All but the one without facts.
    listing = len(model.chat.render(conversation(questions[0], task.facts.facts)))
    assert len(lengths) == 1
    assert answering.SHARED_TOKENS < lengths[0] < min(listing, len(prompts[0]) - 1)
    assert lengths[0] > 0.8 * listing
    for prompt, text in zip(prompts, found, strict=True):
        assert text == answering.generate_answers(model, [prompt], None, MOST)[0]
    # A prompt that is the whole beginning of another still has a token of its own to go on from.
    assert answering._num_shared([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert answering._num_shared([[1, 2, 3], [1, 2, 3]]) == 2
    assert answering._num_shared([[1, 2, 3], [1, 4], [1, 2, 3]]) == 1
    assert answering._num_shared([[1], [2, 3]]) == 0
