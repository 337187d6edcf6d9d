"""Two programs beside the job that is tested: one writes small groups and tidies, one reads versions all the time.

    python -m tests.chaos.actors write KB GROUP FIRST_GENERATION ENCODER SEED
    python -m tests.chaos.actors read KB SEED

Each says on stdout, one JSON object per line and at once, what it did; SIGTERM ends it after what it is doing.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from kblam_ray import KnowledgeBase, load_encoder
from kblam_ray.encoders.base import Encoder
from kblam_ray.errors import StorageError, TableError, TableNotFoundError
from kblam_ray.facts.fact import key_text
from tests.chaos.model import Row, generations_in, rows_of

Say = Callable[..., None]


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def write(uri: str, group: str, first: int, encoder: str, seed: int, stop: threading.Event) -> None:
    """One generation after another, now and then none of it; the same again where it is not known what was written."""
    generator, loaded = random.Random(seed), load_encoder(encoder)
    generation = first
    while not stop.wait(generator.uniform(0.3, 1.5)):
        absent = generation % 5 == 0
        say(issued=generation, group=group, absent=absent)
        try:
            kb, rows = _open_or_create(uri, loaded), rows_of(group, generation)
            version = (kb.remove([row[:2] for row in rows]) if absent else kb.write(rows)).version
        except StorageError as error:
            say(failed=generation, error=str(error))
            continue
        say(acknowledged=generation, group=group, version=version)
        generation += 1
        if generator.random() < 0.2:
            try:
                kb = KnowledgeBase.open(uri)
                kb.compact()
                kb.vacuum()
            except StorageError as error:
                say(tidying_failed=str(error))


def _open_or_create(uri: str, encoder: Encoder) -> KnowledgeBase:
    for _ in range(3):
        try:
            return KnowledgeBase.open(uri, encoder=encoder)
        except TableNotFoundError:
            try:
                return KnowledgeBase.create(uri, encoder)
            except TableError:  # another writer was first
                continue
    return KnowledgeBase.open(uri, encoder=encoder)


def read(uri: str, seed: int, stop: threading.Event) -> None:
    """The newest version if it is a new one, else one that was passed over, or one again; the store may fail."""
    generator, seen = random.Random(seed), set[int]()
    while not stop.wait(0.8):
        try:
            kb = KnowledgeBase.open(uri)
            assert kb.version is not None
            if kb.version < max(seen, default=0):
                say(problems=[f"the newest version was {kb.version} after {max(seen)} had been read"])
            if kb.version in seen and generator.random() < 0.8:
                passed_over = sorted(set(range(kb.version)) - seen)
                kb = KnowledgeBase.open(uri, generator.choice(passed_over or sorted(seen)))
            report = read_version(kb)
        except TableNotFoundError as error:
            if seen:
                say(problems=[f"a table that was there is not found: {error}"])
            continue
        except StorageError as error:
            say(problems=[], failed=str(error))
            continue
        except Exception as error:  # noqa: BLE001 - whatever else a reader meets is a finding
            say(problems=[f"a reader met {type(error).__name__}: {error}"])
            continue
        seen.add(report["version"])
        say(**report)


def read_version(kb: KnowledgeBase, *, is_last: bool = False) -> dict[str, Any]:
    """What a version shows, and what is wrong with it by itself: its facts, and some of their embeddings.

    Args:
        is_last: all of the embeddings are looked at.
    """
    snapshot, encoder = kb.snapshot(), _encoder(kb.encoder.name)
    rows: list[Row] = [(f["entity"], f["property"], f["value"]) for f in snapshot.facts.to_pylist()]
    groups, problems = generations_in(rows)
    if len(np.unique(snapshot.fact_ids_M)) != len(rows):
        problems.append("a fact id appears twice")
    # Some of the embeddings: a fact with those of another one is as wrong as a fact with another value.
    some = range(zlib.crc32(str(kb.version).encode()) % 7, len(rows), max(7, len(rows) // 20))
    for at in range(len(rows)) if is_last else some:
        entity, name, value = rows[at]
        wanted = np.asarray(encoder.encode([key_text(entity, name), value]), np.float32)
        found = np.stack([snapshot.key_embeddings_MP[at], snapshot.value_embeddings_MP[at]]).astype(np.float32)
        if not np.allclose(found, wanted, atol=2e-3):
            problems.append(f"{entity} has embeddings of something else")
    return {"version": kb.version, "groups": groups, "problems": [f"version {kb.version}: {p}" for p in problems]}


@cache
def _encoder(name: str) -> Encoder:
    return load_encoder(name)


def main(arguments: list[str]) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    match arguments:
        case ["write", uri, group, first, encoder, seed]:
            write(uri, group, int(first), encoder, int(seed), stop)
        case ["read", uri, seed]:
            read(uri, int(seed), stop)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
