"""The text that puts facts before the model, wherever it reads facts instead of attending to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def reading_message(facts: Sequence[Mapping[str, str]], question: str) -> str:
    """The user message that asks a question with facts to read: it takes the place of the question's own message.

    Facts are data of any content: give the message to `ChatTemplate`, which escapes control tokens, as the content of a
    user message and in no other way.

    Args:
        facts: each with `entity`, `property` and `value`, in the order in which they are read.
        question: what the user asked.

    Returns:
        `Facts:`, one line `- the {property} of {entity}: {value}` per fact, and `Question: {question}`. A fact stays on
        its line: line breaks inside its texts become blanks.
    """
    lines = "".join(
        f"- the {_line(fact['property'])} of {_line(fact['entity'])}: {_line(fact['value'])}\n" for fact in facts
    )
    return f"Facts:\n{lines}Question: {question}"


def _line(text: str) -> str:
    return " ".join(text.splitlines())
