"""Text in need of no fact: conversations beside which a loaded knowledge base must change nothing.

They come from files of the user's, or are made here: small talk, sums, lists, sentences about nothing in particular.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kblam_ray.errors import BadRowError, InputError
from kblam_ray.facts.synthetic import lexicon
from kblam_ray.facts.synthetic.draws import Draws, number_of
from kblam_ray.storage import filesystem, normalize, storage_errors

Message = dict[str, str]

_TEXT = number_of("text in need of no fact")


@dataclass(frozen=True)
class Conversation:
    """Messages up to the user's last, and the assistant's reply."""

    messages: tuple[Message, ...]
    reply: str


class Texts:
    """An endless sequence of conversations; number i is a pure function of the seed, i and what was given.

    Args:
        given: conversations to draw from; without any they are made here.
    """

    def __init__(self, given: Sequence[Conversation], seed: int) -> None:
        self._given, self._seed = given, seed

    def __getitem__(self, number: int) -> Conversation:
        draws = Draws(self._seed, _TEXT, number)
        return draws.pick(self._given) if self._given else _made(draws)


def read_texts(paths: Sequence[str]) -> list[Conversation]:
    """The conversations in files: local or `s3://`, gzipped where the name ends in `.gz`.

    `.jsonl` has an object per line: `{"text": ...}`, or `{"messages": [...]}` in chat form that ends with the
    assistant's. Any other file is plain text, with blank lines between the texts.

    Raises:
        BadRowError: a line that is neither, or bytes that are not UTF-8.
        InputError: a file without any text.
        StorageError: a file that cannot be read.
    """
    found = []
    for uri in map(normalize, paths):
        store, path = filesystem(uri)
        with storage_errors(uri):
            with store.open_input_stream(path, compression=None) as stream:
                data = stream.read()
            data = gzip.decompress(data) if uri.endswith(".gz") else data
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError(f"not UTF-8: {error.reason}", where=uri, help="save the file as UTF-8") from None
        is_json = uri.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        texts = list(_json_lines(text, uri) if is_json else _paragraphs(text))
        if not texts:
            raise InputError("a file without any text", where=uri, help="give one with text in it, or none")
        found += texts
    return found


def _json_lines(text: str, uri: str) -> Iterator[Conversation]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _conversation(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadRowError(
                f"not a text: {type(error).__name__}: {error}",
                where=f"{uri}, line {number}",
                help='write {"text": ...} or {"messages": [...]}, in chat form and with a last one of the assistant',
            ) from None


def _conversation(row: Any) -> Conversation:
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError("its text is empty or none")
        return _told(row["text"])
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    if any(not isinstance(part, str) for message in messages for part in message.values()):
        raise ValueError("a message without a role or content")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("its messages do not end with the assistant's reply")
    return Conversation(tuple(messages[:-1]), messages[-1]["content"])


def _paragraphs(text: str) -> Iterator[Conversation]:
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield _told(" ".join(paragraph))
            paragraph = []


_REQUESTS = (
    "Please go on.",
    "Write something.",
    "Write a few sentences.",
    "Tell me anything you like.",
    "Please write a short text.",
    "Could you write a paragraph?",
)


def _told(text: str) -> Conversation:
    """A text as what an assistant says when asked for one."""
    return _asked(Draws(number_of(text)).pick(_REQUESTS), text)


def _asked(request: str, reply: str) -> Conversation:
    return Conversation(({"role": "user", "content": request},), reply)


def _made(draws: Draws) -> Conversation:
    return draws.pick(_KINDS)(draws)


def _thing(draws: Draws) -> str:
    return f"{draws.pick(lexicon.ADJECTIVES)} {draws.pick(lexicon.NOUNS)}"


_SENTENCES = (
    "The {a} stood beside the {b}, and nobody said a word.",
    "In the morning the {a} was gone, but the {b} remained.",
    "She thought of a {a} whenever she saw a {b}.",
    "We walked slowly, past the {a} and over the {b}.",
    "It was getting late, so they left the {a} where it was.",
    "A {a} is not the same as a {b}, he said, and smiled.",
    "Nothing moved except the {a} behind the {b}.",
    "Perhaps the {a} will come back tomorrow.",
    "They had been waiting for the {a} all day long.",
    "If you look closely, the {a} is hidden under the {b}.",
)


def _story(draws: Draws) -> Conversation:
    told = [draws.pick(_SENTENCES).format(a=_thing(draws), b=_thing(draws)) for _ in range(draws.between(1, 4))]
    return _asked(draws.pick(_REQUESTS), " ".join(told))


def _small_talk(draws: Draws) -> Conversation:
    turns = (
        ("Hello!", "Hello! How can I help you?"),
        ("Good morning.", "Good morning! What would you like to do today?"),
        ("Thank you very much.", "You are welcome."),
        ("How are you?", "I am fine, thank you. And how are you?"),
        ("I am tired today.", "I am sorry to hear that. Take a short rest if you can."),
        ("See you later!", "Goodbye, and have a nice day."),
        ("Can you help me?", "Of course. Tell me what you need."),
        ("That was a good joke.", "I am glad that you liked it."),
        ("I am bored.", "Then let us do something: go for a walk, or write a letter to a friend."),
        ("Let us begin.", "All right. I am ready when you are."),
    )
    turn = draws.pick(turns)
    if draws.below(2):
        return _asked(*turn)
    earlier = draws.pick(turns)
    messages = [("user", earlier[0]), ("assistant", earlier[1]), ("user", turn[0])]
    return Conversation(tuple({"role": role, "content": content} for role, content in messages), turn[1])


def _sum(draws: Draws) -> Conversation:
    first, second = draws.below(100), draws.below(100)
    if draws.below(2):
        first, second = max(first, second), min(first, second)
        return _asked(f"How much is {first} minus {second}?", f"{first} minus {second} is {first - second}.")
    return _asked(f"How much is {first} plus {second}?", f"{first} plus {second} is {first + second}.")


def _repeated(draws: Draws) -> Conversation:
    sentence = draws.pick(_SENTENCES).format(a=_thing(draws), b=_thing(draws))
    request = draws.pick(("Repeat this: {}", "Please say once more: {}", "Copy this sentence: {}"))
    return _asked(request.format(sentence), sentence)


def _list(draws: Draws) -> Conversation:
    things = draws.sample(lexicon.NOUNS, draws.between(3, 6))
    how, listed = draws.pick(
        (
            ("Sort these words: {}", sorted(things)),
            ("Write these words backwards, the last one first: {}", things[::-1]),
            ("Write these words in capitals: {}", [thing.upper() for thing in things]),
        )
    )
    return _asked(how.format(", ".join(things)), ", ".join(listed))


def _counting(draws: Draws) -> Conversation:
    first, length = draws.below(50), draws.between(4, 9)
    counted = ", ".join(map(str, range(first, first + length)))
    return _asked(f"Count from {first} to {first + length - 1}.", f"{counted}.")


def _next_day(draws: Draws) -> Conversation:
    days = lexicon.WEEKDAYS if draws.below(2) else lexicon.MONTHS
    at = draws.below(len(days))
    return _asked(f"What comes after {days[at]}?", f"After {days[at]} comes {days[(at + 1) % len(days)]}.")


_KINDS: tuple[Callable[[Draws], Conversation], ...] = (
    _story,
    _story,
    _story,
    _small_talk,
    _sum,
    _repeated,
    _list,
    _counting,
    _next_day,
)
