"""Evaluation as a job: from settings to files, or one question answered."""

from __future__ import annotations

import json
import sys
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import InputError, TableNotFoundError
from kblam_ray.evaluation.own_questions import read_questions
from kblam_ray.evaluation.report import markdown
from kblam_ray.evaluation.run import evaluate, prior_set, priors_of
from kblam_ray.evaluation.settings import EvaluateSettings, EvaluationSettings
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.matching import require_encoder
from kblam_ray.storage import filesystem, join, normalize, storage_errors
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.table.knowledge_base import KnowledgeBase


def run(settings: EvaluateSettings, base_model: str, adapter: str) -> dict[str, Any]:
    """Answer the question, or evaluate and write `rows.parquet`, `summary.json` and `report.md`.

    Args:
        base_model, adapter: names or folders.

    Returns:
        The job's summary: of a question `text, citations, refused, kb_version`, else what `summary.json` has.

    Raises:
        InputError: settings that do not fit each other, the facts or the adapter.
        EncoderMismatchError: the table was made with another encoder than the adapter's.
        StorageError: the output cannot be written.
    """
    own = read_questions(settings.questions) if settings.questions else None
    # Before the base model, which may take minutes to load.
    kb = KnowledgeBase.open(settings.kb, settings.kb_version) if settings.kb else None
    model = KnowledgeModel.from_pretrained(base_model, adapter, device=settings.device, dtype=settings.dtype)
    if settings.question and kb is not None:
        return _answered(model, kb, settings)
    if kb is None:
        kb = _synthetic(model, settings)
    require_encoder(model.adapter.config, kb.encoder, where=kb.uri)
    output = normalize(settings.output or "")
    # Before the evaluation, which may take hours: a place that cannot be written is found now.
    with storage_errors(output):
        store, path = filesystem(output)
        store.create_dir(path, recursive=True)
    asked = EvaluationSettings(**{name: getattr(settings, name) for name in EvaluationSettings.model_fields})
    evaluation = evaluate(model, EmbeddedFacts.of(kb), asked, own=own, progress=_tell)
    config = model.adapter.config
    summary: dict[str, Any] = {
        "kb": kb.uri,
        "kb_version": kb.version,
        "base_model": base_model,
        "adapter": adapter,
        "kind": config.kind,
        "encoder": config.encoder.model_dump() if config.encoder else None,
        "refusal_threshold": config.refusal_threshold,
        "settings": _json(asked),
        **evaluation.summary(),
    }
    _write(output, evaluation.rows, summary)
    return {"output": output, **summary}


def _answered(model: KnowledgeModel, kb: KnowledgeBase, settings: EvaluateSettings) -> dict[str, Any]:
    grounding = settings.grounding[0] if "grounding" in settings.model_fields_set else "cite"
    # What the adapter has, unless the flag says otherwise.
    has_prior = priors_of(model.adapter.config, settings.prior)[-1]
    memory = model.load(kb, form=settings.form)
    with prior_set(model.adapter, has_prior):
        answer = model.ask(
            settings.question or "",
            memory,
            grounding=grounding,
            selection=settings.selection,
            max_new_tokens=settings.max_new_tokens,
        )
    return answer.to_json()


def _synthetic(model: KnowledgeModel, settings: EvaluateSettings) -> KnowledgeBase:
    """The synthetic facts as a table under the output: made there once, by the adapter's encoder."""
    encoder = model.adapter.config.encoder
    if encoder is None:
        raise InputError(
            "the adapter does not say which encoder it reads", where="--synthetic", help="give a table: --kb"
        )
    named = EncoderSettings(name=encoder.name, expected_revision=encoder.revision)
    num_facts, seed = settings.synthetic or 0, settings.synthetic_seed
    uri = join(normalize(settings.output or ""), f"synthetic-{num_facts}-{seed}-{encoder.revision[:8]}")
    try:
        return KnowledgeBase.open(uri)
    except TableNotFoundError:
        _tell(f"embedding {num_facts:,} synthetic facts into {uri}")
    kb = KnowledgeBase.create(uri, named)
    kb.upsert(SyntheticFacts(seed).facts(0, num_facts))
    return kb


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _json(settings: BaseModel) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _write(output: str, rows: pa.Table, summary: dict[str, Any]) -> None:
    with storage_errors(output):
        store, path = filesystem(output)
        pq.write_table(rows, join(path, "rows.parquet"), filesystem=store)
        texts = {
            "summary.json": json.dumps(summary, ensure_ascii=False, indent=1) + "\n",
            "report.md": markdown(summary),
        }
        for name, text in texts.items():
            with store.open_output_stream(join(path, name)) as stream:
                stream.write(text.encode("utf-8"))
