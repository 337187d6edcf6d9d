"""From a conversation to token ids: the one way for training, evaluation and serving, so that their prompts are equal.

Text of users and facts is data: a control token written in it (`<|eot_id|>`) is encoded as the letters it consists of.
Text without any is encoded exactly as transformers' `apply_chat_template` does it.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from kblam_ray.errors import InputError
from kblam_ray.model.chat_templates import BUILT_IN

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

_TODAY = datetime.datetime(2024, 7, 26)
"""What templates that state the date are told: the default of Llama 3's own. The real date would make the prompts of
training and serving differ."""

_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}','{_TODAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}"
)
"""Jinja that goes before a template; transformers gives templates no way to take a clock."""


class ChatTemplate:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: of the base model.
        template: a name out of `chat_templates.BUILT_IN` or a Jinja text, most often an adapter's `chat_template`. It
            goes before the tokenizer's own, since it is what the adapter was trained with. Where neither exists, as
            for base models without instruction tuning, `plain` is used and a warning logged.

    Raises:
        InputError: the template is neither a name nor Jinja, or needs control tokens that the tokenizer lacks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        if template is None and getattr(tokenizer, "chat_template", None) is None:
            logger.warning("the tokenizer has no chat template, nor has the adapter: questions are put as `plain` text")
            template = "plain"
        if template is not None and template not in BUILT_IN and "{" not in template:
            raise InputError(
                f"there is no chat template {template!r}",
                where="chat_template",
                help=f"give a Jinja text, or one of {', '.join(BUILT_IN)}",
            )
        if template in BUILT_IN:
            known = tokenizer.get_vocab()
            missing = [token for token in BUILT_IN[template].control_tokens if token not in known]
            if missing:
                raise InputError(
                    f"the chat template {template!r} needs tokens that the tokenizer lacks: {', '.join(missing)}",
                    where="chat_template",
                    help="choose a template that fits the base model, or `plain`",
                )
            template = BUILT_IN[template].jinja
        try:
            jinja = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise InputError(str(error), where="chat_template", help="store one with the adapter") from None
        self._jinja = _FIXED_CLOCK + jinja if "strftime_now" in jinja else jinja

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; with `add_generation_prompt` up to where the assistant's answer begins.

        Raises:
            InputError: a message of another form, or a conversation that the template refuses.
        """
        escaped = _Escaped(self, messages)
        return escaped.ids(self._text(escaped.messages, add_generation_prompt))

    def render_with_answer(self, messages: Sequence[Message], answer: str) -> tuple[list[int], int]:
        """Token ids of a conversation with its answer and the token that ends the answer, and where the answer begins.

        Returns:
            `ids, answer_start`: `ids[:answer_start]` is what `render(messages)` gives; `ids[answer_start:]` is what
            the model shall generate, the end-of-turn token included. Blanks around the answer are dropped.

        Raises:
            InputError: see `render`.
        """
        escaped = _Escaped(self, messages, answer)
        conversation = escaped.messages
        prompt_text = self._text(conversation, True)
        prompt_ids = escaped.ids(prompt_text)
        before, _ = self._around_answer(conversation)
        # What the template puts between its generation prompt and an answer: a blank, or an empty thought.
        glue = before.removeprefix(prompt_text) if before.startswith(prompt_text) else ""
        answer_text = glue + escaped.text(answer.strip())
        ids = escaped.ids(prompt_text + answer_text)
        if ids[: len(prompt_ids)] != prompt_ids:
            # The tokenizer merges across the border, but generation starts from the prompt's own tokens.
            ids = prompt_ids + escaped.ids(answer_text, continues=True)
        end = self.end_of_turn_id
        return ids + ([] if end is None else [end]), len(prompt_ids)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that the template ends an answer with; the tokenizer's end of sequence where it uses none."""
        _, after = self._around_answer([{"role": "user", "content": "x"}])
        ids = self._encode(after)
        return next((token for token in ids if token in self.control_ids), self.tokenizer.eos_token_id)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Token ids that data must not be encoded as."""
        # An unknown letter becomes the unknown token, which commands nothing.
        return frozenset(self._controls.values()) - {self.tokenizer.unk_token_id}

    @cached_property
    def _controls(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_tokens)
        return {
            token.content: index
            for index, token in added.items()
            # Words and runs of blanks that were added to a vocabulary are text; marked-up ones command something.
            if token.special or token.content in special or re.search(r"[^\w\s▁]", token.content)
        }

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._controls), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _around_answer(self, conversation: list[dict[str, str]]) -> tuple[str, str]:
        taken = "".join(message["content"] for message in conversation)
        place = f"{_unused(taken)}0answer"
        before, found, after = self._text([*conversation, {"role": "assistant", "content": place}], False).rpartition(
            place
        )
        if not found:
            raise InputError(
                "the chat template drops the assistant's answer", where="chat_template", help="give another template"
            )
        return before, after

    def _text(self, conversation: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self._jinja,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    # Answers come from the knowledge base at once; models that think first begin with an empty thought.
                    enable_thinking=False,
                )
            )
        except (TemplateError, ValueError) as error:
            raise InputError(
                f"the chat template refuses the conversation: {error}",
                where="chat_template",
                help="most want user and assistant in turns, the user first; some have no system role",
            ) from None

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))

    def _encode_on(self, text: str) -> list[int]:
        """Ids of text that stands after other text: without the blank that some tokenizers put before a first word."""
        for before in "\na":  # a tokenizer may merge the one or the other with the text
            start, joined = self._encode(before), self._encode(before + text)
            if start and joined[: len(start)] == start:
                return joined[len(start) :]
        return self._encode(text)

    def _encode_data(self, text: str) -> list[int]:
        # Broken into halves until no part of it is a control token. Tokenizers have a switch for this, but it is
        # state shared by all threads, and knows only a part of the control tokens.
        ids = self._encode_on(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise InputError(
                f"the character U+{ord(text):04X} is a control token of the tokenizer",
                where="message",
                help="remove the character from the text",
            )
        half = len(text) // 2
        return self._encode_data(text[:half]) + self._encode_data(text[half:])


class _Escaped:
    """The data of one conversation, with every control token in it replaced by a mark while the template runs."""

    def __init__(self, chat: ChatTemplate, messages: Sequence[Message], answer: str = "") -> None:
        for position, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise InputError(
                    f"a message of type {type(message).__name__}",
                    where=f"message {position}",
                    help='give {"role": "user", "content": text}',
                )
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise InputError(
                    f"a message has role {role!r} and content of type {type(content).__name__}",
                    where=f"message {position}",
                    help=f"give a text, and one of the roles {', '.join(ROLES)}",
                )
            if not content.isascii() and any("\ud800" <= letter <= "\udfff" for letter in content):
                raise InputError(
                    "the text has half of a character in it (a lone surrogate)",
                    where=f"message {position}",
                    help="give valid Unicode: on the command line, UTF-8",
                )
        if not messages:
            raise InputError("the conversation has no message", where="messages", help="ask something")
        self._chat = chat
        self._mark = _unused("".join(message["content"] for message in messages) + answer)
        self._parts: list[str] = []
        self.messages = [{"role": message["role"], "content": self.text(message["content"])} for message in messages]

    def text(self, data: str) -> str:
        """The data with marks in it; a text given when the conversation was escaped."""
        pieces, end = [], 0
        for match in self._chat._control_pattern.finditer(data):
            pieces += [self._checked(data[end : match.start()]), self._marked(match.group())]
            end = match.end()
        return "".join([*pieces, self._checked(data[end:])])

    def _checked(self, text: str) -> str:
        # A tokenizer that normalises may read a control token in letters that do not spell it.
        return text if self._chat.control_ids.isdisjoint(self._chat._encode(text)) else self._marked(text)

    def _marked(self, data: str) -> str:
        self._parts.append(data)
        return f"{self._mark}{len(self._parts) - 1}{self._mark}"

    def ids(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of text that the template made of the escaped messages."""
        pieces = re.split(f"{self._mark}([0-9]+){self._mark}", text)
        ids = self._chat._encode_on(pieces[0]) if continues else self._chat._encode(pieces[0])
        for position, piece in enumerate(pieces[1:], start=1):
            if position % 2:
                ids += self._chat._encode_data(self._parts[int(piece)])
            elif piece:
                ids += self._chat._encode_on(piece)
        return ids


def _unused(text: str) -> str:
    """A letter for private use that the text does not have."""
    used = set(text)
    return next(letter for letter in map(chr, range(0xE000, 0xF8FF)) if letter not in used)
