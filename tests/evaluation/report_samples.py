"""Hand-made summaries and rows of sweeps, for tests of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from kblam_ray.evaluation.outcomes import Outcome, System, rows_table
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.report import Section

KINDS = ("simple", "paraphrase", "two_entity")

EVIL = """</script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">&amp;"""

WAYS = (
    ("attention", True, None), ("attention", True, "verbatim"), ("attention", True, "off"),
    ("attention", False, None), ("attention", False, "verbatim"), ("attention", False, "off"),
    ("cosine", None, None), ("dense", None, None), ("bm25", None, None),
    ("zero_shot", None, None), ("in_context", None, None),
)  # fmt: skip


def figure(value: float | None, *, half: float = 0.05, count: int = 40) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "count": 0}
    return {"value": value, "low": max(0.0, value - half), "high": value + half, "count": count}


def calibrated(threshold: float | None = 0.5, *, is_probability: bool = True) -> dict[str, Any]:
    places = [0.0, 0.25, 0.5, 0.75, 1.0]
    found: dict[str, Any] = {
        "threshold": threshold,
        "is_probability": is_probability,
        "thresholds": [
            {"threshold": at, "precision": None if not at else 1 - at / 2, "recall": at, "f1": at * (1.5 - at)}
            for at in places
        ],
        "best": {"threshold": 0.75, "f1": 0.5625},
        "receiver": [{"false_positive": at**2, "true_positive": at} for at in places],
    }
    if is_probability:
        found["error"], found["brier"] = figure(0.04), figure(0.1)
        found["bins"] = [
            {"low": 0.0, "high": 0.1, "mean_statistic": 0.05, "share_answerable": figure(0.1)},
            {"low": 0.9, "high": 1.0, "mean_statistic": 0.95, "share_answerable": figure(0.9)},
        ]
    return found


