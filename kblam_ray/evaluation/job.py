"""Evaluation as a job: from settings to files and a report, or one question answered."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from kblam_ray.errors import MissingDependencyError
from kblam_ray.evaluation.outcomes import System
from kblam_ray.evaluation.own_questions import read_questions
from kblam_ray.evaluation.report import Section, make_report, write_report
from kblam_ray.evaluation.run import prior_set, priors_of
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.evaluation.sources import sources_of
from kblam_ray.evaluation.sweep.run import sweep
from kblam_ray.evaluation.sweep.store import write_sweep
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.matching import require_encoder
from kblam_ray.storage import join, normalize
from kblam_ray.table.knowledge_base import KnowledgeBase

TITLE = "Evaluation"
"""Of the report and of its one section."""


def run(settings: EvaluateSettings, base_model: str, adapters: Mapping[str, str]) -> dict[str, Any]:
    """Answer the question, or evaluate and write `rows.parquet`, `summary.json` and the report.

    Args:
        base_model: a name or folder.
        adapters: names or folders, by the name that each has in the report.

    Returns:
        The job's summary: of a question `text, citations, refused, kb_version`, else `output, num_units, num_resumed,
        num_questions, report, results`.

    Raises:
        InputError: settings that do not fit each other, the facts or the adapter.
        EncoderMismatchError: the table was made with another encoder than the adapter's.
        StorageError: the output cannot be written.
        KblamError: what else `sweep` raises.
    """
    if settings.question is not None:
        (adapter,) = adapters.values()
        return _answered(settings, settings.question, base_model, adapter)
    own = read_questions(settings.questions) if settings.questions else None
    _require_packages()
    note = {"command": shlex.join(sys.argv)}
    found = sweep(settings, base_model, adapters, own=own, progress=_tell, note=note)
    output = normalize(settings.output or "")
    write_sweep(output, found.rows, found.summary)
    write_report(output, make_report(TITLE, [Section("evaluation", TITLE, "", found.summary, found.rows)]))
    return {
        "output": output,
        "num_units": found.num_units,
        "num_resumed": found.num_resumed,
        "num_questions": sum(
            sum(unit["size"]["num_questions"].values()) for unit in found.summary["units"] if "size" in unit
        ),
        "report": join(output, "report.html"),
        "results": results_of(found.summary),
    }


def results_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A sweep's main figures without their intervals, for each unit that asks questions and way of answering."""
    return [
        {
            **{name: unit[name] for name in ("source", "candidate", "selection", "kb_scale", "entities")},
            "num_facts": unit["size"]["num_facts"],
            "system": str(System(result["system"], result["prior"], result["grounding"])),
            "retrieval_at_1": _value(result, "retrieval", "@1"),
            "exact_match": _value(result, "answers", "exact_match"),
            "refusal_f1": _value(result, "refusal", "f1"),
        }
        for unit in summary["units"]
        if unit["part"] == "questions"
        for result in unit["size"]["results"]
    ]


def _value(result: Mapping[str, Any], part: str, figure: str) -> float | None:
    value: float | None = result.get(part, {}).get("all", {}).get(figure, {}).get("value")
    return value


def _answered(settings: EvaluateSettings, question: str, base_model: str, adapter: str) -> dict[str, Any]:
    (source,) = sources_of(settings)
    # Before the base model, which may take minutes to load.
    kb = KnowledgeBase.open(source.place, settings.kb_version)
    model = KnowledgeModel.from_pretrained(base_model, adapter, device=settings.device, dtype=settings.dtype)
    require_encoder(model.adapter.config, kb.encoder, where=kb.uri)
    if settings.kb_scale:
        model.adapter.configure(kb_scale=settings.kb_scale[0])
    # What the adapter has, unless the flag says otherwise.
    has_prior = priors_of(model.adapter.config, settings.prior)[-1]
    memory = model.load(kb, form=settings.form)
    with prior_set(model.adapter, has_prior):
        answer = model.ask(
            question,
            memory,
            grounding=settings.grounding[0] if "grounding" in settings.model_fields_set else "cite",
            selection=settings.selection[0],
            max_new_tokens=settings.max_new_tokens,
        )
    return answer.to_json()


def _require_packages() -> None:
    """What the report is made with, looked for before hours of work."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the report needs the package {error.name}", help='pip install "kblam-ray[evaluate]"'
        ) from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
