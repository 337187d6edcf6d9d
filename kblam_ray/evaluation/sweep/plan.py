"""Which units a sweep consists of: every combination of its settings once, those that measure time last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from kblam_ray.errors import InputError
from kblam_ray.evaluation.outcomes import SCHEMA
from kblam_ray.evaluation.own_questions import OwnQuestion
from kblam_ray.evaluation.run import priors_of
from kblam_ray.evaluation.settings import AskedSettings, EvaluateSettings, EvaluationSettings
from kblam_ray.evaluation.sweep.environment import machine
from kblam_ray.evaluation.sweep.fingerprints import Base, Candidate, absolute, digest_of
from kblam_ray.evaluation.sweep.unit import Unit
from kblam_ray.table.knowledge_base import KnowledgeBase

FORMAT = 1
"""Of the units. Whatever changes the numbers of the same settings gets another one, and nothing old is reused."""


@dataclass(frozen=True)
class Plan:
    """What a sweep does.

    Args:
        settings: of the sweep.
        base: the base model.
        candidates: the adapters.
        tables: the facts of each source as each candidate's encoder reads them, by names of source and candidate.
        own: questions of one's own.
        output: folder of the sweep: tables below it go by their place in it, so that it can be moved.
    """

    settings: EvaluateSettings
    base: Base
    candidates: Sequence[Candidate]
    tables: Mapping[tuple[str, str], KnowledgeBase]
    own: Sequence[OwnQuestion] | None
    output: str

    def units(self) -> list[Unit]:
        """The units in the order in which they are done; neighbours share adapter and facts."""
        places = [
            (source, candidate)
            for candidate in self.candidates
            for source in dict.fromkeys(source for source, name in self.tables if name == candidate.name)
        ]
        units = [unit for place in places for unit in (*self._questions(*place), *self._interference(*place))]
        return units + [unit for place in places for unit in self._cost(*place)]

    def _questions(self, source: str, candidate: Candidate) -> Iterator[Unit]:
        settings = self.settings
        shared = {name: getattr(settings, name) for name in AskedSettings.model_fields}
        if settings.bert_score_model is not None:
            shared["bert_score_model"] = absolute(settings.bert_score_model)
        sizes: list[list[int]] = [[size] for size in _once(settings.num_facts)] or [[]]
        all_entities = _once(settings.entities) if settings.held_out is not None else ["held_out"]
        scales, selections = _once(settings.kb_scale) or [None], _once(settings.selection)
        first: dict[tuple[str, tuple[int, ...]], str] = {}
        for entities, kb_scale, selection, num_facts in product(all_entities, scales, selections, sizes):
            # Baselines know neither selection nor C: they are asked once.
            baselines_of = first.get((entities, tuple(num_facts)))
            told = {**shared, "num_facts": num_facts, "selection": selection, "entities": entities}
            if baselines_of is not None:
                told["baseline"] = []
            checked = EvaluationSettings(**told).model_dump(mode="json")
            unit = replace(self._unit("questions", source, candidate, checked, kb_scale), baselines_of=baselines_of)
            first.setdefault((entities, tuple(num_facts)), unit.key)
            yield unit

    def _interference(self, source: str, candidate: Candidate) -> Iterator[Unit]:
        if not self.settings.interference:
            return
        told = {"sizes": sorted(set(self.settings.interference)), "seed": self.settings.seed}
        for kb_scale in _once(self.settings.kb_scale) or [None]:
            yield self._unit("interference", source, candidate, told, kb_scale)

    def _cost(self, source: str, candidate: Candidate) -> Iterator[Unit]:
        if not self.settings.cost:
            return
        told = {
            "sizes": sorted(set(self.settings.cost)),
            "selections": _once(self.settings.selection),
            "seed": self.settings.seed,
        }
        yield self._unit("cost", source, candidate, told, None)

    def _unit(self, part: Any, source: str, candidate: Candidate, told: dict[str, Any], kb_scale: float | None) -> Unit:
        table = self.tables[source, candidate.name]
        unit = Unit(
            key="",
            part=part,
            candidate=candidate.name,
            source=source,
            base_model=self.base.path,
            adapter=candidate.path,
            table_uri=table.uri,
            table_version=table.version,
            told=told,
            kb_scale=kb_scale,
            own=tuple(self.own) if self.own is not None and part == "questions" else None,
            device=self.settings.device,
            dtype=self.settings.dtype,
            contents=(self.base.digest, candidate.digest, table.table_id or ""),
        )
        decisive = {
            "format": FORMAT,
            "part": part,
            "base": self.base.digest,
            "adapter": candidate.digest,
            "table": [table.uri.removeprefix(self.output), table.table_id, table.version],
            "told": told,
            "kb_scale": kb_scale,
            "own": None if unit.own is None else [question.model_dump(exclude_unset=True) for question in unit.own],
            "device": unit.device,
            "dtype": unit.dtype,
        }
        if part == "questions":
            decisive["columns"] = SCHEMA.names
        if part == "cost":
            # The numbers are the machine's.
            decisive["machine"] = machine()
        return replace(unit, key=digest_of(decisive))


def check_candidates(settings: EvaluateSettings, base: Base, candidates: Sequence[Candidate]) -> None:
    """Make sure, before anything is loaded, that every adapter fits the base model and has what is asked of it.

    Raises:
        AdapterMismatchError, UnsupportedModelError: an adapter was made for another shape of base model.
        InputError: a prior is wanted that an adapter has not.
    """
    for candidate in candidates:
        candidate.config.check_base(base.config)
        priors_of(candidate.config, settings.prior)


def check_sizes(settings: EvaluateSettings, source: str, num_facts: int) -> None:
    """Make sure that a source has as many facts as are asked for.

    Raises:
        InputError: it has fewer; names the setting.
    """
    for name in ("num_facts", "interference", "cost"):
        most = max(getattr(settings, name), default=0)
        if most > num_facts:
            raise InputError(
                f"{most} facts of {num_facts} that {source!r} has",
                where=name,
                help="ask for fewer, or give a source that has more",
            )


def _once(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
