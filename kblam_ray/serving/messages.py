"""What travels between the processes of a server: requests, events of an answer, facts; plain data that pickles.

Nothing here imports torch: a gateway that speaks HTTP has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Message: TypeAlias = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        max_tokens: most tokens of an answer; None: the engine's default, or less where the context ends.
        stop: an answer ends before the first of these texts.
        seed: of sampling; equal seeds give equal answers to equal requests of one KB version. None: random.
        num_choices: answers to give (`n`).
        num_logprobs: alternatives to name per token beside the chosen one's log probability; None: neither.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_choices: int = 1
    num_logprobs: int | None = None


@dataclass(frozen=True)
class KbRef:
    """The knowledge base that a request names; `version` where it asks for that one (`base:kb@version`)."""

    name: str
    version: int | None = None


@dataclass(frozen=True)
class Question:
    """One request for an answer.

    Attributes:
        kb: None asks the base model alone.
        grounding: "off", "cite" or "verbatim".
        selection: "all" or "similar:K"; None: by the size of the knowledge base.
        min_kb_version: answer with this version or a newer one, or not at all.
    """

    request_id: str
    messages: tuple[Message, ...]
    kb: KbRef | None = None
    grounding: str = "cite"
    selection: str | None = None
    max_citations: int = 5
    min_kb_version: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, its log probability, and the likeliest ones with theirs."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """First event: the request is valid and is being answered from this version."""

    kb_version: int | None
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """A piece of one choice's text, never taken back; `logprobs` of the tokens that it ends, where asked for."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Choice:
    """An answer that is finished. `citations` are as `Citation.to_json` gives them."""

    text: str
    finish_reason: FinishReason
    refused: bool
    citations: tuple[Mapping[str, Any], ...]
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Last event: every choice is finished. The pieces of a choice make its text."""

    choices: tuple[Choice, ...]
    kb_version: int | None
    prompt_tokens: int


Event: TypeAlias = Started | Piece | Finished
"""A stream of an answer: `Started`, any number of `Piece`, `Finished`."""


@dataclass(frozen=True)
class FactsPage:
    """Some facts of the version served, by ascending id: `fact_id` (decimal string), entity, property, value, metadata.

    Attributes:
        next: `after` of the next page; None on the last one.
    """

    data: tuple[Mapping[str, Any], ...]
    next: str | None
    kb_version: int


@dataclass(frozen=True)
class FactFilter:
    """Which facts to look up: `text` occurs in entity, property or value in any case; the others are equal."""

    text: str | None = None
    entity: str | None = None
    property: str | None = None
    limit: int = 100
    after: str | None = None


@dataclass(frozen=True)
class Written:
    """What a write did. `is_served` is None where nobody waited for it, False where time ran out."""

    kb_version: int
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    is_served: bool | None = None

    def waited(self, is_served: bool) -> Written:
        """The same, when somebody waited for it."""
        return replace(self, is_served=is_served)
