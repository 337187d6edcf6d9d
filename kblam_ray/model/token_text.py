"""Text of tokens as they come: what has been given out is never taken back, and no character is broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""

TIDIED = 4
"""Letters at the end of a text that a tokenizer which tidies blanks may still change: "do n't"."""

MOST_TOKENS, KEPT_TOKENS = 128, 32
"""Tokens that are decoded again each time, at most and after a cut."""


class TokenText:
    """The text of an answer while its tokens come, without the blanks before its first letter.

    All pieces together are what the tokenizer makes of all the tokens, special ones skipped; only blanks at the end
    may be more than in `generation.answer_text`.

    Attributes:
        num_letters: of all pieces given out so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._held_back = TIDIED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._ids: list[int] = []
        self._given = ""
        self._has_begun = False
        self.num_letters = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The next piece, which may be empty.

        Args:
            ids: the tokens after those given before.
        """
        return self._next(ids, is_over=False)

    def finish(self, ids: Sequence[int] = ()) -> str:
        """The last piece: with what may have become another character, had more tokens come."""
        return self._next(ids, is_over=True)

    def _next(self, ids: Sequence[int], *, is_over: bool) -> str:
        self._ids += ids
        text = self._decode(self._ids)
        end = len(text)
        if not is_over:
            end = min(len(text.rstrip(BROKEN)), end - self._held_back)
        piece = text[len(self._given) : max(end, 0)]
        self._given += piece
        if len(self._ids) > MOST_TOKENS:
            self._cut(text)
        if not self._has_begun:
            piece = piece.lstrip()
            self._has_begun = bool(piece)
        self.num_letters += len(piece)
        return piece

    def _cut(self, text: str) -> None:
        """Forget the first tokens, where those that follow have the same text without them."""
        before, after = self._ids[:-KEPT_TOKENS], self._ids[-KEPT_TOKENS:]
        first = self._decode(before)
        if not self._held_back and len(first) <= len(self._given) and first + self._decode(after) == text:
            self._ids, self._given = after, self._given[len(first) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
