"""What `POST /v1/chat/completions` answers: OpenAI's completion and chunks of it, with version and citations on top."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kblam_ray.serving.http.schema.base import ResponseBody


class Citation(ResponseBody):
    """A fact that an answer attended to."""

    fact_id: str = Field(description="a decimal number: 64 bits exceed what JavaScript holds")
    entity: str | None
    property: str | None
    value: str | None
    metadata: dict[str, Any] | None
    score: float = Field(description="its share of the attention, from 0 to 1")


class TopLogprob(ResponseBody):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="of the token's text in UTF-8; null where it is a part of a character")


class TokenLogprob(TopLogprob):
    """A token of an answer, and what else could have stood there."""

    top_logprobs: list[TopLogprob]


class Logprobs(ResponseBody):
    """Log probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class Usage(ResponseBody):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(ResponseBody):
    """The text of an answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = Field(description="always null: a refusal is a text; see `refused`")


class AnswerChoice(ResponseBody):
    """One answer. With n > 1 each has its own citations."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None
    refused: bool = False
    citations: list[Citation] = Field(default_factory=list)


class ChatCompletion(ResponseBody):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    system_fingerprint: str
    choices: list[AnswerChoice]
    usage: Usage
    kb_version: int | None = Field(description="the version answered from; null without a knowledge base")
    refused: bool = Field(description="whether no fact applied, of the first choice")
    citations: list[Citation] = Field(description="the facts attended to, of the first choice")


class Delta(ResponseBody):
    """What a chunk adds to a choice."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(ResponseBody):
    """A choice in a chunk. With n > 1 the one that finishes it has its citations."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: Logprobs | None
    refused: bool = False
    citations: list[Citation] = Field(default_factory=list)


class ChatCompletionChunk(ResponseBody):
    """The data of one server-sent event. `kb_version`, `refused` and `citations` are in the last one before [DONE]."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    kb_version: int | None = None
    refused: bool = False
    citations: list[Citation] = Field(default_factory=list)
