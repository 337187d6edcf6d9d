"""Which fact each token of an answer is written from.

Answers state their facts one after another: the words before a value and the value itself are written from its fact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import Question
from kblam_ray.facts.questions.forms import answer_sentence, listed


def value_ends(question: Question, facts: Sequence[Fact]) -> list[int]:
    """Where in the answer each fact's value ends, in characters: ascending, one per number in `question.facts`.

    Args:
        facts: all the facts that the question's numbers count.
    """
    ends: list[int] = []
    place = 0
    stated = [facts[number] for number in question.facts]
    for (entity, property), group in groupby(stated, key=lambda fact: (fact.entity, fact.property)):
        values = [fact.value for fact in group]
        sentence = answer_sentence(entity, property, values)
        if question.answer[place : place + len(sentence)] != sentence:
            raise AssertionError(f"the answer {question.answer!r} does not go on with {sentence!r}")
        ends += [place + end for end in _ends_in_sentence(sentence, values)]
        place += len(sentence) + 1
    return ends


def _ends_in_sentence(sentence: str, values: Sequence[str]) -> list[int]:
    """The sentence ends with its values, listed or side by side, and perhaps a full stop."""
    for joined, last_separator in ((listed(values), " and "), (" ".join(values), " ")):
        separators = [", " if last_separator == " and " else " "] * (len(values) - 2) + [last_separator]
        for tail in ("", "."):
            if sentence.endswith(joined + tail):
                at = len(sentence) - len(joined) - len(tail)
                ends = []
                for value, separator in zip(values, [*separators, ""], strict=False):
                    ends.append(at + len(value))
                    at += len(value) + len(separator)
                return ends
    raise AssertionError(f"the sentence {sentence!r} does not end with {values}")


def fact_of_token(
    tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], answer: str, ends: Sequence[int]
) -> list[int | None]:
    """For each token of an answer the number (0, 1, ...) of the fact that it is written from; None behind the last.

    Args:
        answer_ids: what `ChatTemplate.render_with_answer` made of the answer, without the end of the turn.
        answer: its text.
        ends: see `value_ends`.
    """
    # Blanks are not counted: tokenizers add and drop them at the ends.
    num_read = _letters_read(tokenizer, answer_ids)
    num_tokens, read = len(answer_ids), num_read(len(answer_ids))
    total = len("".join(answer.split()))
    # What a template puts before an answer, such as an empty thought, is before the first value. Where a tokenizer
    # spells the text otherwise, the numbers of letters are stretched to those that it reads.
    before, stretch = max(0, read - total), min(1.0, read / total)
    found: list[int | None] = []
    for number, end in enumerate(ends):
        letters = before + stretch * len("".join(answer[:end].split()))
        if number == len(ends) - 1:
            # Seldom more than a full stop stands behind the last value.
            last = num_tokens
            while last > len(found) and num_read(last - 1) >= letters:
                last -= 1
        else:
            last = bisect_left(range(num_tokens + 1), letters, lo=len(found), key=num_read)
        found += [number] * (min(last, num_tokens) - len(found))
    return found + [None] * (num_tokens - len(found))


def _letters_read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Callable[[int], int]:
    """How many letters the first so many tokens spell."""

    def read(count: int) -> int:
        text = tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False)
        # A letter of which a part of the bytes is there does not count yet.
        return len("".join(str(text).rstrip("\ufffd").split()))

    return read
