"""One unit of a sweep: what it is told, what came of it, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.evaluation.cost import measure_cost
from kblam_ray.evaluation.interference import measure_interference
from kblam_ray.evaluation.own_questions import OwnQuestion
from kblam_ray.evaluation.run import evaluate
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.evaluation.sweep.environment import machine
from kblam_ray.model.base_model import load_base_model, usable_device
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.table.knowledge_base import KnowledgeBase

Part = Literal["questions", "interference", "cost"]
Progress = Callable[[str], None]

FACTS_KEPT = 2
"""Tables whose facts a process keeps in memory."""


@dataclass(frozen=True)
class Unit:
    """A piece of a sweep that is done at once and kept; pickles, so that a worker anywhere can do it.

    Attributes:
        key: digest over all that decides its numbers; the names of candidate and source do not.
        part: what is measured.
        candidate, source: their names.
        base_model, adapter: folders, absolute, or names on the hub.
        table_uri, table_version: the facts.
        kb_scale: C instead of the adapter's; None: the adapter's.
        told: settings of the part: of `questions`, fields of `EvaluationSettings`.
        own: questions of one's own.
        device, dtype: of the base model, see `load_base_model`.
        contents: what base model, adapter and table are by their content: another one at the same place is another one.
        baselines_of: key of the unit whose baselines are this one's too, and are not asked again: they do not depend on
            what the two differ in.
    """

    key: str
    part: Part
    candidate: str
    source: str
    base_model: str
    adapter: str
    table_uri: str
    table_version: int | None
    told: dict[str, Any]
    kb_scale: float | None = None
    own: tuple[OwnQuestion, ...] | None = None
    device: str | None = None
    dtype: str | None = None
    contents: tuple[str, str, str] = ("", "", "")
    baselines_of: str | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """What tells it from other units in a summary."""
        found: dict[str, Any] = {"part": self.part, "candidate": self.candidate, "source": self.source}
        if self.part == "questions":
            found["selection"] = self.told["selection"]
        if self.part != "cost":
            found["kb_scale"] = self.kb_scale
        if self.part == "questions":
            found["entities"] = self.told["entities"] if self.told["held_out"] is not None else None
        return found

    def __str__(self) -> str:
        labels = [str(label) for name, label in self.labels.items() if label is not None and name != "kb_scale"]
        if self.kb_scale is not None:
            labels.append(f"C {self.kb_scale:g}")
        sizes = self.told["num_facts"] if self.part == "questions" else self.told["sizes"]
        if sizes:
            labels.append(f"{', '.join(f'{size:,}' for size in sizes)} facts")
        return ", ".join(labels)


@dataclass(frozen=True)
class Found:
    """What came of a unit.

    Attributes:
        summary: its part of the sweep's `summary.json` beside the unit's labels.
        rows: a row per question and way of answering, with the columns of `outcomes.SCHEMA`; of `questions` alone.
        made_by: `version` and `commit` of the code that did it.
    """

    summary: dict[str, Any]
    rows: pa.Table | None = None
    made_by: dict[str, Any] = field(default_factory=dict)


@dataclass
class Loaded:
    """What a process keeps from one unit to the next: a base model with one adapter on it, and a few tables' facts."""

    _base: tuple[tuple, PreTrainedModel, PreTrainedTokenizerBase] | None = None
    _model: tuple[tuple, KnowledgeModel] | None = None
    _facts: dict[tuple, EmbeddedFacts] = field(default_factory=dict)

    def model(self, unit: Unit) -> KnowledgeModel:
        """The unit's base model with its adapter.

        Raises:
            InputError, AdapterError, AdapterMismatchError: see `KnowledgeModel.from_pretrained`.
        """
        base_content, adapter_content, _ = unit.contents
        named = unit.base_model, base_content, unit.device, unit.dtype
        if self._base is None or self._base[0] != named:
            self._base = self._model = None
            self._base = named, *load_base_model(unit.base_model, usable_device(unit.device), unit.dtype)
        _, base, tokenizer = self._base
        if self._model is None or self._model[0] != (unit.adapter, adapter_content):
            if self._model is not None:
                self._model[1].detach()
            self._model = None
            adapter = KnowledgeAdapter.from_pretrained(unit.adapter, device=base.device)
            self._model = (unit.adapter, adapter_content), KnowledgeModel(base, adapter, tokenizer)
        return self._model[1]

    def facts(self, unit: Unit) -> EmbeddedFacts:
        """The facts of the unit's table, those of the tables used last being kept.

        Raises:
            TableNotFoundError, TableError, StorageError: the table cannot be read.
        """
        named = unit.table_uri, unit.table_version, unit.contents[2]
        facts = self._facts.pop(named, None)
        if facts is None:
            while len(self._facts) >= FACTS_KEPT:
                del self._facts[next(iter(self._facts))]
            facts = EmbeddedFacts.of(KnowledgeBase.open(unit.table_uri, unit.table_version))
        self._facts[named] = facts
        return facts


def do_unit(unit: Unit, loaded: Loaded, progress: Progress | None = None) -> Found:
    """Do a unit.

    Raises:
        KblamError: what the part raises: see `evaluate`, `measure_interference`, `measure_cost`.
    """
    model, facts = loaded.model(unit), loaded.facts(unit)
    with kb_scale_set(model.adapter, unit.kb_scale):
        return _PARTS[unit.part](unit, model, facts, progress)


@contextmanager
def kb_scale_set(adapter: KnowledgeAdapter, kb_scale: float | None) -> Iterator[None]:
    """Give the adapter another C for a while; None: keep its own."""
    stored = adapter.config.kb_scale
    if kb_scale is not None:
        adapter.configure(kb_scale=kb_scale)
    try:
        yield
    finally:
        if kb_scale is not None:
            adapter.configure(kb_scale=stored)


def _questions(unit: Unit, model: KnowledgeModel, facts: EmbeddedFacts, progress: Progress | None) -> Found:
    evaluation = evaluate(model, facts, EvaluationSettings(**unit.told), own=unit.own, progress=progress)
    summary = evaluation.summary()
    (size,) = summary["sizes"]
    return Found({"notes": summary["notes"], "size": size}, evaluation.rows)


def _interference(unit: Unit, model: KnowledgeModel, facts: EmbeddedFacts, progress: Progress | None) -> Found:
    told = unit.told
    found = measure_interference(model, facts, told["sizes"], seed=told["seed"], progress=progress)
    return Found({"interference": found})


def _cost(unit: Unit, model: KnowledgeModel, facts: EmbeddedFacts, progress: Progress | None) -> Found:
    told = unit.told
    found = measure_cost(
        model, facts, told["sizes"], selections=told["selections"], seed=told["seed"], progress=progress
    )
    return Found({"cost": {**found, "machine": machine()}})


_PARTS: dict[Part, Callable[[Unit, KnowledgeModel, EmbeddedFacts, Progress | None], Found]] = {
    "questions": _questions,
    "interference": _interference,
    "cost": _cost,
}
