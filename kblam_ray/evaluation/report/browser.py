"""A sample of the questions with every answer to them, for a reader to leaf through."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.evaluation.report.naming import LINE_OF, clipped, number, place_of, role_of, short_name, words
from kblam_ray.evaluation.report.sweeps import DIMENSIONS, Context

LONGEST_TEXT = 400
"""Letters of a text that are shown."""


@dataclass(frozen=True)
class Browser:
    """Questions to leaf through.

    Attributes:
        systems: `name, role, line, only_ranks` of each way of answering, those that write answers first.
        questions: each with `where, facts, kind, before, question, wanted, reason, should_answer` and `answers`: per
            way of answering, by its place in `systems`, `text, is_right, refused, place, cited`.
        num_asked: questions that there are, at all sizes.
    """

    systems: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    num_asked: int

    def to_json(self) -> dict[str, Any]:
        return {"systems": self.systems, "questions": self.questions}


def browser_of(rows: pa.Table, num_questions: int) -> Browser:
    """As many of each kind for each context, at its largest size: the first ones, equal for equal rows.

    Args:
        rows: of a sweep: the columns of `outcomes.SCHEMA`, and where there are such those of `sweeps.DIMENSIONS`.
        num_questions: how many, about.
    """
    if not len(rows):
        return Browser([], [], 0)
    dimensions = [name for name in DIMENSIONS if name in rows.column_names]
    keys = [*dimensions, "num_facts", "number"]
    contexts = rows.group_by(dimensions, use_threads=False).aggregate([("num_facts", "max")]).to_pylist()
    varying = [name for name in dimensions if len({context[name] for context in contexts}) > 1]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    systems: dict[tuple[str, bool | None, str | None], Mapping[str, Any]] = {}
    for context in contexts:
        part = _at(rows, context, dimensions)
        for row in _sample(part, num_questions // len(contexts)).to_pylist():
            key = (row["system"], row["prior"], row["grounding"])
            systems.setdefault(key, {name: row[name] for name in ("system", "prior", "grounding")})
            place = tuple(row[name] for name in keys)
            question = found.setdefault(place, {**_question(row, context, varying), "by_system": {}})
            question["by_system"][key] = _answer(row)
    # Those that rank only stand behind those that answer.
    texts = {key for question in found.values() for key, answer in question["by_system"].items() if answer["text"]}
    order = sorted(systems, key=lambda key: (key not in texts, place_of(systems[key])))
    for question in found.values():
        by_system = question.pop("by_system")
        question["answers"] = {str(at): by_system[key] for at, key in enumerate(order) if key in by_system}
    listed = [
        {
            "name": short_name(systems[key], None if key in texts else "retrieval"),
            "role": role_of(key[0], key[1]),
            "line": LINE_OF.get(key[2], "solid"),
            "only_ranks": key not in texts,
        }
        for key in order
    ]
    num_asked = len(rows.group_by(keys, use_threads=False).aggregate([]))
    return Browser(listed, _in_turns(list(found.values())), num_asked)


def _in_turns(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each kind and place after the other, so that the beginning shows all of them."""
    turns: dict[tuple[str, str], int] = {}
    numbered = []
    for place, question in enumerate(questions):
        key = (question["where"], question["kind"])
        turns[key] = turns.get(key, 0) + 1
        numbered.append((turns[key], place, question))
    return [question for _, _, question in sorted(numbered, key=lambda one: one[:2])]


def _at(rows: pa.Table, context: Mapping[str, Any], dimensions: list[str]) -> pa.Table:
    """The rows of a context at its largest size."""
    is_there = pc.equal(rows["num_facts"], context["num_facts_max"])
    for name in dimensions:
        column, value = rows[name], context[name]
        is_there = pc.and_(
            is_there, pc.is_null(column) if value is None else pc.fill_null(pc.equal(column, value), False)
        )
    return rows.filter(is_there)


def _sample(part: pa.Table, num_questions: int) -> pa.Table:
    """The rows of the first questions of each kind, and of each reason why there is no answer."""
    kinds: dict[tuple[str, str | None], dict[int, None]] = {}
    columns = [part[name].to_pylist() for name in ("kind", "reason", "number")]
    for kind, reason, at in zip(*columns, strict=True):
        kinds.setdefault((kind, reason), {})[at] = None
    per_kind = max(2, num_questions // len(kinds))
    chosen = [at for numbers in kinds.values() for at in list(numbers)[:per_kind]]
    return part.filter(pc.is_in(part["number"], value_set=pa.array(chosen, part.schema.field("number").type)))


def _question(row: Mapping[str, Any], context: Mapping[str, Any], varying: list[str]) -> dict[str, Any]:
    settings = Context(**{name: context.get(name) for name in DIMENSIONS})
    return {
        "where": ", ".join([*(settings.word(name) for name in varying), f"{number(row['num_facts'])} facts"]),
        "kind": words(row["kind"]),
        "before": [_clipped(turn["content"]) for turn in json.loads(row["context"] or "[]")],
        "question": _clipped(row["question"]),
        "wanted": [_clipped(value) for value in row["wanted"] or ()],
        "reason": words(row["reason"] or ""),
        "should_answer": row["should_answer"],
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    text, should_answer = row["text"], row["should_answer"]
    is_right = None
    if text is None:
        is_right = row["retrieved_at_1"]
    elif should_answer is not None:
        is_right = row["is_exact"] if should_answer else row["refused"]
    return {
        "text": None if text is None else _clipped(text),
        "is_right": is_right,
        "refused": row["refused"],
        "place": max(row["ranks"]) if row["ranks"] else None,
    }


def _clipped(text: str) -> str:
    return clipped(text, LONGEST_TEXT)