def result(way: tuple[str, bool | None, str | None], value: float, *, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """All that this way of answering gives, each figure near `value`."""
    system, prior, grounding = way
    groups = ("all", *kinds)
    found: dict[str, Any] = {"system": system, "prior": prior, "grounding": grounding}
    has_ranks = grounding is None and system in ("attention", "cosine", "bm25")
    has_answers = grounding is not None or system in ("dense", "bm25", "zero_shot", "in_context")
    if has_ranks:
        found["retrieval"] = {
            group: {"@1": figure(value - 0.02 * at), "@5": figure(min(1.0, value + 0.1))}
            for at, group in enumerate(groups)
        }
    if has_answers:
        names = ("exact_match", "precision", "recall", "f1", "rouge_1", "rouge_2", "rouge_l", "bert_score")
        found["answers"] = {group: {name: figure(value - 0.1) for name in names} for group in groups}
    if has_answers or system == "attention":
        found["refusal"] = {"all": {name: figure(value - 0.2) for name in ("precision", "recall", "f1")}}
    if system == "attention":
        found["calibration"] = calibrated()
    return found


def questions_unit(
    num_facts: int,
    *,
    ways: Sequence[tuple[str, bool | None, str | None]] = WAYS,
    kinds: Sequence[str] = KINDS,
    value: float = 0.8,
    **labels: Any,
) -> dict[str, Any]:
    size = {
        "num_facts": num_facts,
        "num_entities": num_facts // 4,
        "num_questions": dict.fromkeys(kinds, 40) | {"unanswerable": 10},
        "num_facts_asked": 60,
        "left_out": {"follow_up": "the facts do not allow it"},
        "results": [result(way, value - 0.03 * at, kinds=kinds) for at, way in enumerate(ways)],
    }
    settings = {"candidate": "demo", "source": "world", "selection": "all", "kb_scale": None, "entities": None}
    return {"part": "questions", **settings, **labels, "notes": ["a note of the unit"], "size": size}


def interference_unit(sizes: Sequence[int] = (0, 100, 10_000), **labels: Any) -> dict[str, Any]:
    points = [
        {
            "num_facts": size,
            "prior": prior,
            "selection": "all",
            "perplexity": figure(20 + size / 1e4, half=1),
            "perplexity_ratio": figure(1 + size / 1e5, half=0.001),
            "divergence": figure(size / 1e6),
            "agreement": figure(1 - size / 1e5),
            "kb_mass": figure(size / 1e6),
        }
        for size in sizes
        for prior in (False, True)
    ]
    found = {"num_texts": 40, "num_tokens": 2_000, "seed": 0, "points": points}
    return {"part": "interference", "candidate": "demo", "source": "world", "kb_scale": None, **labels,
            "interference": found}  # fmt: skip


def cost_unit(sizes: Sequence[int] = (10, 100, 1_000), *, fits_up_to: int = 10, **labels: Any) -> dict[str, Any]:
    points = []
    for size in sizes:
        ways = (("zero_shot", None), ("attention", "all"), ("attention", "similar:64"), ("in_context", None))
        for way, selection in ways:
            fits = way != "in_context" or size <= fits_up_to
            seconds = 0.02 * (1 + (size / 100 if way != "zero_shot" else 0))
            points.append(
                {
                    "way": way,
                    "selection": selection,
                    "num_facts": size,
                    "fits": fits,
                    "prompt_tokens": 15 * size if way == "in_context" else 20,
                    "first_token_s": figure(seconds if fits else None, half=0.001),
                    "per_token_s": figure(seconds / 2 if fits else None, half=0.001),
                    "first_token_ratio": figure(seconds / 0.02 if fits else None),
                    "per_token_ratio": figure(seconds / 0.02 if fits else None),
                    "knowledge_bytes": size * 1_500 if way == "attention" else 0,
                    "cache_bytes": 80_000,
                    "load_s": size * 1e-6 if way == "attention" else None,
                }
            )
    cost = {"new_tokens": 16, "rounds": 5, "threads": 1, "device": "cpu", "limit_tokens": 512, "points": points}
    return {"part": "cost", "candidate": "demo", "source": "world", **labels, "cost": cost}


def summary(*units: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "settings": {"kb": ["world=kb/world"], "num_questions": 40},
        "environment": {
            "version": "0.1", "commit": "0123456789abcdef", "is_changed": True,
            "python": "3.11", "torch": "2.13", "ray": None,
            "machine": "2 cores of a test, 24 GB, no GPU", "command": "jobs/evaluate.py --kb 'kb/world' --output o",
        },
        "base_model": "demo/base",
        "candidates": {
            "demo": {
                "adapter": "demo/adapter", "kind": "shared", "encoder": {"name": "hashing:64"}, "kb_layers": [2, 3],
                "num_layers": 4, "kb_scale": None, "question_prior": 20.0, "refusal_threshold": 0.5,
            }
        },
        "sources": {"world": [{"uri": "kb/world", "version": 3, "num_facts": 1000, "encoder": {"name": "hashing:64"}}]},
        "units": list(units),
        "notes": ["a note of the sweep"],
        **changes,
    }  # fmt: skip


def whole() -> dict[str, Any]:
    """A sweep that measured everything, of two knowledge bases."""
    asked = [questions_unit(size, source=source) for source in ("world", "nouns") for size in (10, 1_000)]
    return summary(*asked, interference_unit(), cost_unit())


def rows(
    num_questions: int = 6, *, sizes: Sequence[int] = (10, 1_000), sources: Sequence[str] = ("world",), text: str = ""
) -> pa.Table:
    """Rows of a sweep: simple questions, the last two of them unanswerable; `text` stands in every text."""
    tables = []
    for source in sources:
        for size in sizes:
            asked, found = [], []
            for number in range(num_questions):
                message = {"role": "user", "content": f"Question {number} of {source}? {text}"}
                has_answer = number < num_questions - 2
                kind = "simple" if has_answer else "unanswerable"
                values = (f"value {number} {text}",) if has_answer else ()
                asked.append(Asked(kind, (message,), has_answer, (number,), values))
                is_exact = number % 2 == 0 if has_answer else None
                found.append(Outcome(text=f"answer {number} {text}", is_exact=is_exact, refused=not has_answer))
            ranked = [Outcome(ranks=(1 + number,), statistic=0.5) for number in range(num_questions)]
            outcomes = {System("cosine"): ranked, System("dense"): found, System("attention", True, "verbatim"): found}
            table = rows_table(size, asked, outcomes)
            for name, value in (("entities", None), ("kb_scale", None), ("selection", "all"), ("source", source)):
                kind_of = pa.float64() if name == "kb_scale" else pa.string()
                table = table.add_column(0, pa.field(name, kind_of), pa.array([value] * len(table), kind_of))
            tables.append(table.add_column(0, "candidate", pa.array(["demo"] * len(table))))
    return pa.concat_tables(tables)


def section(name: str = "sweep", **changes: Any) -> Section:
    given: dict[str, Any] = {"title": "A sweep", "about": "What is asked.", "summary": whole(), "rows": rows()}
    return Section(name=name, **{**given, **changes})
