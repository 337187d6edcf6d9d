"""Bodies about knowledge bases and their facts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError, core_schema

from kblam_ray.facts import MAX_NAME_CHARS, MAX_VALUE_CHARS, Fact, NotAFactError, validate_fact
from kblam_ray.facts.rows import canonical_metadata
from kblam_ray.serving.http.schema.base import NOT_BLANK, RequestBody, ResponseBody, Version
from kblam_ray.serving.wanted import Status


class _Text:
    """A text of a fact: blanks around it do not count, so the length is that of what a table keeps."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars

    def stripped(self, text: str) -> str:
        """The text without blanks around it; raises if nothing is left or too much."""
        text = text.strip()
        if not text:
            raise PydanticCustomError("blank", "the text is blank")
        if len(text) > self._max_chars:
            lengths = {"given": f"{len(text):,}", "most": f"{self._max_chars:,}"}
            raise PydanticCustomError("long", "the text has {given} characters, more than {most}", lengths)
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.stripped, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        shown: dict[str, Any] = {"type": "string", "pattern": NOT_BLANK}
        if self._max_chars <= MAX_NAME_CHARS:  # tools that make texts by pattern and length fail at a million
            return {**shown, "maxLength": self._max_chars}
        return {**shown, "description": f"at most {self._max_chars:,} characters"}


def _metadata(given: Any) -> str | None:
    """Canonical JSON text of metadata that came as an object or as JSON text of one."""
    if not isinstance(given, dict | str | None):
        raise PydanticCustomError("metadata_type", "Input should be an object")
    try:
        if isinstance(given, str):
            return validate_fact(Fact("-", "-", "-", given)).metadata
        return None if given is None else canonical_metadata(given)
    except NotAFactError as error:
        raise PydanticCustomError("metadata", "{reason}", {"reason": str(error)}) from None


Name = Annotated[str, _Text(MAX_NAME_CHARS)]
Value = Annotated[str, _Text(MAX_VALUE_CHARS)]


class NewFact(RequestBody):
    """A fact to write."""

    entity: Name
    property: Name
    value: Value
    metadata: Annotated[
        Any,
        AfterValidator(_metadata),
        WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]}),
    ] = Field(None, description="source, date, tenant: comes back with citations")


class NewFacts(RequestBody):
    """Facts to write, at once or not at all; of several with one identity the last counts."""

    facts: list[NewFact] = Field(min_length=1)


class FactName(RequestBody):
    """Names a fact; with its value where that is part of a fact's identity."""

    entity: Name
    property: Name
    value: Value | None = None


class FactNames(RequestBody):
    """Facts to delete; those that are not there are passed over."""

    facts: list[FactName] = Field(min_length=1)


class TableChoice(RequestBody):
    """The table behind a knowledge base."""

    uri: str = Field(max_length=4_096, pattern=NOT_BLANK, description="local path or s3:// URI of a table")
    version: Version | None = Field(None, description="stay at this version; null follows the newest")

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str) -> str:
        if "\0" in uri:
            raise PydanticCustomError("uri", "no path has a null character in it")
        return uri


class KnowledgeBaseBody(ResponseBody):
    """A knowledge base that is served."""

    name: str
    uri: str
    version: int | None = Field(description="that every replica serves; null before the first")
    latest_version: int | None = Field(description="newest in the table")
    pinned: bool = Field(description="whether it stays at its version")
    num_facts: int | None
    encoder: str | None
    status: Status
    lag_s: float = Field(description="how long a newer version has been known and not served everywhere")
    error: str | None = Field(description="why it is not ready")


class KnowledgeBaseList(ResponseBody):
    """All that are served."""

    object: Literal["list"]
    data: list[KnowledgeBaseBody]


class KnowledgeBaseRemoved(ResponseBody):
    """It is not served any more; its table stays."""

    name: str
    deleted: Literal[True]


class FactBody(ResponseBody):
    """A fact that is served."""

    fact_id: str = Field(description="a decimal number: 64 bits exceed what JavaScript holds")
    entity: str
    property: str
    value: str
    metadata: dict[str, Any] | None


class FactList(ResponseBody):
    """Some facts, by ascending id."""

    data: list[FactBody]
    next: str | None = Field(description="`after` of the next page; null on the last one")
    kb_version: int


class FactsWritten(ResponseBody):
    """What a write did; the version holds it."""

    kb_version: int
    added: int
    changed: int
    unchanged: int


class FactsDeleted(ResponseBody):
    """What a deletion did; the version is without the facts."""

    kb_version: int
    deleted: int
