"""The body of `POST /v1/chat/completions`: OpenAI's parameters, each supported or refused by name, and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from kblam_ray.serving.http.schema.base import MAX_EXACT, MAX_INT64, Neutral, RequestBody, Version, Whole

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_CITATIONS = 1_000
SELECTION_PATTERN = r"^(all|similar:[1-9][0-9]{0,8})$"

Grounding = Literal["off", "cite", "verbatim"]

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}


def _joined(content: Any) -> Any:
    """The text of a content of parts; a content that is no list as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise PydanticCustomError("part_type", "part {number} is not an object with a type", {"number": number})
        if kind != "text":
            shown = {"number": number, "kind": kind[:40]}
            raise PydanticCustomError("unsupported_parameter", "part {number} is `{kind}`, only text is read", shown)
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("part_type", "part {number} is not a `type` and a `text`", {"number": number})
        texts.append(part["text"])
    return "".join(texts)


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Content = Annotated[
    str,
    BeforeValidator(_joined),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}),
]

_STOP = {"type": "string", "minLength": 1}
Stop = Annotated[
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None,
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]

Count = Annotated[int, Field(ge=1, le=MAX_EXACT), Whole]
Seed = Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64), Whole]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Whole]
NumCitations = Annotated[int, Field(ge=0, le=MAX_CITATIONS), Whole]

_IGNORED = "no answer depends on it"


class ChatMessage(RequestBody):
    """A message of the conversation so far; an assistant's may be handed back as it came."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is taken as system")
    content: Content = Field(description="text, or parts of it that are joined")
    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None


class StreamOptions(RequestBody):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="count tokens in a last chunk without choices")
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class ChatRequest(RequestBody):
    """A question, in OpenAI's schema. Parameters that are not supported are taken with values that change nothing."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"properties": {"top_logprobs": {"type": "integer"}}, "required": ["top_logprobs"]},
                    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
                },
                {
                    "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
                    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
                },
            ]
        }
    )

    model: str = Field(min_length=1, max_length=512, description="base, base:kb or base:kb@version, see GET /v1/models")
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = Field(None, description="answer in server-sent events")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="only the likeliest tokens of this probability")
    max_tokens: Count | None = Field(None, description="longest answer")
    max_completion_tokens: Count | None = Field(None, description="another name of max_tokens; the smaller counts")
    stop: Stop = Field(None, description="an answer ends before the first of these texts")
    seed: Seed | None = Field(None, description="equal seeds give equal answers")
    n: Count | None = Field(None, description="answers to give")
    logprobs: bool | None = Field(None, description="log probability of each token")
    top_logprobs: NumLogprobs | None = Field(None, description="alternatives to each token; needs logprobs")

    grounding: Grounding | None = Field(
        None,
        description="off: attention alone; cite: name the facts attended to; verbatim: state facts letter by letter",
    )
    selection: str | None = Field(
        None, pattern=SELECTION_PATTERN, description="all facts, or the K most similar to the question"
    )
    max_citations: NumCitations | None = Field(None, description="most facts to name; 5 by default")
    min_kb_version: Version | None = Field(None, description="answer from this version or a newer one, else 409")

    user: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    parallel_tool_calls: bool | None = Field(None, description="there are no tools")

    audio: Annotated[Any, Neutral()] = None
    frequency_penalty: Annotated[Any, Neutral(0)] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    functions: Annotated[Any, Neutral([])] = None
    logit_bias: Annotated[Any, Neutral({})] = None
    metadata: Annotated[Any, Neutral({})] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    moderation: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    presence_penalty: Annotated[Any, Neutral(0)] = None
    prompt_cache_options: Annotated[Any, Neutral()] = None
    prompt_cache_retention: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: Annotated[Any, Neutral(False)] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    tools: Annotated[Any, Neutral([])] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Annotated[Any, Neutral()] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("pair", "top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("pair", "stream_options needs stream: true")
        return self
