"""Ask a chat model for JSON: any OpenAI-compatible endpoint or Azure OpenAI, answers checked against a pydantic model.

The `openai` client retries what is worth retrying (429, 5xx, lost connections) with back-off and honours Retry-After;
an answer of the wrong form is asked for again here, telling the model what was wrong with it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, Field, ValidationError

from kblam_ray.errors import (
    ChatAnswerError,
    ChatAuthenticationError,
    ChatError,
    ChatQuotaError,
    InputError,
    KblamError,
    MissingDependencyError,
)
from kblam_ray.job import JobConfig

if TYPE_CHECKING:
    from openai import AzureOpenAI, OpenAI
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

Shape = TypeVar("Shape", bound=BaseModel)

NO_KEY = "none"
"""Sent as the key to an endpoint of one's own (`--chat-url`) if `OPENAI_API_KEY` is not set: local ones need none."""


class ChatFields(JobConfig):
    """The settings of a chat endpoint; a job that can use one adds them to its own."""

    chat_model: str | None = Field(None, description="chat model (Azure: deployment); OPENAI_API_KEY holds the key")
    chat_url: str | None = Field(
        None, description="base URL of an OpenAI-compatible endpoint (default: OPENAI_BASE_URL, else OpenAI)"
    )
    azure_api_version: str | None = Field(
        None, description="use Azure OpenAI at --chat-url or AZURE_OPENAI_ENDPOINT, with AZURE_OPENAI_API_KEY"
    )
    chat_timeout_s: float = Field(120, gt=0, description="seconds until a request counts as lost")
    chat_retries: int = Field(6, ge=0, description="times to repeat a request after 429, 5xx or a lost connection")
    chat_attempts: int = Field(3, ge=1, description="times to ask when the answer has the wrong form")
    chat_concurrency: int = Field(8, ge=1, description="requests in flight per worker")


@dataclass(frozen=True)
class Tokens:
    """What requests cost: tokens read and written, and how often the model was asked again for a better answer."""

    prompt: int = 0
    completion: int = 0
    repeats: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion, self.repeats + other.repeats)


@dataclass(frozen=True)
class Answer(Generic[Shape]):
    """A validated answer and what it cost."""

    value: Shape
    tokens: Tokens


