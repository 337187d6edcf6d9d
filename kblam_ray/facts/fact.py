"""What a fact is: its three texts, its identity, its id and its content hash.

A fact is an (entity, property, value) triple with optional metadata. Which fields say that two facts
are the same one is the table's identity rule: (entity, property) by default, so that a new value
replaces the old, or all three, so that many values stand side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Identity = Literal["entity,property", "entity,property,value"]
"""The identity rule of a table, written as on the command line (`--identity`)."""

DEFAULT_IDENTITY: Identity = "entity,property"

FIELD_SEPARATOR = "\x1f"
"""ASCII unit separator, put between the fields of an identity before hashing."""

MAX_NAME_CHARS = 4_096
"""Longest entity or property, in characters. Longer ones are mistakes (a whole document in a column)."""

MAX_VALUE_CHARS = 1_000_000
"""Longest value or metadata, in characters."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. Texts are stripped and not empty; `metadata` is JSON text of an object, or None."""

    entity: str
    property: str
    value: str
    metadata: str | None = None


def key_text(entity: str, property: str) -> str:
    """The text whose embedding becomes a fact's key (paper, section 3.1): `the {property} of {entity}`."""
    return f"the {property} of {entity}"


def identity_fields(fact: Fact, identity: Identity = DEFAULT_IDENTITY) -> tuple[str, ...]:
    """The texts that make `fact` the fact it is under the table's identity rule."""
    if identity == "entity,property":
        return (fact.entity, fact.property)
    return (fact.entity, fact.property, fact.value)


def fact_id(fact: Fact, identity: Identity = DEFAULT_IDENTITY) -> int:
    """The fact's id: a signed 64-bit integer that any program can compute again.

    The first 8 bytes, little-endian, of BLAKE2b over the stripped identity fields joined by 0x1F, in UTF-8.
    """
    fields = (field.strip() for field in identity_fields(fact, identity))
    digest = blake2b(FIELD_SEPARATOR.join(fields).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def content_hash(fact: Fact) -> str:
    """32 hexadecimal digits that change when any field of the fact changes.

    Each field is preceded by its length, so that no two facts hash the same bytes.
    """
    digest = blake2b(digest_size=16)
    for field in (fact.entity, fact.property, fact.value, fact.metadata or ""):
        data = field.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
