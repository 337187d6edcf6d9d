"""One answer while it is written: from the engine's tokens to the text that is said, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kblam_ray.model.grounding.verbatim import VerbatimReading
from kblam_ray.model.token_text import BROKEN, TokenText
from kblam_ray.serving.engine.sampling import TokenChoice
from kblam_ray.serving.engine.stops import StopFilter
from kblam_ray.serving.messages import FinishReason, TokenLogprob


class Writer:
    """An answer that says what the base model writes.

    Attributes:
        ids: tokens of the answer so far, without the one that ends the turn.
        text: said so far; the pieces make it.
        finish_reason: None until the answer is over.
        choice: how its tokens are chosen.
        logprobs: of the tokens whose text was said, where they are asked for.

    Args:
        stop_ids: tokens that end a turn.
        max_tokens: after which the engine ends the answer.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Sequence[int], stops: Sequence[str], max_tokens: int, choice: TokenChoice
    ) -> None:
        self._tokenizer, self._stop_ids, self._max_tokens = tokenizer, frozenset(stop_ids), max_tokens
        self._token_text, self._filter = TokenText(tokenizer), StopFilter(stops)
        self._num_taken = 0
        self._ends: list[int] = []
        self.choice = choice
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprob] = []

    @property
    def text(self) -> str:
        return self._filter.text

    def take(self, tokens: Sequence[int], *, is_finished: bool) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Take what was generated so far, all of it; give what can be said now, and the tokens that it ends.

        Args:
            is_finished: the engine generates no more.
        """
        if self.finish_reason is not None:
            return "", ()
        new = list(tokens[self._num_taken :])
        self._num_taken = len(tokens)
        length = next((at for at, token in enumerate(new) if token in self._stop_ids), len(new))
        is_ended = length < len(new)
        self._add(new[:length])
        is_over = is_ended or is_finished
        written = self._token_text.finish(new[:length]) if is_over else self._token_text.feed(new[:length])
        spoken, is_complete = self._speak(written, is_over=is_over)
        if is_over or is_complete:
            said = self._filter.finish(spoken)
            is_cut = is_finished and not is_ended and not is_complete and self._num_taken >= self._max_tokens
            self.finish_reason = "length" if is_cut and not self._filter.is_stopped else "stop"
        else:
            said = self._filter.feed(spoken)
            if self._filter.is_stopped:
                self.finish_reason = "stop"
        if self._filter.is_stopped:
            self._drop_unsaid()
        return said, self._told() if said or self.finish_reason else ()

    def _speak(self, written: str, *, is_over: bool) -> tuple[str, bool]:
        """What is said of a piece that was written, and whether nothing more will be."""
        return written, False

    def _add(self, ids: list[int]) -> None:
        for token in ids:
            self.ids.append(token)
            if self.choice.num_logprobs is not None:
                self._ends.append(len(self._decode(self.ids).rstrip(BROKEN)))

    def _drop_unsaid(self) -> None:
        """Tokens whose text the stop text and what follows it took away are not the answer's."""
        while self.ids and len(self._decode(self.ids[:-1])) >= len(self.text):
            self.ids.pop()

    def _told(self) -> tuple[TokenLogprob, ...]:
        if self.choice.num_logprobs is None:
            return ()
        end = len(self.ids)
        if self.finish_reason is None:
            num_said = len(self.text)
            end = next((at for at, letters in enumerate(self._ends) if letters > num_said), end)
        new = []
        for at in range(len(self.logprobs), end):
            chosen = self.choice.chosen[at]
            top = tuple((self._tokenizer.decode([token]), logprob) for token, logprob in chosen.top)
            new.append(TokenLogprob(self._tokenizer.decode([self.ids[at]]), chosen.logprob, top))
        self.logprobs += new
        return tuple(new)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).lstrip()


class VerbatimWriter(Writer):
    """An answer that says what the facts read bear out of what the base model writes.

    Attributes:
        refused: the refusal was said.
    """

    def __init__(
        self,
        read: VerbatimReading,
        refusal_text: str,
        tokenizer: Any,
        stop_ids: Sequence[int],
        stops: Sequence[str],
        max_tokens: int,
        choice: TokenChoice,
    ) -> None:
        super().__init__(tokenizer, stop_ids, stops, max_tokens, choice)
        self._read, self._refusal_text = read, refusal_text
        self._grounder = None if read.refused else read.grounder()
        self._has_spoken = False
        self.refused = False

    @property
    def stated(self) -> list[int]:
        """Places among the facts read of those whose values the text states, in its order."""
        stated = self._grounder.stated if self._grounder is not None else []
        if not self._filter.is_stopped:
            return list(stated)
        return [place for place in stated if self._read.value(place) in self.text]

    def _speak(self, written: str, *, is_over: bool) -> tuple[str, bool]:
        spoken, is_complete = "", True
        if self._grounder is not None:
            spoken = self._grounder.feed(written)
            is_complete = self._read.is_all_said(self._grounder, self._num_taken)
            if is_over or is_complete:
                spoken += self._grounder.finish()
        self._has_spoken = self._has_spoken or bool(spoken)
        if not self._has_spoken and (is_over or is_complete):
            self.refused, spoken = True, self._refusal_text
        return spoken, is_complete

    def _drop_unsaid(self) -> None:
        """What was written is not what is said."""
