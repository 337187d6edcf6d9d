"""What the demo model reads: questions, with and without facts to read, and their answers, in its chat template.

Three kinds of document:

- reading: facts, a question, the answer that stands in one of them or the refusal: how the model learns to copy names,
  numbers and codes it has never met. The number of facts grows in the course of training.
- question: the question alone. Its answer is the sentence around the value, by turns with the refusal: with a knowledge
  base attached it is the facts attended to that decide between the two.
- repeating: any text, once more, in every script: where copying starts, and where it starts soonest.

Document i of a seed is a pure function of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from kblam_ray.demo.pretraining.tokenizer import ASSISTANT, END, USER
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import REFUSAL, Question, QuestionKind, QuestionMaker
from kblam_ray.facts.questions.forms import answer_sentence
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.model.grounding.reading import reading_message

_QUESTION, _READING, _REPEATING = map(number_of, ("question document", "reading document", "repeating document"))

QUESTION_MIX: dict[QuestionKind, float] = {
    "simple": 0.5,
    "paraphrase": 0.15,
    "misspelt": 0.1,
    "two_entity": 0.1,
    "follow_up": 0.15,
}
READING_MIX: dict[QuestionKind, float] = {
    "simple": 0.4,
    "paraphrase": 0.08,
    "misspelt": 0.06,
    "two_entity": 0.12,
    "follow_up": 0.05,
    "open_ended": 0.06,
    "unanswerable": 0.23,
}
MOST_FACTS = 6
PROMPT_WEIGHT = 0.25
"""Of the loss at the facts and the question of a reading: where a name comes again, there is copying to be learnt."""

VALUE_WEIGHT = 0.3
"""Of the loss at a value that no fact states: it teaches what a date or a name looks like, more it cannot."""

_SCRIPTS = ((0x21, 0x7E), (0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A),
            (0x905, 0x939), (0xE01, 0xE2E), (0x3041, 0x3093), (0x30A1, 0x30F3), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
            (0x1F600, 0x1F64F))  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A prompt and its answer as texts.

    Attributes:
        prompt: up to where the answer begins, control tokens included.
        answer: with the control token that ends it.
        parts: `(end, pair)`: up to which character the answer speaks of which (entity, property).
        values: `(start, end)`: characters of the answer that state a value which the prompt does not.
        is_read: the prompt has facts in it, whose names and words come again.
    """

    prompt: str
    answer: str
    parts: tuple[tuple[int, tuple[str, str]], ...] = ()
    values: tuple[tuple[int, int], ...] = ()
    is_read: bool = False


class DocumentMaker:
    """Makes documents about some facts, by number."""

    def __init__(self, facts: list[Fact], seed: int = 0) -> None:
        self._facts, self._seed = facts, seed
        self._maker = QuestionMaker(facts, seed)
        self._of_entity: dict[str, list[int]] = {}
        self._of_property: dict[str, list[int]] = {}
        for number, fact in enumerate(facts):
            self._of_entity.setdefault(fact.entity, []).append(number)
            self._of_property.setdefault(fact.property, []).append(number)

    def question(self, number: int) -> Document:
        """Document `number` of those without facts to read."""
        draws = Draws(self._seed, _QUESTION, number)
        question = next(self._maker.questions(number, number + 1, QUESTION_MIX))
        prompt = _prompt(question.context, question.text)
        if draws.below(2):
            return Document(prompt, REFUSAL + END, ((0, question.asked[0]),))
        parts, values = self._parts(question)
        return Document(prompt, question.answer + END, parts, values)

    def reading(self, number: int, progress: float) -> Document:
        """Document `number` of those with facts to read; `progress` through training, 0 to 1, says how many at most."""
        draws = Draws(self._seed, _READING, number)
        question = next(self._maker.questions(number, number + 1, READING_MIX))
        numbers = self._read(question, min(MOST_FACTS, 1 + int(progress * 7)), draws)
        read = [self._facts[n] for n in numbers]
        rows = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in read]
        prompt = _prompt(question.context, reading_message(rows, question.text))
        parts = self._parts(question)[0] if question.facts else ()
        return Document(prompt, question.answer + END, parts, is_read=True)

    def repeating(self, number: int) -> Document:
        """Document `number` of those that ask for a text once more."""
        draws = Draws(self._seed, _REPEATING, number)
        kind = draws.below(10)
        if kind < 3:
            text = draws.pick(self._facts).value
        elif kind < 6:
            fact = draws.pick(self._facts)
            text = f"the {fact.property} of {fact.entity}"
        elif kind < 8:
            text = " ".join(draws.pick(self._facts).entity for _ in range(2))
        else:
            low, high = draws.pick(_SCRIPTS)
            text = "".join(chr(draws.between(low, high)) for _ in range(draws.between(2, 12)))
        return Document(f"{USER}Repeat: {text}{END}{ASSISTANT}", text + END)

    def _parts(self, question: Question) -> tuple[tuple[tuple[int, tuple[str, str]], ...], tuple[tuple[int, int], ...]]:
        parts, values, end = [], [], 0
        given = list(question.values)
        for pair in question.asked:
            count = sum(self._facts[n].entity == pair[0] and self._facts[n].property == pair[1] for n in question.facts)
            own, given = given[:count], given[count:]
            start, end = end, end + len(answer_sentence(*pair, own))
            at = question.answer.find(own[0], start + (len(pair[0]) + len(pair[1]) if own[0] != question.answer else 0))
            if 0 <= at < end:
                values.append((at, end))
            end += 1  # the blank between two sentences
            parts.append((end, pair))
        return tuple(parts), tuple(values)

    def _read(self, question: Question, most: int, draws: Draws) -> list[int]:
        """Numbers of the facts to read: those needed, others of the same entity and property, and any others."""
        asked = set(question.asked)
        wanted = list(dict.fromkeys(question.facts))
        total = max(len(wanted), draws.between(1, most))
        others: list[int] = []
        for entity, property in question.asked:
            others += draws.sample(self._of_entity.get(entity, []), 3)
            alike = self._of_property.get(property, [])
            others += [draws.pick(alike) for _ in range(2)] if alike else []
        others = draws.sample(others, len(others))
        others += [draws.below(len(self._facts)) for _ in range(most)]
        chosen = wanted + [
            n
            for n in dict.fromkeys(others)
            if n not in wanted and (self._facts[n].entity, self._facts[n].property) not in asked
        ]
        return draws.sample(chosen[: max(total, 1)], MOST_FACTS * 2)


def _prompt(context: tuple[str, ...], question: str) -> str:
    turns = [f"{(USER, ASSISTANT)[place % 2]}{text}{END}" for place, text in enumerate(context)]
    return "".join(turns) + f"{USER}{question}{END}{ASSISTANT}"
