"""Where the facts of an evaluation come from: tables, files of facts and synthetic facts, each under a name.

Files and synthetic facts become tables under the output folder, one for each encoder that reads them. A table that is
there already is brought up to date with its file, so that what a killed run left half-written is finished.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kblam_ray.attention.adapter.config import EncoderRef
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import BadRowError, InputError
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.facts import RejectedRow, expand_inputs, read_facts
from kblam_ray.facts.fact import DEFAULT_IDENTITY, Fact, Identity, content_hash, fact_id, identity_fields
from kblam_ray.facts.inputs import format_of
from kblam_ray.facts.synthetic.generator import SyntheticFacts
from kblam_ray.facts.writing import write_facts
from kblam_ray.storage import join, normalize
from kblam_ray.table.knowledge_base import KnowledgeBase
from kblam_ray.table.live import live_index
from kblam_ray.table.log import TableLog
from kblam_ray.table.plan import collision

NAME = re.compile(r"[^\W_][\w.-]{0,63}")

FACTS_PER_WRITE = 4_096
"""Facts embedded and committed at a time where Ray does not run: what a killed run loses at most."""

SYNTHETIC = "synthetic"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Facts under a name.

    Attributes:
        kind: a table, a file of facts (or a folder, or a glob of them), or synthetic facts.
        place: the table's URI or the file, as `storage.normalize` writes it; empty for synthetic facts.
        num_facts, seed: of synthetic facts.
    """

    name: str
    kind: Literal["kb", "input", "synthetic"]
    place: str = ""
    num_facts: int | None = None
    seed: int = 0


