"""A run, decided: its settings, its tables at fixed versions, its places. What the driver sends to every process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kblam_ray import storage
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.errors import InputError
from kblam_ray.facts import write_facts
from kblam_ray.facts.synthetic import SyntheticFacts
from kblam_ray.table import KnowledgeBase
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.settings import CLOSED_FORM, RANDOM, TrainSettings

CHECKPOINTS = "checkpoints"
SYNTHETIC_TABLE, SYNTHETIC_FACTS = "synthetic_kb", "synthetic_facts.jsonl"
DEFAULT_ENCODER = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class RunPlan:
    """One run.

    Attributes:
        settings: with absolute paths, because Ray runs workers in folders of its own.
        tables: URI and version of each table trained on.
        device: "cpu" or "cuda".
    """

    settings: TrainSettings
    tables: tuple[tuple[str, int], ...]
    device: str

    @property
    def base_model(self) -> str:
        assert self.settings.base_model is not None
        return self.settings.base_model

    @property
    def checkpoints(self) -> str:
        """Where the checkpoints are."""
        return storage.join(self.settings.output, CHECKPOINTS)

    def record(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {**self.settings.of_the_run(), "tables": [list(table) for table in self.tables]}

    def facts(self) -> EmbeddedFacts:
        """The facts of all tables.

        Raises:
            EncoderMismatchError: the tables were embedded by different encoders.
            InputError: tables that say different things of one fact, or no facts.
            TableNotFoundError, TableError, StorageError: a table cannot be read.
        """
        facts = EmbeddedFacts.concat(
            EmbeddedFacts.of(KnowledgeBase.open(uri, version), version) for uri, version in self.tables
        )
        if not len(facts):
            raise InputError(
                "the tables hold no facts", where=", ".join(uri for uri, _ in self.tables), help="add some"
            )
        return facts


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """The settings with every local path made absolute.

    Raises:
        InputError: a path or URI that cannot be one.
    """

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path

    if settings.base_model is None:
        raise InputError("no base model", where="--base-model", help="give a folder or a name on the hub")
    mix = settings.mix.model_copy(update={"text_input": [absolute(path) for path in settings.mix.text_input]})
    start = settings.start if settings.start in (CLOSED_FORM, RANDOM) else absolute(settings.start)
    return settings.model_copy(
        update={
            "kb": [storage.normalize(uri) for uri in settings.kb],
            "output": storage.normalize(settings.output),
            "base_model": absolute(settings.base_model),
            "start": start,
            "strategy": settings.strategy if settings.strategy == "ddp" else absolute(settings.strategy),
            "mix": mix,
        }
    )


def fix_tables(settings: TrainSettings) -> tuple[tuple[str, int], ...]:
    """The tables to train on and their versions now; the synthetic one is made or brought up to date.

    Raises:
        TableNotFoundError, TableError, StorageError, InputError: tables that cannot be read.
        EncoderNotFoundError, EncoderMismatchError, EncoderError: facts that cannot be embedded.
    """
    found = []
    for uri in settings.kb:
        kb = KnowledgeBase.open(uri)
        if kb.version is None:
            raise InputError("the table has no version yet", where=uri, help="embed facts: jobs/embed_kb.py")
        found.append((uri, kb.version))
    if settings.synthetic:
        encoder = settings.encoder or (KnowledgeBase.open(settings.kb[0]).encoder.name if settings.kb else None)
        found.append(make_synthetic_table(settings, encoder or DEFAULT_ENCODER))
    return tuple(found)


def make_synthetic_table(settings: TrainSettings, encoder: str) -> tuple[str, int]:
    """Made-up facts in a table in the output folder, by the pipeline of jobs/embed_kb.py; what is there is kept."""
    from kblam_ray.table.pipeline.run import EmbedSettings, embed

    encoder_spec(encoder)  # a wrong name is known before a hundred thousand facts are made
    uri = storage.join(settings.output, SYNTHETIC_TABLE)
    source = storage.join(settings.output, SYNTHETIC_FACTS)
    if not storage.is_s3(source):
        Path(source).parent.mkdir(parents=True, exist_ok=True)
    write_facts(SyntheticFacts(settings.synthetic_seed).facts(0, settings.synthetic), source)
    done = embed(EmbedSettings(kb=uri, input=[source], mode="sync", encoder=encoder, device=settings.encoder_device))
    return uri, done["version"]
