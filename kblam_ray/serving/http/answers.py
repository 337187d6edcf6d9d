"""Answers in OpenAI's form: a completion as a whole, or the chunks of one while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kblam_ray.serving.http.schema.base import metadata_object
from kblam_ray.serving.http.schema.chat_answer import (
    AnswerChoice,
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    Citation,
    Delta,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from kblam_ray.serving.messages import Choice, Finished, Piece
from kblam_ray.serving.messages import TokenLogprob as TokenChosen


@dataclass(frozen=True)
class Answering:
    """What all parts of one answer say.

    Attributes:
        model: as the request named it.
        created: seconds since 1970.
        has_logprobs: whether they were asked for.
        has_usage: whether the chunks shall end with one that counts tokens.
    """

    id: str
    model: str
    created: int
    fingerprint: str
    num_choices: int
    has_logprobs: bool
    has_usage: bool

    def whole(self, finished: Finished) -> ChatCompletion:
        """The completion."""
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(number, choice) for number, choice in enumerate(finished.choices)],
            usage=usage_of(finished),
            **_grounds(finished),
        )

    def first_chunks(self) -> Iterator[ChatCompletionChunk]:
        """Before any text: a chunk per choice that says who speaks."""
        for number in range(self.num_choices):
            yield self._chunk(number, Delta(role="assistant", content=""))

    def chunk(self, piece: Piece) -> ChatCompletionChunk:
        """A piece of a choice's text."""
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        return self._chunk(piece.choice, Delta(content=piece.text), logprobs=logprobs)

    def last_chunks(self, finished: Finished) -> Iterator[ChatCompletionChunk]:
        """After all text: a chunk per choice that says why it ended.

        The last chunk of all has version, refusal and citations. It is one without choices only where that was asked
        for (`include_usage`), because many clients read `choices[0]` of every chunk.
        """
        last = len(finished.choices) - 1
        for number, choice in enumerate(finished.choices):
            own = _own_grounds(choice) if last else {}
            chunk = self._chunk(number, Delta(), finish_reason=choice.finish_reason, **own)
            yield chunk.model_copy(update=_grounds(finished)) if number == last and not self.has_usage else chunk
        if self.has_usage:
            yield self._with_choices([], usage=usage_of(finished), **_grounds(finished))

    def _choice(self, number: int, choice: Choice) -> AnswerChoice:
        return AnswerChoice(
            index=number,
            message=AnswerMessage(role="assistant", content=choice.text, refusal=None),
            finish_reason=choice.finish_reason,
            logprobs=self._logprobs(choice.logprobs) if self.has_logprobs else None,
            **(_own_grounds(choice) if self.num_choices > 1 else {}),
        )

    def _chunk(self, number: int, delta: Delta, **fields: Any) -> ChatCompletionChunk:
        choice = ChunkChoice(**{"index": number, "delta": delta, "finish_reason": None, "logprobs": None, **fields})
        return self._with_choices([choice], **({"usage": None} if self.has_usage else {}))

    def _with_choices(self, choices: list[ChunkChoice], **fields: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            **fields,
        )

    def _logprobs(self, tokens: Sequence[TokenChosen]) -> Logprobs:
        content = [
            TokenLogprob(
                **_named(token.token, token.logprob), top_logprobs=[TopLogprob(**_named(*top)) for top in token.top]
            )
            for token in tokens
        ]
        return Logprobs(content=content, refusal=None)


def usage_of(finished: Finished) -> Usage:
    """Tokens of prompt and answers."""
    completion = sum(choice.completion_tokens for choice in finished.choices)
    return Usage(
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=completion,
        total_tokens=finished.prompt_tokens + completion,
    )


def _grounds(finished: Finished) -> dict[str, Any]:
    return {"kb_version": finished.kb_version, **_own_grounds(finished.choices[0])}


def _own_grounds(choice: Choice) -> dict[str, Any]:
    return {"refused": choice.refused, "citations": [_citation(each) for each in choice.citations]}


def _citation(given: Mapping[str, Any]) -> Citation:
    return Citation(**{**given, "metadata": metadata_object(given.get("metadata"))})


def _named(token: str, logprob: float) -> dict[str, Any]:
    is_whole = "�" not in token
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if is_whole else None}
