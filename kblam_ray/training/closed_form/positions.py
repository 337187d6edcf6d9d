"""Where in a question and its answer a fact is asked, introduced and stated, token by token.

The attention at a token writes the next one, so a token's part is that of the token after it:

| part   | tokens                                                   | the key wanted there            |
|--------|----------------------------------------------------------|---------------------------------|
| PROMPT | the last prompt token                                    | the first fact's                |
| COPY   | before the words that lead to a value                    | that value's fact               |
| VALUE  | before the words of a value                              | that value's fact               |
| OTHER  | before other words: the question's, a refusal's, the end | none                            |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import Question
from kblam_ray.model.chat import ChatTemplate

OTHER, PROMPT, COPY, VALUE = range(4)
PARTS = ("other", "prompt", "copy", "value")
NO_FACT = -1


@dataclass(frozen=True)
class StatedValue:
    """One value in an answer.

    Attributes:
        fact: number of the fact (of the first, where several are listed).
        tokens: positions in `input_ids` of the tokens it is written with.
    """

    fact: int
    tokens: range


@dataclass(frozen=True)
class AskedTokens:
    """A question with its answer as token ids.

    Attributes:
        input_ids: prompt, answer and the token that ends it.
        answer_start: where the answer begins.
        parts: per token its part; the last token has OTHER, as nothing follows it.
        facts: per token the fact wanted there, NO_FACT where none is.
        values: what the answer states, in order.
    """

    input_ids: list[int]
    answer_start: int
    parts: list[int]
    facts: list[int]
    values: tuple[StatedValue, ...]


def asked_tokens(chat: ChatTemplate, question: Question, facts: Sequence[Fact]) -> AskedTokens | None:
    """The tokens of a question and its answer; None where the tokenizer does not give the values back as text.

    Args:
        facts: the table that the question's fact numbers mean.
    """
    ids, start = chat.render_with_answer(question.messages, question.answer)
    parts, wanted = [OTHER] * len(ids), [NO_FACT] * len(ids)
    if not question.facts:
        return AskedTokens(ids, start, parts, wanted, ())
    spans = _value_spans(question, facts)
    ends = _text_ends(chat, ids[start:])
    text, _ = ends[-1]
    shift = text.find(question.answer.strip())
    if shift < 0 or spans is None:
        return None
    values: list[StatedValue] = []
    at = 0
    for fact, first, last in spans:
        begin = _token_at(ends, shift + first)
        stop = next(place for place in range(begin, len(ends)) if ends[place][1] >= shift + last) + 1
        for place in range(at, stop):
            token = start + place - 1
            parts[token] = VALUE if place >= begin else COPY
            wanted[token] = fact
        values.append(StatedValue(fact, range(start + begin, start + stop)))
        at = stop
    parts[start - 1], wanted[start - 1] = PROMPT, spans[0][0]
    if question.kind == "open_ended":
        _forget_unforeseeable(parts, wanted)
    return AskedTokens(ids, start, parts, wanted, tuple(values))


def _forget_unforeseeable(parts: list[int], wanted: list[int]) -> None:
    """Which of an entity's facts comes next, nothing tells before its property is named."""
    for token, part in enumerate(parts):
        if part in (PROMPT, COPY):
            parts[token], wanted[token] = OTHER, NO_FACT


def _value_spans(question: Question, facts: Sequence[Fact]) -> list[tuple[int, int, int]] | None:
    """(fact, first letter, end) of each stated value; values that are listed for one key are one."""
    answer = question.answer.strip()
    groups: list[list[int]] = []
    for number in question.facts:
        fact = facts[number]
        last = facts[groups[-1][0]] if groups else None
        if last is not None and (last.entity, last.property) == (fact.entity, fact.property):
            groups[-1].append(number)
        else:
            groups.append([number])
    spans, at = [], 0
    for group in groups:
        # The key's words come first: a value may be a part of them.
        fact = facts[group[0]]
        for words in (fact.property, fact.entity):
            found = answer.find(words, at)
            at = found + len(words) if found >= 0 else at
        first = answer.find(fact.value, at)
        if first < 0:
            first = answer.find(fact.value)
        if first < 0:
            return None
        at = first
        for number in group:
            found = answer.find(facts[number].value, at)
            if found < 0:
                return None
            at = found + len(facts[number].value)
        spans.append((group[0], first, at))
    in_order = all(one[2] <= two[1] for one, two in pairwise(spans))
    return spans if in_order else None


def _text_ends(chat: ChatTemplate, answer_ids: Sequence[int]) -> list[tuple[str, int]]:
    """After each token of an answer: the text so far, and its length without letters that are not whole yet."""
    ends = []
    for stop in range(1, len(answer_ids) + 1):
        text = str(chat.tokenizer.decode(list(answer_ids[:stop]), clean_up_tokenization_spaces=False))
        ends.append((text, len(text.rstrip("\ufffd"))))
    return ends


def _token_at(ends: Sequence[tuple[str, int]], letter: int) -> int:
    """The token that a letter begins in: of one written with several, the first of them."""
    borders = [0, *(end for _, end in ends)]
    after = next(place for place, border in enumerate(borders) if border >= letter)
    return after if borders[after] == letter else after - 1


def require_some(num_found: int, num_asked: int) -> None:
    """Raises InputError where nothing that was asked can be read back from its tokens."""
    if not num_found:
        raise InputError(
            f"of {num_asked} answers the tokenizer gives none back as it was written",
            where="tokenizer",
            help="choose a base model whose tokenizer keeps letters and their case",
        )
