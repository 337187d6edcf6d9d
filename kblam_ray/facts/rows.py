"""From one row of any accepted shape to a fact, or to the reason why the row is not one.

Shapes, told by the columns a row has; the first that fits counts:

    {entity, property, value}
    {entity, description}                       property = "description"
    {name, description_type, description}       the published KBLaM dataset
    {head, relation, tail}                      knowledge graphs

Texts are kept as given apart from white space around them. Further columns become the fact's metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from kblam_ray.facts.fact import MAX_NAME_CHARS, MAX_VALUE_CHARS, Fact

METADATA_COLUMN = "metadata"

_MAX_INT_DIGITS = 4_000
"""Python refuses to convert longer whole numbers (`sys.get_int_max_str_digits`, 4,300 by default)."""


class NotAFactError(ValueError):
    """A row is not a fact; the message is the reason, without a place: only the caller knows file and row."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Which columns of a row hold the fact.

    Attributes:
        property_column: None where every row says the property "description".
        ignored: columns that are neither fact nor metadata.
    """

    entity_column: str
    property_column: str | None
    value_column: str
    ignored: frozenset[str] = frozenset()

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(column for column in (self.entity_column, self.property_column, self.value_column) if column)


SHAPES = (
    Shape("entity", "property", "value"),
    Shape("entity", None, "description"),
    # The dataset's other columns are questions and answers to train with: no source, date or tenant of the fact.
    Shape(
        "name",
        "description_type",
        "description",
        ignored=frozenset({"key_string", "Q", "A", "extended_Q", "extended_A"}),
    ),
    Shape("head", "relation", "tail"),
)


@lru_cache(maxsize=256)
def shape_of(columns: tuple[str, ...]) -> Shape:
    """The first accepted shape whose columns are all among `columns`.

    Raises:
        NotAFactError: no shape fits; the message names what the nearest one lacks.
    """
    present = set(columns)
    for shape in SHAPES:
        if present.issuperset(shape.required):
            return shape
    nearest = max(SHAPES, key=lambda shape: sum(column in present for column in shape.required))
    missing = [column for column in nearest.required if column not in present]
    if len(missing) == len(nearest.required):
        raise NotAFactError("none of the accepted sets of columns, such as `entity`, `property`, `value`")
    raise NotAFactError("no " + " and no ".join(f"`{column}`" for column in missing))


def fact_from_row(row: Any, shape: Shape | None = None) -> Fact:
    """The fact that `row`, a mapping from column to value, states.

    Columns beyond the shape's become `metadata`, except null ones and the published dataset's `key_string`, `Q`, `A`,
    `extended_Q` and `extended_A`, which are training questions. A column `metadata` that holds an object, or JSON
    text of an object, is metadata itself and the further columns are added to it.

    Args:
        row: what a parser made of one row; anything but a mapping is refused.
        shape: the row's shape where the caller knows it (one schema per file); told from the columns otherwise.

    Raises:
        NotAFactError: a field is missing, empty, too long, of the wrong type or not valid Unicode.
    """
    if not isinstance(row, Mapping):
        raise NotAFactError(f"{_kind(row)}, not an object with columns")
    if shape is None:
        shape = shape_of(tuple(row))
    entity = _text(row[shape.entity_column], shape.entity_column, MAX_NAME_CHARS)
    if shape.property_column is None:
        property, num_columns = "description", 2
    else:
        property, num_columns = _text(row[shape.property_column], shape.property_column, MAX_NAME_CHARS), 3
    value = _text(row[shape.value_column], shape.value_column, MAX_VALUE_CHARS)
    metadata = None if len(row) == num_columns else _row_metadata(row, shape)
    return Fact(entity, property, value, metadata)


def validate_fact(fact: Fact) -> Fact:
    """`fact` as it reads back from a file: texts stripped, metadata canonical.

    Raises:
        NotAFactError: as for `fact_from_row`; also if `metadata` is not JSON text of an object.
    """
    metadata = None
    if fact.metadata is not None:
        parsed = _object(fact.metadata) if isinstance(fact.metadata, str) else None
        if parsed is None:
            raise NotAFactError("`metadata` is not JSON text of an object")
        metadata = canonical_metadata(parsed)
    return Fact(
        _text(fact.entity, "entity", MAX_NAME_CHARS),
        _text(fact.property, "property", MAX_NAME_CHARS),
        _text(fact.value, "value", MAX_VALUE_CHARS),
        metadata,
    )


def canonical_metadata(metadata: Mapping[str, Any]) -> str | None:
    """The one JSON text of `metadata`: keys sorted, compact, characters as they are; None if nothing is in it.

    Null entries at the top level are left out, dates and times become ISO 8601 text, decimals their digits as text.

    Raises:
        NotAFactError: an entry that JSON cannot hold (bytes, NaN, a key that is not text), or too long a text.
    """
    entries = {key: value for key, value in metadata.items() if value is not None}
    if not entries:
        return None
    for key in entries:
        if not isinstance(key, str):
            raise NotAFactError(f"the metadata's key {key!r} is {_kind(key)}, not text")
    try:
        text = _ENCODER.encode(entries)
    except (TypeError, ValueError, RecursionError) as error:
        raise NotAFactError(f"the metadata cannot be written as JSON: {error}") from None
    if len(text) > MAX_VALUE_CHARS:
        raise NotAFactError(f"the metadata has {len(text):,} characters, more than {MAX_VALUE_CHARS:,}")
    _check_unicode(text, "metadata")
    return text


def _row_metadata(row: Mapping[str, Any], shape: Shape) -> str | None:
    known = {*shape.required, *shape.ignored}
    entries = {column: value for column, value in row.items() if column not in known and value is not None}
    given = entries.get(METADATA_COLUMN)
    if isinstance(given, str):
        given = _object(given)
    if isinstance(given, Mapping):
        del entries[METADATA_COLUMN]
        for column in entries.keys() & given.keys():
            if given[column] is not None and entries[column] != given[column]:
                raise NotAFactError(f"`{column}` is a column and, with another value, in the column `metadata`")
        entries = {**given, **entries}
    return canonical_metadata(entries)


def _object(text: str) -> dict[str, Any] | None:
    """The object whose JSON text `text` is; None if it is any other text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        return JSON_DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _text(value: Any, column: str, max_chars: int) -> str:
    if not isinstance(value, str):
        raise NotAFactError(f"`{column}` is {_kind(value)}, not text")
    text = value.strip()
    if not text:
        raise NotAFactError(f"`{column}` is empty")
    if len(text) > max_chars:
        raise NotAFactError(f"`{column}` has {len(text):,} characters, more than {max_chars:,}")
    if not text.isascii():
        _check_unicode(text, column)
    return text


def _check_unicode(text: str, column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotAFactError(
            f"`{column}` is not valid Unicode at character {error.start + 1}: "
            "a byte that is not UTF-8, or half of a surrogate pair"
        ) from None


_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", Decimal: "a number"}
_KINDS |= {str: "text", list: "a list", dict: "an object", bytes: "bytes"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value)) or f"of type {type(value).__name__}"


def _json_value(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError(f"{_kind(value)} has no JSON form")


_ENCODER = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_json_value
)

# One decoder for all that is JSON, so that a row gives the same fact whatever file it stands in. The standard
# library's, because it keeps whole numbers of any size exact and half surrogate pairs visible, where faster ones
# round the former or put "?" for the latter. NaN, Infinity and numbers of thousands of digits come out as floats that
# the encoder above refuses: a bad row, not a broken file.
JSON_DECODER = json.JSONDecoder(
    parse_constant=float, parse_int=lambda digits: int(digits) if len(digits) <= _MAX_INT_DIGITS else math.inf
)
