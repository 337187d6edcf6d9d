"""What came of one question under one way of answering it, and the table with a row for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from kblam_ray.evaluation.metrics import exact_match, retrieved_at, token_f1
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.statements import ValueIndex
from kblam_ray.evaluation.wording import BertScore, references, rouge

AT = (1, 5)
"""The k of retrieval @k."""


@dataclass(frozen=True)
class System:
    """A way of answering.

    Attributes:
        name: `attention` (the model with its adapter), or a baseline: `cosine`, `dense`, ...
        prior: attention with the question prior; None for baselines.
        grounding: of the answers; None where only retrieval is looked at, and for baselines.
    """

    name: str
    prior: bool | None = None
    grounding: str | None = None

    def __str__(self) -> str:
        prior = {None: "", True: " with prior", False: " alone"}[self.prior]
        return f"{self.name}{prior}{f', {self.grounding}' if self.grounding else ''}"


@dataclass(frozen=True)
class Outcome:
    """What came of one question; None is what this way of answering does not give or nobody can judge.

    Attributes:
        ranks: place of each wanted fact, see `metrics.retrieval_ranks`.
        statistic: how surely the knowledge base answers the question.
        refused: whether the question was refused.
        text: the answer.
        is_exact, precision, recall, f1: of the answer, see `metrics`.
        rouge_1, rouge_2, rouge_l, bert_score: of the answer, see `wording`; BERTScore comes with `with_bert_scores`.
        is_cited: whether all wanted facts are among the citations.
    """

    ranks: tuple[int, ...] | None = None
    statistic: float | None = None
    refused: bool | None = None
    text: str | None = None
    is_exact: bool | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    rouge_1: float | None = None
    rouge_2: float | None = None
    rouge_l: float | None = None
    bert_score: float | None = None
    is_cited: bool | None = None

    def retrieved_at(self, k: int) -> bool | None:
        return None if self.ranks is None else retrieved_at(self.ranks, k)


def judged(
    question: Asked,
    values: ValueIndex,
    text: str,
    *,
    refused: bool | None,
    statistic: float | None = None,
    cited: Iterable[int] | None = None,
) -> Outcome:
    """The outcome of an answer; its text is judged where it is known what it shall state.

    Args:
        values: of all facts of the knowledge base.
        cited: rows of the facts cited, where the way of answering cites.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    is_cited = None
    if cited is not None and question.wanted:
        is_cited = set(question.wanted) <= set(cited)
    if not question.values:
        return Outcome(statistic=statistic, refused=refused, text=text, is_cited=is_cited)
    precision, recall, f1 = token_f1(text, " ".join(question.values), given=question.given, names=question.names)
    is_exact = exact_match(
        text,
        question.values,
        given=question.given,
        names=question.names,
        others=values,
        num_values=question.num_values,
    )
    shared = rouge(text, references(question.values, question.sentence))
    return Outcome(
        statistic=statistic,
        refused=refused,
        text=text,
        is_exact=is_exact,
        precision=precision,
        recall=recall,
        f1=f1,
        rouge_1=shared.rouge_1,
        rouge_2=shared.rouge_2,
        rouge_l=shared.rouge_l,
        is_cited=is_cited,
    )


def with_bert_scores(
    questions: Sequence[Asked], outcomes: Mapping[System, Sequence[Outcome]], scorer: BertScore
) -> dict[System, list[Outcome]]:
    """The outcomes with BERTScore for every answer that is judged, against the nearest of its references.

    Answers alike are scored once.

    Args:
        questions: in the order of each list of outcomes.
    """
    wanted = [references(question.values, question.sentence) for question in questions]
    pairs = {
        (outcome.text, one): 0.0
        for found in outcomes.values()
        for several, outcome in zip(wanted, found, strict=True)
        if outcome.text is not None and outcome.is_exact is not None
        for one in several
    }
    pairs = dict(zip(pairs, scorer.f1([text for text, _ in pairs], [one for _, one in pairs]), strict=True))
    return {
        system: [
            outcome
            if outcome.text is None or outcome.is_exact is None
            else replace(outcome, bert_score=max(pairs[outcome.text, one] for one in several))
            for several, outcome in zip(wanted, found, strict=True)
        ]
        for system, found in outcomes.items()
    }


SCHEMA = pa.schema(
    [
        ("num_facts", pa.int64()),
        ("number", pa.int32()),
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        ("wanted", pa.list_(pa.string())),
        ("sentence", pa.string()),
        ("should_answer", pa.bool_()),
        ("system", pa.string()),
        ("prior", pa.bool_()),
        ("grounding", pa.string()),
        ("ranks", pa.list_(pa.int32())),
        *((f"retrieved_at_{k}", pa.bool_()) for k in AT),
        ("statistic", pa.float64()),
        ("refused", pa.bool_()),
        ("text", pa.string()),
        ("is_exact", pa.bool_()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        *((name, pa.float64()) for name in ("rouge_1", "rouge_2", "rouge_l", "bert_score")),
        ("is_cited", pa.bool_()),
    ]
)
"""Columns of `rows.parquet`. `context`: the turns before the question, JSON; `wanted`: the values of a right answer;
`sentence`: the sentence that states them."""


def rows_table(num_facts: int, questions: Iterable[Asked], outcomes: dict[System, list[Outcome]]) -> pa.Table:
    """One row per way of answering and question."""
    asked = [
        {
            "num_facts": num_facts,
            "number": number,
            "kind": question.kind,
            "reason": question.reason,
            "question": question.text,
            "context": json.dumps([dict(message) for message in question.messages[:-1]], ensure_ascii=False),
            "wanted": list(question.values),
            "sentence": question.sentence,
            "should_answer": question.should_answer,
        }
        for number, question in enumerate(questions)
    ]
    columns = [field.name for field in SCHEMA if field.name in Outcome.__dataclass_fields__]
    rows = [
        {
            **question,
            "system": system.name,
            "prior": system.prior,
            "grounding": system.grounding,
            **{name: getattr(outcome, name) for name in columns},
            **{f"retrieved_at_{k}": outcome.retrieved_at(k) for k in AT},
        }
        for system, found in outcomes.items()
        for question, outcome in zip(asked, found, strict=True)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)
