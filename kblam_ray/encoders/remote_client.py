"""One request to an embeddings endpoint of OpenAI's protocol: its answer checked, its failure given a name.

Retrying is the caller's: the `openai` package would try again on its own only for what it sees as a failure
of transport, and an answer that was cut or mixed up is not one.
"""

from __future__ import annotations

import base64
import binascii
import email.utils
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kblam_ray.encoders.remote_models import RemoteModel
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import (
    EncoderAuthenticationError,
    EncoderError,
    EncoderNotFoundError,
    EncoderQuotaError,
    InputError,
    MissingDependencyError,
)

if TYPE_CHECKING:
    import openai

AZURE_API_VERSION = "2024-10-21"
"""Used where OPENAI_API_VERSION is not set: a stable version that has every embedding model."""

EXHAUSTED_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
# OpenAI and Azure, vLLM, llama.cpp and text-embeddings-inference each say it in their own words.
TOO_LONG = re.compile(
    r"maximum (?:context|input) length|max \d+ tokens per request|tokens exceed|less than \d+ tokens"
    r"|allowed batch size",
    re.IGNORECASE,
)
TOKEN_COUNTS = re.compile(r"(\d[\d,]*) tokens")


class Retry(Exception):
    """The request failed in a way that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class TooLong(Exception):
    """The request, or a text in it, has more tokens than the model takes.

    `keep` is the share of the tokens that would fit, where the server told both numbers.
    """

    def __init__(self, keep: float | None) -> None:
        super().__init__("too many tokens")
        self.keep = keep


@dataclass(frozen=True)
class Answer:
    """Embeddings by position in the request (a cut list misses some), and the tokens billed."""

    embeddings: dict[int, np.ndarray]
    tokens: int


class EmbeddingClient:
    """A connection pool to one remote model; may be used from many threads.

    Raises:
        EncoderAuthenticationError: no credentials in the environment.
        InputError: no endpoint for Azure.
        MissingDependencyError: the `openai` package is not installed.
    """

    def __init__(self, model: RemoteModel, settings: EncoderSettings) -> None:
        try:
            import openai
            import orjson
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"remote encoders need the package {error.name}",
                where=settings.name,
                help="pip install 'kblam-ray[remote]'",
            ) from error
        self._openai, self._loads, self._model = openai, orjson.loads, model
        try:
            self._client = _connect(openai, model, settings)
        except openai.OpenAIError as error:
            variable = "OPENAI_API_KEY" if model.provider == "openai" else "AZURE_OPENAI_API_KEY"
            raise EncoderAuthenticationError(
                f"no credentials: {error}", where=model.spec.name, help=f"set {variable} on every worker"
            ) from error

    def embed(self, texts: Sequence[str]) -> Answer:
        """Send one request.

        Raises:
            Retry: a failure that may pass, a cut or mixed up answer included.
            TooLong: the request must be split or its text shortened.
            EncoderAuthenticationError, EncoderQuotaError, EncoderNotFoundError, EncoderError: it will not pass.
        """
        openai = self._openai
        options: dict[str, Any] = {}
        if self._model.sent_dimensions is not None:
            options["dimensions"] = self._model.sent_dimensions
        try:
            response = self._client.embeddings.with_raw_response.create(
                model=self._model.deployment, input=list(texts), encoding_format="base64", **options
            )
        except openai.APIConnectionError as error:
            raise Retry(f"{error} ({error.__cause__})" if error.__cause__ else str(error)) from error
        except openai.APIStatusError as error:
            raise self._named(error) from error
        return self._parse(response.content, len(texts))

    def _named(self, error: openai.APIStatusError) -> Exception:
        status, where = error.status_code, f"{self._model.spec.name} at {self._client.base_url}"
        what = f"HTTP {status}: {error.message}"
        kinds = {str(error.code), str(error.type)}
        if kinds & EXHAUSTED_QUOTA:
            return EncoderQuotaError(
                what, where=where, help="add credit or raise the limit of the account, then run again"
            )
        if status in (401, 403):
            return EncoderAuthenticationError(
                what, where=where, help="check the key in OPENAI_API_KEY or AZURE_OPENAI_API_KEY and what it may use"
            )
        if status == 404:
            return EncoderNotFoundError(what, where=where, help="check the model or deployment and the base URL")
        said_too_long = "context_length_exceeded" in kinds or TOO_LONG.search(error.message)
        if status == 413 or (status in (400, 422) and said_too_long):
            return TooLong(_share_that_fits(error.message))
        if status in (408, 409, 425, 429) or status >= 500:
            return Retry(what, retry_after_s(error.response.headers))
        return EncoderError(
            what, where=where, help="the server refuses the request: check the model's name and dimension"
        )

    def _parse(self, body: bytes, num_texts: int) -> Answer:
        try:
            answer = self._loads(body)
            items, usage = answer["data"], answer.get("usage") or {}
            found = {int(item["index"]): _vector(item["embedding"]) for item in items}
            tokens = int(usage.get("prompt_tokens") or 0)
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise Retry(f"an answer that is not embeddings ({type(error).__name__}: {error})") from error
        if len(found) != len(items) or not found or min(found) < 0 or max(found) >= num_texts:
            raise Retry(f"{len(items)} embeddings for {num_texts} texts, with indices that do not fit")
        for vector_P in found.values():
            if vector_P.shape != (self._model.dim,):
                raise EncoderError(
                    f"the server gives {vector_P.size} numbers for a text, {self._model.dim} were expected",
                    where=f"{self._model.spec.name} at {self._client.base_url}",
                    help="check which model the server runs, and write its dimension after an @",
                )
            if not np.isfinite(vector_P).all():
                raise Retry("an embedding with numbers that are not finite")
        return Answer(found, tokens)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that a server asks for, in seconds; None where it asks for none that can be read."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) / per_second
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _connect(library: Any, model: RemoteModel, settings: EncoderSettings) -> openai.OpenAI:
    common = {"max_retries": 0, "timeout": settings.timeout_s}
    if model.provider == "openai":
        return library.OpenAI(base_url=settings.base_url, **common)
    endpoint = settings.base_url or os.environ.get("AZURE_OPENAI_ENDPOINT")
    if not endpoint:
        raise InputError(
            "no Azure endpoint",
            where=settings.name,
            help="set AZURE_OPENAI_ENDPOINT on every worker, or give the base URL",
        )
    version = os.environ.get("OPENAI_API_VERSION") or AZURE_API_VERSION
    return library.AzureOpenAI(azure_endpoint=endpoint, api_version=version, **common)


def _vector(embedding: Any) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)


def _share_that_fits(message: str) -> float | None:
    """From "maximum context length is 8192 tokens, however you requested 10000 tokens": 0.8192."""
    counts = [int(count.replace(",", "")) for count in TOKEN_COUNTS.findall(message)]
    if len(counts) < 2 or not 0 < min(counts) < max(counts):
        return None
    return min(counts) / max(counts)
