"""Questions of one's own: a file of JSON Lines, and which facts of a knowledge base they are about.

Each line is an object with `question`, and optionally `context` (the turns before it, the user's first), `entity` and
`property` (the fact asked for), and `value` (what a right answer states: a text, a list of texts, or null where no fact
answers). Without any of the latter three the answer is written down and not judged. Several values stand in the answer
in their order, unless they are of the one entity and property that is given: then in any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kblam_ray.errors import InputError
from kblam_ray.evaluation.questions import Asked, EvaluationSet
from kblam_ray.facts.fact import Fact
from kblam_ray.model.mentions import normalized
from kblam_ray.table.embedded import EmbeddedFacts

KIND = "own"


class OwnQuestion(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    context: list[str] = []
    entity: str | None = None
    property: str | None = None
    value: str | list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> OwnQuestion:
        if (self.entity is None) != (self.property is None):
            raise ValueError("give entity and property, or neither")
        if not self.question.strip() or any(not value.strip() for value in self.expected() or ()):
            raise ValueError("question and value are not blank; a value of null means that no fact answers")
        if len(self.context) % 2:
            raise ValueError("context is turns of user and assistant, an even number")
        return self

    def asked(self, rows_of: dict[tuple[str, str], list[int]], facts: Sequence[Fact], where: str) -> Asked:
        """The question as it is asked of facts.

        Args:
            rows_of: rows by entity and property, as `normalized`.

        Raises:
            InputError: a value is expected of a fact that is not there, or none of one that is.
        """
        wanted: list[int] = []
        values = self.expected()
        names: tuple[str, ...] = ()
        should_answer = bool(values) if self.is_judged() else None
        if self.entity is not None and self.property is not None:
            names = (self.entity, self.property)
            wanted = rows_of.get((normalized(self.entity), normalized(self.property)), [])
            if values is None:
                values = [facts[row].value for row in wanted]
                should_answer = bool(wanted)
            elif bool(values) != bool(wanted):
                there, expected = ("no such fact", "a value") if values else ("such a fact", "no answer")
                raise InputError(
                    f"there is {there}, and {expected} is expected: the {self.property} of {self.entity}",
                    where=where,
                    help="correct the question, or ask another knowledge base",
                )
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(self.context)]
        return Asked(
            kind=KIND,
            messages=(*turns, {"role": "user", "content": self.question}),
            should_answer=should_answer,
            wanted=tuple(wanted),
            values=tuple(values or ()),
            names=names,
            num_values=(len(values),) if names and values else (),
        )

    def is_judged(self) -> bool:
        return "value" in self.model_fields_set or self.entity is not None

    def expected(self) -> list[str] | None:
        """What shall be stated; none where null was given; None where nothing was."""
        if "value" not in self.model_fields_set:
            return None
        if self.value is None:
            return []
        return [self.value] if isinstance(self.value, str) else list(self.value)


def read_questions(path: str | Path) -> list[OwnQuestion]:
    """The questions of a JSON Lines file.

    Raises:
        InputError: it cannot be read, has no question, or a line is not one: names the line.
    """
    try:
        # Not `splitlines`: JSON texts may have line separators of Unicode in them.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the questions: {error}", where=str(path), help="give a JSON Lines file"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(OwnQuestion.model_validate(json.loads(line)))
        except (ValueError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise InputError(
                f"not a question: {reason}",
                where=f"{path}: line {number}",
                help='write {"question": ..., "entity": ..., "property": ..., "value": ...}; the first is enough',
            ) from None
    if not found:
        raise InputError("there is no question in the file", where=str(path), help="write one per line")
    return found


def own_set(facts: EmbeddedFacts, questions: Sequence[OwnQuestion]) -> EvaluationSet:
    """The facts, and the questions about them.

    Raises:
        InputError: what is expected contradicts the facts: names the question.
    """
    rows_of: dict[tuple[str, str], list[int]] = {}
    for row, fact in enumerate(facts.facts):
        rows_of.setdefault((normalized(fact.entity), normalized(fact.property)), []).append(row)
    asked = [
        question.asked(rows_of, facts.facts, f"question {number}") for number, question in enumerate(questions, start=1)
    ]
    return EvaluationSet(facts, tuple(asked))
