"""Facts with their base embeddings in memory: what training and evaluation take from tables, or embed themselves.

Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kblam_ray.encoders.base import Encoder, EncoderSpec
from kblam_ray.errors import EmbeddingError, EncoderMismatchError, InputError
from kblam_ray.facts.fact import DEFAULT_IDENTITY, Fact, Identity, fact_id, key_text
from kblam_ray.facts.split import is_held_out
from kblam_ray.table.knowledge_base import KnowledgeBase
from kblam_ray.table.schema import EMBEDDING_DTYPE

TEXTS_PER_STEP = 4_096
"""Texts embedded at a time, so that float32 copies stay small."""


@dataclass(frozen=True)
class EmbeddedFacts:
    """Facts and their base embeddings; row m of every part is one fact.

    Attributes:
        facts: the facts, M of them.
        fact_ids_M: int64 [M], each once.
        keys_MP, values_MP: base embeddings of key and value texts, float16 [M, P].
        encoder: what made them.

    Raises:
        InputError: parts of different lengths, or an id that stands for two rows.
        EmbeddingError: embeddings of another width than the encoder's, another type, or with a number not finite.
    """

    facts: tuple[Fact, ...]
    fact_ids_M: np.ndarray
    keys_MP: np.ndarray
    values_MP: np.ndarray
    encoder: EncoderSpec

    def __post_init__(self) -> None:
        lengths = [len(part) for part in (self.facts, self.fact_ids_M, self.keys_MP, self.values_MP)]
        if len(set(lengths)) != 1:
            raise InputError(
                f"{lengths[0]} facts, {lengths[1]} ids, {lengths[2]} key and {lengths[3]} value embeddings",
                help="give one of each per fact",
            )
        for embeddings_MP in (self.keys_MP, self.values_MP):
            if embeddings_MP.dtype != EMBEDDING_DTYPE or embeddings_MP.shape[1:] != (self.encoder.dim,):
                raise EmbeddingError(
                    f"embeddings of type {embeddings_MP.dtype} and shape {list(embeddings_MP.shape)}",
                    where=self.encoder.name,
                    help=f"give float16 with {self.encoder.dim} numbers per fact, as the encoder makes them",
                )
            if not _is_finite(embeddings_MP):
                broken = int(np.argmin(np.isfinite(embeddings_MP).all(1)))
                raise EmbeddingError(
                    "an embedding has a number that is not finite",
                    where=f"the {self.facts[broken].property} of {self.facts[broken].entity}",
                    help="embed the fact again: its row in the table is broken",
                )
        if len(np.unique(self.fact_ids_M)) < len(self.fact_ids_M):
            raise InputError(
                "two rows have one fact id",
                where=_first_repeated(self.facts, self.fact_ids_M),
                help="give each fact once; facts with many values need an identity of all three texts",
            )

    @classmethod
    def of(cls, kb: KnowledgeBase, version: int | None = None) -> EmbeddedFacts:
        """The live facts of one version of a table, by default the handle's, by ascending fact id.

        Raises:
            TableNotFoundError, TableError, StorageError: see `KnowledgeBase.snapshot`.
        """
        snapshot = kb.snapshot(version)
        columns = [snapshot.facts[name].to_pylist() for name in ("entity", "property", "value", "metadata")]
        facts = tuple(Fact(*texts) for texts in zip(*columns, strict=True))
        return cls(facts, snapshot.fact_ids_M, snapshot.key_embeddings_MP, snapshot.value_embeddings_MP, kb.encoder)

    @classmethod
    def embed(cls, facts: Sequence[Fact], encoder: Encoder, *, identity: Identity | None = None) -> EmbeddedFacts:
        """Embed facts in this process, in the order given; larger sets go through a table, see `jobs/embed_kb.py`.

        Args:
            identity: what the ids are made of; None: entity and property, and the value too where the facts have
                several values for one property.

        Raises:
            InputError: a fact that is given twice.
            EmbeddingError: the encoder made numbers that are not finite in float16.
            EncoderError: the encoder failed.
        """
        if identity is None:
            pairs = {(fact.entity, fact.property) for fact in facts}
            identity = DEFAULT_IDENTITY if len(pairs) == len(facts) else "entity,property,value"
        ids_M = np.array([fact_id(fact, identity) for fact in facts], dtype=np.int64)
        texts = [*(key_text(fact.entity, fact.property) for fact in facts), *(fact.value for fact in facts)]
        row_of_text = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        embeddings_TP = _embedded(list(row_of_text), encoder)
        rows = np.array([row_of_text[text] for text in texts], dtype=np.int64)
        keys_MP, values_MP = embeddings_TP[rows[: len(facts)]], embeddings_TP[rows[len(facts) :]]
        return cls(tuple(facts), ids_M, keys_MP, values_MP, encoder.spec)

    @classmethod
    def concat(cls, parts: Iterable[EmbeddedFacts]) -> EmbeddedFacts:
        """The facts of several sets, in order; a fact that stands in more than one of them is kept once.

        Raises:
            EncoderMismatchError: the parts were embedded by different encoders.
            InputError: no part, or two parts have different values for one fact.
        """
        parts = list(parts)
        if not parts:
            raise InputError("no facts to put together", help="give at least one set of facts")
        first = parts[0]
        for part in parts[1:]:
            if part.encoder.revision != first.encoder.revision:
                raise EncoderMismatchError(
                    f"facts embedded by {part.encoder.name!r} beside facts embedded by {first.encoder.name!r}",
                    where=f"revisions {part.encoder.revision[:12]} and {first.encoder.revision[:12]}",
                    help="embed all tables with one encoder",
                )
        ids_M = np.concatenate([part.fact_ids_M for part in parts])
        facts = [fact for part in parts for fact in part.facts]
        kept_M = np.sort(np.unique(ids_M, return_index=True)[1])
        if len(kept_M) < len(ids_M):
            _refuse_contradictions(facts, ids_M, kept_M)
        return cls(
            tuple(facts[row] for row in kept_M.tolist()),
            ids_M[kept_M],
            np.concatenate([part.keys_MP for part in parts])[kept_M],
            np.concatenate([part.values_MP for part in parts])[kept_M],
            first.encoder,
        )

    def __add__(self, other: EmbeddedFacts) -> EmbeddedFacts:
        return EmbeddedFacts.concat([self, other])

    def __len__(self) -> int:
        return len(self.facts)

    def take(self, rows: Sequence[int] | np.ndarray) -> EmbeddedFacts:
        """The facts of some rows, in that order.

        Args:
            rows: row numbers, each at most once, or a boolean mask [M].

        Raises:
            InputError: a row that is not there, or one that is named twice.
        """
        rows_K = np.asarray(rows)
        if rows_K.dtype == bool:
            rows_K = np.flatnonzero(rows_K)
        rows_K = rows_K.astype(np.int64)
        if len(rows_K) and not (rows_K.min() >= 0 and rows_K.max() < len(self)):
            raise InputError(
                f"rows {rows_K.min()} to {rows_K.max()} of {len(self)} facts", where="take", help="give rows from 0"
            )
        return EmbeddedFacts(
            tuple(self.facts[row] for row in rows_K.tolist()),
            self.fact_ids_M[rows_K],
            self.keys_MP[rows_K],
            self.values_MP[rows_K],
            self.encoder,
        )

    def split(self, held_out: float, seed: int = 0) -> tuple[EmbeddedFacts, EmbeddedFacts]:
        """Facts to train on and facts held out; all facts of an entity are on one side, see `facts.is_held_out`.

        Args:
            held_out: the share of entities held out, 0 to 1.

        Raises:
            InputError: a share outside of 0 to 1.
        """
        if not 0 <= held_out <= 1:
            raise InputError(f"a held-out share of {held_out}", where="held_out", help="give a number from 0 to 1")
        is_out = {entity: is_held_out(entity, held_out, seed) for entity in {fact.entity for fact in self.facts}}
        out_M = np.array([is_out[fact.entity] for fact in self.facts], dtype=bool)
        return self.take(~out_M), self.take(out_M)


def _is_finite(embeddings_MP: np.ndarray) -> bool:
    # By the bits of float16, ten times as fast as by its numbers: the exponents of infinities and NaN are all ones.
    bits_MP = np.ascontiguousarray(embeddings_MP).view(np.uint16)
    return not any(((rows & 0x7C00) == 0x7C00).any() for rows in np.array_split(bits_MP, len(bits_MP) // 65_536 + 1))


def _embedded(texts: list[str], encoder: Encoder) -> np.ndarray:
    embeddings_TP = np.empty((len(texts), encoder.spec.dim), dtype=EMBEDDING_DTYPE)
    for start in range(0, len(texts), TEXTS_PER_STEP):
        step = texts[start : start + TEXTS_PER_STEP]
        with np.errstate(over="ignore"):  # found and named below
            embeddings_TP[start : start + len(step)] = encoder.encode(step)
        finite_T = np.isfinite(embeddings_TP[start : start + len(step)]).all(1)
        if not finite_T.all():
            raise EmbeddingError(
                "an embedding has a number that is not finite in float16",
                where=f"{encoder.spec.name}, text {step[int(np.argmin(finite_T))][:80]!r}",
                help="embeddings have a norm near 1: check the encoder",
            )
    return embeddings_TP


def _first_repeated(facts: Sequence[Fact], ids_M: np.ndarray) -> str:
    seen: set[int] = set()
    for fact, number in zip(facts, ids_M.tolist(), strict=True):
        if number in seen:
            return f"the {fact.property} of {fact.entity}"
        seen.add(number)
    raise AssertionError("no id is repeated")


def _refuse_contradictions(facts: Sequence[Fact], ids_M: np.ndarray, kept_M: np.ndarray) -> None:
    first = {int(ids_M[row]): facts[row] for row in kept_M.tolist()}
    for fact, number in zip(facts, ids_M.tolist(), strict=True):
        known = first[number]
        if (known.entity, known.property, known.value) != (fact.entity, fact.property, fact.value):
            raise InputError(
                f"two values for one fact: {known.value[:80]!r} and {fact.value[:80]!r}",
                where=f"the {fact.property} of {fact.entity}",
                help="take it out of one of the tables",
            )
