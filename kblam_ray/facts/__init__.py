"""What a fact is; reading and writing every input format."""

from kblam_ray.facts.fact import (
    DEFAULT_IDENTITY,
    MAX_NAME_CHARS,
    MAX_VALUE_CHARS,
    Fact,
    Identity,
    content_hash,
    fact_id,
    identity_fields,
    key_text,
)
from kblam_ray.facts.inputs import InputFile, expand_inputs
from kblam_ray.facts.reading import FactRow, RejectedRow, read_facts
from kblam_ray.facts.rows import NotAFactError, canonical_metadata, fact_from_row, validate_fact
from kblam_ray.facts.writing import write_facts, write_rejected

__all__ = [
    "DEFAULT_IDENTITY",
    "MAX_NAME_CHARS",
    "MAX_VALUE_CHARS",
    "Fact",
    "FactRow",
    "Identity",
    "InputFile",
    "NotAFactError",
    "RejectedRow",
    "canonical_metadata",
    "content_hash",
    "expand_inputs",
    "fact_from_row",
    "fact_id",
    "identity_fields",
    "key_text",
    "read_facts",
    "validate_fact",
    "write_facts",
    "write_rejected",
]
