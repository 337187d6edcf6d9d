"""How all bodies are read and shown: nothing is converted, nothing unknown is passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

MAX_INT64 = 2**63 - 1
MAX_EXACT = 2**53 - 1
"""The largest whole number that every JSON reader keeps exactly."""


def _whole(given: Any) -> Any:
    """5 for 5.0: JSON has one kind of number, and some clients write all of them with a point."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


Whole = BeforeValidator(_whole)
Version = Annotated[int, Field(ge=0, le=MAX_EXACT), Whole]

NOT_BLANK = r"[^\s\u001c-\u001f\u0085]"
"""A character that `str.strip` leaves: Python's blanks, to whoever goes by those of JavaScript."""


class RequestBody(BaseModel):
    """A body that a client sends: other fields are errors, "5" is not 5, and NaN is nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ResponseBody(BaseModel):
    """A body that the server sends."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Neutral:
    """Marks a parameter that is taken only with values that change nothing: null and `values`.

    It validates to None; anything else is the error `unsupported_parameter`, which says what would be taken.
    """

    def __init__(self, *values: Any) -> None:
        self.taken = (*values, None)

    def check(self, value: Any) -> None:
        """Raise unless a value changes nothing."""
        # True == 1 == 1.0 in Python, and in JSON only the numbers are equal.
        if not any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in self.taken):
            shown = {"shown": " or ".join(map(json.dumps, self.taken))}
            raise PydanticCustomError("unsupported_parameter", "this value is not supported, only {shown}", shown)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.taken), "description": "taken only with values that change nothing"}


def metadata_object(given: Any) -> Mapping[str, Any] | None:
    """Metadata as an object, from JSON text as tables keep it."""
    return json.loads(given) if isinstance(given, str) else given
