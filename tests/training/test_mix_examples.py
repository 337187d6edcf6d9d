"""Training examples are a function of their number; their knowledge bases hold what they want, or surely no answer."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from model_samples import llama_tokenizer
from pydantic import ValidationError
from training.mix_samples import embedded, make, of_kind, synthetic

from kblam_ray.errors import InputError
from kblam_ray.facts.questions import QUESTION_KINDS, REFUSAL, QuestionMaker
from kblam_ray.facts.split import is_held_out
from kblam_ray.facts.synthetic.draws import Draws
from kblam_ray.facts.synthetic.properties import PROPERTY_TYPES
from kblam_ray.training.mix import MixSettings
from kblam_ray.training.mix.examples import TEXT
from kblam_ray.training.mix.rows import KeySketch


def same(first, second) -> bool:
    arrays = ("input_ids", "kb_rows", "wanted_at", "wanted_places")
    return (first.number, first.kind, first.answer_start) == (second.number, second.kind, second.answer_start) and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays
    )


def asked(maker, example):
    """The question of an example whose first attempt was taken."""
    return next(maker._questions.attempts(example.kind, example.number))


def texts_of(maker, example) -> tuple[str, str]:
    """Prompt and answer, decoded."""
    tokenizer, ids, start = maker.chat.tokenizer, example.input_ids.tolist(), example.answer_start
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.mark.parametrize("kb_per", ["example", "batch"])
def test_an_example_depends_on_its_number_alone(kb_per):
    maker = make(kb_per=kb_per)
    in_order = [maker.example(number) for number in range(48)]
    again = make(kb_per=kb_per)
    sent = pickle.loads(pickle.dumps(make(kb_per=kb_per)))
    assert sent.facts is None
    for number in (40, 3, 17, 47, 0, 16):
        assert same(again.example(number), in_order[number])
        assert same(sent.example(number), in_order[number])
    other = make(kb_per=kb_per, seed=5)
    assert not any(same(other.example(number), in_order[number]) for number in range(16))


def test_examples_are_of_every_kind_in_their_shares():
    maker = make(batch_size=32)
    kinds = Counter(maker.example(number).kind for number in range(160))
    assert set(kinds) == {*QUESTION_KINDS, TEXT}
    for kind, share in maker.shares.items():
        assert kinds[kind] == pytest.approx(160 * share, abs=2.5)


@pytest.mark.parametrize("kb_per", ["example", "batch"])
def test_the_knowledge_base_holds_the_facts_that_the_answer_states(kb_per):
    maker = make(kb_per=kb_per)
    for example in (maker.example(number) for number in range(96)):
        rows = example.kb_rows.tolist()
        assert len(set(rows)) == len(rows)
        _, answer = texts_of(maker, example)
        wanted = {place for places in example.wanted for place in places}
        assert bool(wanted) == (example.kind not in (TEXT, "unanswerable"))
        for place in wanted:
            fact = maker.facts.facts[rows[place]]
            assert fact.value in answer
        if example.kind == "unanswerable":
            assert answer.startswith(REFUSAL)
        elif example.kind == "two_entity":
            assert len({maker.facts.facts[rows[place]].entity for place in wanted}) == 2
        elif example.kind == "open_ended":
            assert len({maker.facts.facts[rows[place]].entity for place in wanted}) == 1
            assert set(example.wanted[0]) == wanted  # at the last prompt token all of them


def test_an_unanswerable_question_is_surely_not_answered():
    maker = make()
    reasons = Counter()
    for example in of_kind(maker, "unanswerable", 60):
        question = asked(maker, example)
        (entity, property) = question.question.asked[0]
        reasons[question.question.reason] += 1
        known = PROPERTY_TYPES.get(property.casefold())
        names = {property.casefold(), *(known.synonyms if known else ())}
        for row in example.kb_rows.tolist():
            fact = maker.facts.facts[row]
            assert (fact.entity.casefold(), fact.property.casefold()) not in {(entity.casefold(), n) for n in names}
            assert row not in question.forbidden
        assert not len(example.wanted_at)
    # About half ask for a fact that is there and is withheld.
    assert 15 <= reasons[None] <= 45
    assert {"same_entity", "same_property", "unknown_entity"} <= set(reasons)


def test_a_synonym_and_a_description_may_be_answers():
    facts = embedded(
        ("Lund", "area", "9 km²"),
        ("lund", "surface", "9 km²"),
        ("Lund", "description", "a small town"),
        ("Lund", "mayor", "Ann"),
        ("Bern", "area", "51 km²"),
        ("Bern", "mayor", "Bo"),
    )
    maker = make(facts, held_out=0, kb_size=(3, 3), withheld=1, question_mix={"unanswerable": 1}, text_share=0)
    seen = set()
    for number in range(60):
        example = maker.example(number)
        entity, property = asked(maker, example).question.asked[0]
        stated = {(maker.facts.facts[row].entity, maker.facts.facts[row].property) for row in example.kb_rows}
        if (entity, property) == ("Lund", "area"):
            seen.add(property)
            assert stated <= {("Lund", "mayor"), ("Bern", "area"), ("Bern", "mayor")}
    assert seen


def test_nothing_held_out_is_in_a_question_or_a_knowledge_base():
    maker = make(synthetic(600), held_out=0.3, held_out_seed=4)
    assert {is_held_out(fact.entity, 0.3, 4) for fact in synthetic(600).facts} == {True, False}
    for number in range(160):
        example = maker.example(number)
        assert not any(is_held_out(maker.facts.facts[row].entity, 0.3, 4) for row in example.kb_rows)
        if example.kind not in (TEXT, "misspelt"):
            assert not any(is_held_out(entity, 0.3, 4) for entity, _ in asked(maker, example).question.asked)


def test_a_name_is_not_misspelt_into_one_that_is_held_out():
    name = next(
        name for name in (f"Marlowen {end}" for end in ("A", "B", "C", "D", "E", "F")) if not is_held_out(name, 0.5)
    )
    spelt = {f"{name[:at]}{name[at + 1 :]}" for at in range(1, len(name))}
    spelt |= {f"{name[:at]}{name[at]}{name[at:]}" for at in range(1, len(name))}
    out = sorted(other for other in spelt if is_held_out(other, 0.5))
    assert len(out) > 5
    facts = embedded((name, "mayor", "Ann"), ("Ur", "area", "1 km²"), *((other, "mayor", "Bo") for other in out))
    train = [fact for fact in facts.facts if not is_held_out(fact.entity, 0.5)]
    asked_alone = [QuestionMaker(train).make("misspelt", number).text for number in range(200)]
    assert any(other in text for text in asked_alone for other in out)
    maker = make(facts, held_out=0.5, kb_size=(1, 1), question_mix={"misspelt": 1}, text_share=0)
    for number in range(200):
        prompt, _ = texts_of(maker, maker.example(number))
        assert not any(other in prompt for other in out)


def test_sizes_of_knowledge_bases():
    maker = make(kb_size=(5, 300))
    sizes = [maker.kb_size(step) for step in range(2_000)]
    assert min(sizes) == 5
    assert max(sizes) == 300
    # Evenly over the orders of magnitude: as many below the geometric mean as above.
    assert sum(size < (5 * 300) ** 0.5 for size in sizes) / 2_000 == pytest.approx(0.5, abs=0.05)
    growing = make(kb_size=(5, 300), kb_growth_steps=100)
    assert growing.kb_size(0) == 5
    assert max(growing.kb_size(step) for step in range(50)) < 50
    assert 290 < max(growing.kb_size(step) for step in range(100, 2_000)) <= 300
    for number in range(48):
        assert len(maker.example(number).kb_rows) == min(maker.kb_size(number // 16), len(maker.facts))


def test_mistakable_facts_in_their_share():
    def share_mistakable(example, maker):
        facts = [maker.facts.facts[row] for row in example.kb_rows]
        right = facts[example.wanted[0][0]]
        others = [fact for fact in facts if fact is not right]
        return sum(right.property == fact.property or right.entity == fact.entity for fact in others) / len(others)

    found = {}
    for hard in (0.0, 0.5, 1.0):
        maker = make(synthetic(2_000), kb_size=(20, 20), hard_negatives=hard)
        found[hard] = np.mean([share_mistakable(example, maker) for example in of_kind(maker, "simple", 30)])
    assert found[0.0] < 0.1
    assert 0.25 < found[0.5] < found[1.0]


def test_alike_names_and_nearest_keys_are_among_the_mistakable():
    alike = [(f"Velonta {mark}", "mayor", f"M{mark}") for mark in ("I", "II", "III", "IV")]
    others = [(f"Thing {number:03d}", f"part {number}", "x") for number in range(200)]
    maker = make(embedded(*alike, *others), held_out=0, kb_size=(5, 5), hard_negatives=1.0)
    asked_for = [("Velonta I", "mayor")]
    assert {1, 2, 3} <= set(maker._neighbours.fill([0], asked_for, (), 12, 1.0, Draws(1)).tolist())
    assert not {1, 2, 3} <= set(maker._neighbours.fill([0], asked_for, (), 12, 0.0, Draws(1)).tolist())
    # Names that begin or end alike, though nothing else is alike.
    assert {1, 2} <= set(maker._neighbours._with_alike_names("Velonta I", "colour", Draws(1)))
    sketch = KeySketch(maker.facts.keys_MP)
    exact = np.argsort(-(maker.facts.keys_MP.astype(np.float32) @ maker.facts.keys_MP[0].astype(np.float32)))
    assert set(sketch.nearest(0, 3)) == set(exact[1:4].tolist())


def test_one_knowledge_base_for_a_step():
    maker = make(kb_per="batch", kb_size=(16, 30))
    examples = [maker.example(number) for number in range(16)]
    assert all(np.array_equal(example.kb_rows, examples[0].kb_rows) for example in examples)
    assert not np.array_equal(maker.example(16).kb_rows[:16], examples[0].kb_rows[:16])
    for example in examples:
        if example.kind == "unanswerable":
            assert asked_in(maker, example).forbidden.isdisjoint(example.kb_rows.tolist())


def asked_in(maker, example):
    return maker._step(example.number // maker.settings.batch_size).asked[example.number]


def test_a_shared_knowledge_base_needs_a_fact_per_question():
    with pytest.raises(ValidationError, match="as many facts as questions"):
        MixSettings(kb_per="batch", kb_size=(8, 100), batch_size=16)
    for wrong in ({"kb_size": (9, 3)}, {"question_mix": {"simple": 0}}, {"question_mix": {"hard": 1}}):
        with pytest.raises(ValidationError):
            MixSettings(**wrong)


def test_tables_that_do_not_allow_what_is_asked(caplog):
    lonely = embedded(("Ur", "founder", "Meskalamdug"), ("Lund", "mayor", "Ann"))
    maker = make(lonely, held_out=0, kb_size=(1, 2), batch_size=8)
    assert "follow_up" in caplog.text
    assert "follow_up" not in maker.shares
    assert sum(maker.shares.values()) == pytest.approx(1)
    assert {maker.example(number).kind for number in range(40)} <= set(maker.shares)
    with pytest.raises(InputError, match="allow no questions of the kinds follow_up"):
        make(lonely, held_out=0, kb_size=(1, 2), question_mix={"follow_up": 1})
    with pytest.raises(InputError, match="left to train on"):
        make(lonely, held_out=0, kb_size=(3, 3))


def test_no_example_is_longer_than_allowed():
    maker = make(max_tokens=220)
    lengths = [len(maker.example(number).input_ids) for number in range(96)]
    assert max(lengths) <= 220
    short = make(max_tokens=20, text_share=0)
    with pytest.raises(InputError, match="none of 32"):
        short.example(0)


def test_a_text_is_read_and_not_learnt():
    maker = make(batch_size=8)
    for example in of_kind(maker, TEXT, 12):
        assert (example.labels == -100).all()
        assert len(example.kb_rows) >= 20
        assert not len(example.wanted_at)
    assert len({text.input_ids.tobytes() for text in of_kind(maker, TEXT, 12)}) == 12


def test_many_values_of_one_property_are_all_right():
    facts = embedded(("Peru", "language", "Spanish"), ("Peru", "language", "Quechua"), ("Lund", "mayor", "Ann"))
    maker = make(facts, held_out=0, kb_size=(3, 3), question_mix={"simple": 1}, text_share=0)
    tokenizer = llama_tokenizer()
    for example in (maker.example(number) for number in range(20)):
        _, answer = texts_of(maker, example)
        if "language" in answer:
            assert len(example.wanted[0]) == 2
            for row, value in ((0, "Spanish"), (1, "Quechua")):
                place = example.kb_rows.tolist().index(row)
                tokens = [
                    token
                    for token, places in zip(example.input_ids[example.answer_start :], example.wanted, strict=True)
                    if places == (place,)
                ]
                assert value in tokenizer.decode(tokens)