def named(given: Sequence[str], flag: str) -> dict[str, str]:
    """`[NAME=]PLACE` arguments as places by name; a place without a name has that of its last part.

    Args:
        flag: what they were given by, for errors.

    Raises:
        InputError: a name with nothing behind it, or one that two have.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            name, place = default_name(text), text
        if not place.strip():
            raise InputError("a name without a place", where=f"{flag} {text}", help=f"write {flag} NAME=PLACE")
        if name in found:
            raise InputError(
                f"two of the name {name!r}: {found[name]} and {place}", where=flag, help=f"write {flag} NAME=PLACE"
            )
        found[name] = place
    return found


def default_name(place: str) -> str:
    """The last part of a path or URI without the ending of a format, in letters that a name can have."""
    last = place.rstrip("/").rpartition("/")[2]
    if format_of(last):
        last = last.removesuffix(".gz").rpartition(".")[0]
    name = re.sub(r"[^\w.-]+", "-", last).strip("-._")[:64]
    return name if NAME.fullmatch(name) else "facts"


def sources_of(settings: EvaluateSettings) -> list[Source]:
    """The sources that settings name: tables, files, then synthetic facts.

    Raises:
        InputError: two have one name, or a place is none.
    """
    found = [Source(name, "kb", normalize(place)) for name, place in named(settings.kb, "--kb").items()]
    found += [Source(name, "input", normalize(place)) for name, place in named(settings.input, "--input").items()]
    if settings.synthetic is not None:
        found.append(
            Source(SYNTHETIC, "synthetic", num_facts=settings.synthetic, seed=settings.synthetic_seed),
        )
    names = [source.name for source in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"two sources of facts of the name {twice!r}",
            where="--kb, --input, --synthetic",
            help="write NAME=PLACE; synthetic facts have the name `synthetic`",
        )
    return found


def read_input(source: Source) -> list[Fact]:
    """The facts of a file, a folder or a glob of files.

    Raises:
        InputError: there is no such file, or it has no facts.
        BadRowError: a row is no fact; names it.
        StorageError: a file cannot be read.
    """
    facts = []
    for file in expand_inputs([source.place]):
        for row in read_facts(file):
            if isinstance(row, RejectedRow):
                # Its own help speaks of a flag that leaves rows out, which no evaluation has.
                raise row.to_error() if row.fatal else BadRowError(row.reason, where=row.where, help="mend the row")
            facts.append(row.fact)
    if not facts:
        raise InputError("the input holds no facts", where=source.place, help="give a file that has some")
    return facts


def num_distinct(facts: Sequence[Fact]) -> int:
    """How many facts there are in a table of these."""
    identity = _identity(facts)
    return len({identity_fields(fact, identity) for fact in facts})


def make_table(
    source: Source,
    encoder: EncoderRef | None,
    folder: str,
    *,
    facts: Sequence[Fact] | None = None,
    gpus_per_worker: float = 0,
    tell: Tell | None = None,
) -> KnowledgeBase:
    """A table of a file's facts, or of synthetic ones, as they are now; made, finished or brought up to date.

    Where Ray runs in this process already, its workers embed; else this process does.

    Args:
        encoder: what embeds them: an adapter's.
        folder: where tables are kept.
        facts: of the file, where `read_input` has read them before.
        gpus_per_worker: of the Ray workers that embed.

    Raises:
        InputError: the adapter names no encoder, there is no such file, or it has no facts.
        BadRowError: a row of the file is no fact.
        EncoderMismatchError, EncoderNotFoundError, EncoderError: the adapter's encoder cannot be had.
        StorageError: the table cannot be written.
    """
    if encoder is None:
        raise InputError(
            "the adapter does not say which encoder it reads, so its facts cannot be embedded",
            where=f"--{source.kind}",
            help="give a table: --kb",
        )
    ending = f"-{encoder.revision[:8]}"
    if source.kind == "synthetic":
        stem = f"{source.name}-{source.num_facts}-{source.seed}"
        uri = join(folder, stem + ending)
        log = TableLog.open_if_exists(uri)
        # They are a function of number and seed: so many facts are these facts.
        if log is not None and len(live_index(log)) == source.num_facts:
            return KnowledgeBase.open(uri)
        facts, identity = list(SyntheticFacts(source.seed).facts(0, source.num_facts or 0)), DEFAULT_IDENTITY
        file = join(folder, f"{stem}.parquet")
    else:
        facts, file = read_input(source) if facts is None else facts, source.place
        identity = _identity(facts)
        uri = join(folder, source.name + ("" if identity == DEFAULT_IDENTITY else "-values") + ending)
    named_encoder = EncoderSettings(name=encoder.name, expected_revision=encoder.revision)
    if _ray_runs():
        if source.kind == "synthetic":
            write_facts(facts, file)
        _embed_on_ray(uri, file, named_encoder, identity, gpus_per_worker)
    else:
        _embed_here(uri, facts, named_encoder, identity, tell)
    return KnowledgeBase.open(uri)


def _identity(facts: Iterable[Fact]) -> Identity:
    """Entity and property, unless some entity has two values for one property."""
    value_of: dict[tuple[str, str], str] = {}
    for fact in facts:
        if value_of.setdefault((fact.entity, fact.property), fact.value) != fact.value:
            return "entity,property,value"
    return DEFAULT_IDENTITY


def _embed_here(
    uri: str, facts: Sequence[Fact], encoder: EncoderSettings, identity: Identity, tell: Tell | None
) -> None:
    """Write what the table lacks, commit by commit, and delete what the facts lack."""
    log = TableLog.open_if_exists(uri)
    kb = KnowledgeBase.open(uri, encoder=encoder) if log else KnowledgeBase.create(uri, encoder, identity=identity)
    wanted: dict[int, Fact] = {}
    for fact in facts:
        known = wanted.setdefault(number := fact_id(fact, identity), fact)
        if identity_fields(known, identity) != identity_fields(fact, identity):
            raise collision(known, fact, identity)
        # Of several rows for one fact the last counts, as in every table.
        wanted[number] = fact
    live: dict[int, str] = {}
    if log is not None:
        index = live_index(log)
        live = dict(zip(index["fact_id"].to_pylist(), index["content_hash"].to_pylist(), strict=True))
    lacking = [fact for number, fact in wanted.items() if live.get(number) != content_hash(fact)]
    for start in range(0, len(lacking), FACTS_PER_WRITE):
        if tell is not None:
            tell(f"embedding into {uri}: {len(wanted) - len(lacking) + start:,} of {len(wanted):,} facts")
        kb.upsert(lacking[start : start + FACTS_PER_WRITE])
    gone = live.keys() - wanted.keys()
    if gone:
        kb.remove(fact_ids=sorted(gone))


def _embed_on_ray(uri: str, file: str, encoder: EncoderSettings, identity: Identity, gpus_per_worker: float) -> None:
    from kblam_ray.table.pipeline.run import EmbedSettings, embed

    # The pipeline knows an encoder by its name: that this is the adapter's is made sure of here.
    encoder_spec(encoder)
    embed(
        EmbedSettings(
            kb=uri,
            input=[file],
            mode="sync",
            identity=identity,
            encoder=encoder.name,
            gpus_per_worker=gpus_per_worker,
        )
    )


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
