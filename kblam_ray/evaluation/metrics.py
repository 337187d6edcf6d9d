"""What a right answer is, in numbers: retrieval @k, exact match, token F1, refusal and its area under the curve.

Shape legend: M facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kblam_ray.evaluation.intervals import Estimate, bootstrap, wilson
from kblam_ray.evaluation.statements import Statement, ValueIndex, words


def retrieval_ranks(scores_M: np.ndarray, wanted: Sequence[int]) -> list[int]:
    """The place of each wanted fact among all facts by falling score, from 1; of equal scores it is the last.

    Where the scores are no numbers, as of a broken adapter, a wanted fact stands last.

    Args:
        scores_M: float [M].
        wanted: positions of facts.
    """
    return [len(scores_M) - int(np.count_nonzero(scores_M < scores_M[position])) for position in wanted]


def retrieved_at(ranks: Sequence[int], k: int) -> bool:
    """Whether all wanted facts stand within the first k places, or, where more than k are wanted, the first places.

    Args:
        ranks: of `retrieval_ranks`: a fact that another one equals is not before it.
    """
    return bool(ranks) and max(ranks) <= max(k, len(ranks))


def exact_match(
    text: str,
    values: Sequence[str],
    *,
    given: str = "",
    names: Sequence[str] = (),
    others: Sequence[str] | ValueIndex = (),
    num_values: Sequence[int] = (),
) -> bool:
    """Whether an answer states exactly the wanted values; however it is worded.

    Right is an answer in which
    - every value stands letter for letter, as a whole, in the order asked for, several of one fact in any; only blanks
      and line breaks may differ,
    - nothing runs into a value: beside it stand marks, words of the question or words that only frame a statement,
    - the rest has no name, number or code (a word with a digit, or with a capital after the first letter of a sentence)
      that the question does not have,
    - and the rest does not have the value of another fact as a whole, unless the question has it.

    Args:
        text: the answer.
        values: what it shall state; none for a question that has no answer: then nothing is exact.
        given: what was said before: the question and the turns before it.
        names: the entities and properties asked for: a value that stands inside such a name is not stated by it.
        others: values of other facts, or of all.
        num_values: how many of the values are of each entity and property asked for, which has them in no order; by
            default one each.
    """
    return bool(values) and Statement(text, given, names).is_exactly(values, others, num_values)


def token_f1(text: str, reference: str, *, given: str = "", names: Sequence[str] = ()) -> tuple[float, float, float]:
    """Precision, recall and F1 of what an answer states against a reference: of their words as multisets.

    As SQuAD scores answers (P. Rajpurkar et al., arXiv 1606.05250): case and marks do not count. Of both sides only
    words that tell something are compared: not those of the question, nor those that only frame a statement, so that
    the question repeated is worth nothing and costs nothing. A reference of nothing but such words is compared with
    as many of them in the answer. In scripts without blanks each letter is a word.

    Args:
        reference: what shall be stated: the values.
        given, names: see `exact_match`.
    """
    statement = Statement(text, given, names)
    stated = statement.content()
    wanted = statement.telling(words(reference))
    if not wanted:
        wanted = words(reference)
        stated += (Counter(words(text)) & Counter(wanted) - Counter(stated)).elements()
    shared = (Counter(stated) & Counter(wanted)).total()
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / len(stated), shared / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class RefusalReport:
    """How refusals agree with what should be refused; a right refusal is a positive.

    Attributes:
        precision: of what was refused, the share that should have been.
        recall: of what should be refused, the share that was.
        f1: of the two.
    """

    precision: Estimate
    recall: Estimate
    f1: Estimate

    def to_json(self) -> dict[str, dict]:
        return {name: getattr(self, name).to_json() for name in ("precision", "recall", "f1")}


def refusal_report(refused: Sequence[bool], should: Sequence[bool], *, seed: int = 0) -> RefusalReport:
    """Precision and recall with Wilson's interval, F1 with the bootstrap's.

    Args:
        refused: per question, whether the model refused.
        should: per question, whether no fact answers it.
    """
    did, ought = np.asarray(refused, bool), np.asarray(should, bool)
    right = did & ought

    def f1(samples: np.ndarray) -> np.ndarray:
        both = did[samples].sum(1) + ought[samples].sum(1)
        return np.where(both > 0, 2 * right[samples].sum(1) / np.maximum(both, 1), np.nan)

    hits = int(right.sum())
    return RefusalReport(
        wilson(hits, int(did.sum())), wilson(hits, int(ought.sum())), bootstrap(f1, len(did), seed=seed)
    )


def area_under_curve(statistics: Sequence[float], should_answer: Sequence[bool], *, seed: int = 0) -> Estimate:
    """The chance that an answerable question has a larger statistic than an unanswerable one, ties counting half.

    The area under the receiver's curve (the statistic of Mann and Whitney), with the bootstrap's interval.

    Args:
        statistics: per question, how surely the knowledge base answers it.
        should_answer: per question, whether it does.
    """
    values, answerable = np.asarray(statistics, np.float64), np.asarray(should_answer, bool)
    # Equal statistics are one place in the order; resampling changes how often each place occurs.
    distinct, places = np.unique(values, return_inverse=True)
    num_places = len(distinct)

    def area(samples: np.ndarray) -> np.ndarray:
        rows = np.arange(len(samples))[:, None] * num_places
        at, is_positive = rows + places[samples], answerable[samples]
        positives = np.bincount(at[is_positive], minlength=len(samples) * num_places).reshape(-1, num_places)
        negatives = np.bincount(at[~is_positive], minlength=len(samples) * num_places).reshape(-1, num_places)
        below = negatives.cumsum(1) - negatives
        pairs = positives.sum(1) * negatives.sum(1)
        wins = (positives * (below + negatives / 2)).sum(1)
        return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)

    return bootstrap(area, len(values), seed=seed)
