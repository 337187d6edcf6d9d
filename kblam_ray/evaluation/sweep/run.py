"""Run a sweep: tables, plan, the units that are not done yet, and all of them put together.

    found = sweep(settings, "models/llama", {"trained": "adapters/world"})
    found.summary     # of every unit, with the sources, the candidates and the environment
    found.rows        # a row for each unit, question and way of answering

Running the same settings again does what is missing: a unit is kept under the output the moment it is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.errors import InputError
from kblam_ray.evaluation.outcomes import SCHEMA
from kblam_ray.evaluation.own_questions import OwnQuestion
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.evaluation.sources import Source, make_table, num_distinct, read_input, sources_of
from kblam_ray.evaluation.sweep.environment import environment
from kblam_ray.evaluation.sweep.fingerprints import Base, Candidate
from kblam_ray.evaluation.sweep.plan import Plan, check_candidates, check_sizes
from kblam_ray.evaluation.sweep.store import UnitStore
from kblam_ray.evaluation.sweep.unit import Found, Progress, Unit
from kblam_ray.evaluation.sweep.workers import do_here, do_on_ray
from kblam_ray.facts.fact import Fact
from kblam_ray.model.matching import require_encoder
from kblam_ray.ray_session import start_ray
from kblam_ray.storage import filesystem, join, normalize, storage_errors
from kblam_ray.table.knowledge_base import KnowledgeBase

TABLES = "tables"

ATTENTION = "attention"
"""The way of answering that is no baseline."""

ROWS_SCHEMA = pa.schema(
    [
        ("candidate", pa.string()),
        ("source", pa.string()),
        ("selection", pa.string()),
        ("kb_scale", pa.float64()),
        ("entities", pa.string()),
        *SCHEMA,
    ]
)
"""Columns of a sweep's rows: of which unit, and those of `outcomes.SCHEMA`."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        summary: `settings, environment, base_model, candidates, sources, units, notes`, as JSON has them.
        rows: with the columns of `ROWS_SCHEMA`.
        num_units: all of them.
        num_resumed: those that an earlier run had done.
    """

    summary: dict[str, Any]
    rows: pa.Table
    num_units: int
    num_resumed: int


def sweep(
    settings: EvaluateSettings,
    base_model: str,
    adapters: Mapping[str, str],
    *,
    own: Sequence[OwnQuestion] | None = None,
    tables: str | None = None,
    progress: Progress | None = None,
    note: Mapping[str, Any] | None = None,
) -> SweepResult:
    """Evaluate every adapter on every source, with every combination of the settings that are lists.

    Writes below `settings.output` alone: `units/` and, of what is not a table yet, `tables/`.

    Args:
        settings: of the sweep; `base_model`, `adapter`, `question` and `questions` are not looked at.
        base_model: a folder or a name on the hub.
        adapters: folders or names on the hub, by the name that each has in the report.
        own: ask these questions instead of making some.
        tables: where tables are kept instead, so that several sweeps share them.
        progress: called with a line of text as the sweep goes on.
        note: further entries of the summary's `environment`, such as the command.

    Raises:
        InputError: nothing to evaluate, more facts wanted than there are, a prior that an adapter has not.
        AdapterError, AdapterMismatchError, TableNotFoundError: an adapter or table is not there, or does not fit.
        EncoderMismatchError: a table was made by another encoder than an adapter's.
        KblamError: what a unit raises; the units before it are kept.
    """
    if settings.gpus_per_worker and not settings.num_workers:
        raise InputError(
            f"{settings.gpus_per_worker:g} GPUs for each worker, and no workers",
            where="--gpus-per-worker",
            help="give --num-workers too; in one process --device says where the model is",
        )
    output = normalize(settings.output or "")
    sources = sources_of(settings)
    given = {source.name: KnowledgeBase.open(source.place, settings.kb_version) for source in _tables_of(sources)}
    candidates = [Candidate.read(name, path) for name, path in adapters.items()]
    for name, kb in given.items():
        for candidate in candidates:
            require_encoder(candidate.config, kb.encoder, where=f"{kb.uri}, adapter {candidate.name}")
        check_sizes(settings, name, kb.num_facts)
    read = {source.name: read_input(source) for source in sources if source.kind == "input"}
    for source in sources:
        if source.num_facts is not None:
            check_sizes(settings, source.name, source.num_facts)
    for name, facts in read.items():
        check_sizes(settings, name, num_distinct(facts))
    base = Base.read(base_model)
    check_candidates(settings, base, candidates)
    # Before hours of work: a place that cannot be written is found now.
    with storage_errors(output):
        store, path = filesystem(output)
        store.create_dir(path, recursive=True)
    if settings.num_workers:
        start_ray()
    opened = _opened(settings, sources, given, read, candidates, tables or join(output, TABLES), progress)
    read.clear()
    units = Plan(settings, base, candidates, opened, own, output).units()
    made_on = environment()
    made_by = {name: made_on[name] for name in ("version", "commit")}
    done, num_resumed = _done(units, UnitStore(output), settings, made_by, progress)
    found = [_with_baselines(done[unit.key], done.get(unit.baselines_of or "")) for unit in units]
    summary = {
        "settings": settings.model_dump(mode="json"),
        "environment": {**made_on, **(note or {})},
        "base_model": base_model,
        "candidates": {candidate.name: candidate.to_json() for candidate in candidates},
        "sources": {source.name: _described(source, opened) for source in sources},
        "units": [{**unit.labels, **one.summary} for unit, one in zip(units, found, strict=True)],
        "notes": [*_notes(units, found), *_older(units, found, made_by)],
    }
    parts = [_labelled(unit, one.rows) for unit, one in zip(units, found, strict=True) if one.rows is not None]
    rows = pa.concat_tables(parts) if parts else ROWS_SCHEMA.empty_table()
    return SweepResult(summary, rows, len(units), num_resumed)


def _tables_of(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.kind == "kb"]


def _opened(
    settings: EvaluateSettings,
    sources: Sequence[Source],
    given: Mapping[str, KnowledgeBase],
    read: Mapping[str, list[Fact]],
    candidates: Sequence[Candidate],
    folder: str,
    progress: Progress | None,
) -> dict[tuple[str, str], KnowledgeBase]:
    """The table of each source and candidate; what is no table is made one, once for each encoder."""
    made: dict[tuple[str, str | None], KnowledgeBase] = {}
    found = {}
    for source in sources:
        for candidate in candidates:
            if source.name in given:
                found[source.name, candidate.name] = given[source.name]
                continue
            encoder = candidate.config.encoder
            named = source.name, encoder.revision if encoder else None
            if named not in made:
                facts = read.get(source.name)
                gpus = settings.gpus_per_worker
                made[named] = make_table(source, encoder, folder, facts=facts, gpus_per_worker=gpus, tell=progress)
            found[source.name, candidate.name] = made[named]
    return found


def _done(
    units: Sequence[Unit],
    store: UnitStore,
    settings: EvaluateSettings,
    made_by: dict[str, Any],
    progress: Progress | None,
) -> tuple[dict[str, Found], int]:
    """What every unit found, by key, and how many were done before."""
    found = {unit.key: stored for unit in units if (stored := store.get(unit)) is not None}
    num_resumed = sum(unit.key in found for unit in units)
    if num_resumed and progress is not None:
        progress(f"{num_resumed} of {len(units)} units were done by an earlier run")
    # Two names can stand for the same thing, which is then done once.
    missing = {unit.key: unit for unit in units if unit.key not in found}

    def keep(unit: Unit, result: Found) -> None:
        found[unit.key] = replace(result, made_by=made_by)
        store.put(unit, found[unit.key])

    if settings.num_workers and missing:
        do_on_ray(
            list(missing.values()),
            keep,
            num_workers=settings.num_workers,
            gpus_per_worker=settings.gpus_per_worker,
            progress=progress,
        )
    else:
        do_here(list(missing.values()), keep, progress)
    return found, num_resumed


def _described(source: Source, opened: Mapping[tuple[str, str], KnowledgeBase]) -> list[dict[str, Any]]:
    """The tables of a source, one for each encoder."""
    found = {kb.uri: kb for (name, _), kb in opened.items() if name == source.name}
    return [
        {"uri": kb.uri, "version": kb.version, "num_facts": kb.num_facts, "encoder": kb.encoder.model_dump()}
        for kb in found.values()
    ]


def _with_baselines(own: Found, shared: Found | None) -> Found:
    """A unit with the baselines of another one, which was asked the same questions of the same facts."""
    if shared is None or own.rows is None or shared.rows is None:
        return own
    size, other = own.summary["size"], shared.summary["size"]
    results = [result for result in other["results"] if result["system"] != ATTENTION]
    left_out = {**size["left_out"], **other["left_out"]}
    rows = shared.rows.filter(pc.not_equal(shared.rows["system"], ATTENTION))
    return replace(
        own,
        summary={**own.summary, "size": {**size, "left_out": left_out, "results": [*size["results"], *results]}},
        rows=pa.concat_tables([own.rows, rows]),
    )


def _notes(units: Sequence[Unit], found: Sequence[Found]) -> list[str]:
    """What the units noted, each once; with the adapter's name where there are several."""
    several = len({unit.candidate for unit in units}) > 1
    notes = [
        f"{unit.candidate}: {note}" if several else note
        for unit, one in zip(units, found, strict=True)
        for note in one.summary.get("notes", [])
    ]
    return list(dict.fromkeys(notes))


def _older(units: Sequence[Unit], found: Sequence[Found], made_by: Mapping[str, Any]) -> list[str]:
    """What a reader must know of units that other code than this did."""
    others = Counter(
        f"{one.made_by['version']}, commit {one.made_by['commit']}" for one in found if one.made_by != made_by
    )
    return [
        f"{count} of {len(units)} units were measured before, by version {named}" for named, count in others.items()
    ]


def _labelled(unit: Unit, rows: pa.Table) -> pa.Table:
    """A unit's rows behind the columns that tell it from others."""
    labels = [
        pa.repeat(pa.scalar(unit.labels.get(field.name), field.type), len(rows))
        for field in ROWS_SCHEMA
        if field.name not in SCHEMA.names
    ]
    return pa.table([*labels, *rows.columns], schema=ROWS_SCHEMA)