class ChatModel:
    """A chat model behind an endpoint. Threads may share one."""

    def __init__(self, settings: ChatFields) -> None:
        """Check the settings; nothing is sent yet.

        Raises:
            InputError: no model or no endpoint named.
            ChatAuthenticationError: no key for an endpoint that needs one.
            MissingDependencyError: `openai` is not installed.
        """
        if not settings.chat_model:
            raise InputError("no chat model named", where="--chat-model", help="name one, for example gpt-4o-mini")
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "the openai package is not installed", where="chat model", help="pip install 'kblam-ray[remote]'"
            ) from error
        self._settings = settings
        self._model: str = settings.chat_model
        self._where = f"{self._model} at {settings.chat_url or os.environ.get('OPENAI_BASE_URL') or 'OpenAI'}"
        self._check_endpoint()

    def _check_endpoint(self) -> None:
        settings = self._settings
        if settings.azure_api_version:
            if not (settings.chat_url or os.environ.get("AZURE_OPENAI_ENDPOINT")):
                raise InputError("no Azure endpoint", where="--azure-api-version", help="set AZURE_OPENAI_ENDPOINT")
            if not os.environ.get("AZURE_OPENAI_API_KEY"):
                raise ChatAuthenticationError("no key for Azure OpenAI", help="set AZURE_OPENAI_API_KEY")
        elif not (settings.chat_url or os.environ.get("OPENAI_API_KEY")):
            raise ChatAuthenticationError(
                "no key for OpenAI",
                help="set OPENAI_API_KEY (on a cluster: in the env_vars of the job's runtime environment), or name an "
                "endpoint of your own with --chat-url",
            )

    @cached_property
    def _client(self) -> OpenAI | AzureOpenAI:
        from openai import AzureOpenAI, OpenAI

        settings = self._settings
        if settings.azure_api_version:
            return AzureOpenAI(
                api_version=settings.azure_api_version,
                azure_endpoint=settings.chat_url or os.environ["AZURE_OPENAI_ENDPOINT"],
                timeout=settings.chat_timeout_s,
                max_retries=settings.chat_retries,
            )
        return OpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or NO_KEY,
            base_url=settings.chat_url,
            timeout=settings.chat_timeout_s,
            max_retries=settings.chat_retries,
        )

    def ask(self, instructions: str, question: str, shape: type[Shape], *, seed: int | None = None) -> Answer[Shape]:
        """Ask, and ask again while the answer is not of `shape`.

        Args:
            instructions: the system message.
            question: the user message.
            shape: what the answer must be; all its fields required, no others allowed.
            seed: asks the endpoint for a repeatable answer, where it can.

        Raises:
            ChatAnswerError: no answer of that shape in `chat_attempts`.
            ChatAuthenticationError, ChatQuotaError, ChatError, InputError: the endpoint did not answer.
        """
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": question},
        ]
        tokens, reason = Tokens(), ""
        for attempt in range(self._settings.chat_attempts):
            text, used, reason = self._send(messages, shape, None if seed is None else seed + attempt)
            tokens += used
            if text is not None:
                try:
                    return Answer(shape.model_validate_json(text), tokens)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    reason = f"{'.'.join(map(str, first['loc'])) or 'answer'}: {first['msg']}"
                    messages[2:] = [
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": f"That is not the form asked for ({reason}). Answer again."},
                    ]
            tokens += Tokens(repeats=1)
        raise ChatAnswerError(
            f"no answer of the form asked for in {self._settings.chat_attempts} attempts; the last: {reason}",
            where=self._where,
            help="use a model that follows JSON schemas, or raise --chat-attempts",
        )

    def _send(
        self, messages: list[ChatCompletionMessageParam], shape: type[BaseModel], seed: int | None
    ) -> tuple[str | None, Tokens, str]:
        """One request: the answer's text, or None and the reason why there is none."""
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": shape.__name__, "schema": shape.model_json_schema(), "strict": True},
                },
                seed=openai.omit if seed is None else seed,
            )
        except json.JSONDecodeError:
            return None, Tokens(), "the response was not JSON"
        except openai.APIError as error:
            if isinstance(error, openai.APIResponseValidationError):
                return None, Tokens(), "the response was not a chat completion"
            if isinstance(error, openai.BadRequestError) and error.code == "content_filter":
                return None, Tokens(), "the content filter refused it"
            raise self._explain(error) from error
        return self._text_of(completion)

    @staticmethod
    def _text_of(completion: ChatCompletion) -> tuple[str | None, Tokens, str]:
        # A proxy's error page, sent with 200, comes back from the client as it is.
        if not getattr(completion, "choices", None):
            return None, Tokens(), "the response was not a chat completion"
        usage, choice = completion.usage, completion.choices[0]
        tokens = Tokens(usage.prompt_tokens, usage.completion_tokens) if usage else Tokens()
        if choice.message.refusal:
            return None, tokens, f"the model refused: {choice.message.refusal}"
        if choice.finish_reason == "length":
            return None, tokens, "the answer was cut off"
        if not choice.message.content:
            return None, tokens, "the answer was empty"
        return choice.message.content, tokens, ""

    def _explain(self, error: Any) -> KblamError:
        import openai

        reason = f"{type(error).__name__}: {error.message}"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return ChatAuthenticationError(
                f"the endpoint refused the credentials: {reason}", where=self._where, help="check OPENAI_API_KEY"
            )
        if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
            return ChatQuotaError("no quota left", where=self._where, help="check the account's plan and billing")
        if isinstance(error, (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)):
            return ChatError(
                f"no answer after {self._settings.chat_retries} retries: {reason}",
                where=self._where,
                help="check the endpoint, lower --chat-concurrency, or run again: finished work is kept",
            )
        return InputError(
            f"the endpoint refused the request: {reason}", where=self._where, help="check --chat-model and --chat-url"
        )
