"""Bodies about models and about the server itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kblam_ray.serving.http.schema.base import ResponseBody
from kblam_ray.serving.wanted import Status


class ModelBody(ResponseBody):
    """What a chat request can name as its model."""

    id: str
    object: Literal["model"]
    created: int = Field(description="seconds since 1970: when the server began")
    owned_by: Literal["kblam-ray"]


class ModelList(ResponseBody):
    """The base model alone, and with each knowledge base."""

    object: Literal["list"]
    data: list[ModelBody]


class KnowledgeBaseHealth(ResponseBody):
    """Whether a knowledge base is up to date."""

    status: Status
    version: int | None
    latest_version: int | None
    lag_s: float


class Health(ResponseBody):
    """ok: all is well; degraded: answers are given, but a knowledge base is not followed; unavailable: no replica."""

    status: Literal["ok", "degraded", "unavailable"]
    model: str
    replicas: int = Field(description="processes that answer")
    knowledge_bases: dict[str, KnowledgeBaseHealth]
