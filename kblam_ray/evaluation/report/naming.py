"""What systems, kinds, settings and numbers are called in tables and charts, and each system's colour everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SYSTEM_ORDER = ("attention", "cosine", "dense", "bm25", "zero_shot", "in_context")

GROUNDING_ORDER = (None, "verbatim", "cite", "off")

_TABLE_NAMES = {
    "cosine": "cosine of question and key",
    "dense": "dense facts in context",
    "bm25": "BM25 facts in context",
    "zero_shot": "base model, no facts",
    "in_context": "all facts in context",
}

_SHORT_NAMES = {
    "dense": "dense, read",
    "bm25": "BM25, read",
    "zero_shot": "no facts",
    "in_context": "all in the prompt",
}

_RETRIEVER_NAMES = {"cosine": "cosine", "dense": "cosine", "bm25": "BM25"}

WAYS = (
    ("prior", "attention + prior", "every fact is a key and a value that the model attends to; the question's"
     " embedding says beforehand which are near"),
    ("attention", "attention", "the same, without that: attention alone finds the fact"),
    ("cosine", "cosine", "only ranks facts: by the cosine of the question's embedding and the fact's key"),
    ("dense", "dense, read", "the base model reads the facts nearest by that cosine, in its prompt"),
    ("bm25", "BM25, read", "the base model reads the facts whose words the question shares, ranked by BM25"),
    ("in_context", "all in the prompt", "the base model reads every fact, as long as they fit its context"),
    ("zero_shot", "no facts", "the base model answers from its weights"),
)  # fmt: skip
"""Role, name and meaning of each way of answering, for a reader who has not met them."""

GROUNDINGS = {
    "verbatim": "the facts attended to most are read, and only their text is stated",
    "cite": "attention writes the answer, and the facts it used are named",
    "off": "attention writes the answer",
}

LINE_OF = {None: "solid", "verbatim": "solid", "cite": "dotted", "off": "dashed"}
"""How a line is drawn, by grounding."""


@dataclass(frozen=True)
class Ink:
    """How one system is drawn everywhere.

    Attributes:
        light, dark: its colour on a light and on a dark ground, `#rrggbb`.
        marker: of its points, as matplotlib names them: colour is never the only difference.
    """

    light: str
    dark: str
    marker: str


# Hues after M. Okabe and K. Ito, "Color Universal Design" (2008), which stay apart for colour-blind readers.
INKS = {
    "prior": Ink("#0b62a4", "#4da3ff", "o"),
    "attention": Ink("#56b4e9", "#a8dcff", "h"),
    "cosine": Ink("#737373", "#a8a8a8", "X"),
    "dense": Ink("#e69f00", "#f5b83d", "s"),
    "bm25": Ink("#009e73", "#2cc79a", "^"),
    "in_context": Ink("#d55e00", "#ff8a4c", "D"),
    "zero_shot": Ink("#a3518a", "#dd94c4", "v"),
    "other": Ink("#3d3d3d", "#d0d0d0", "P"),
}


def role_of(system: str, prior: bool | None) -> str:
    """The key of `INKS` of a system; `other` of one that is not known."""
    if system == "attention":
        return "prior" if prior else "attention"
    return system if system in INKS else "other"


def place_of(result: Mapping[str, Any]) -> tuple[int, int, int, str]:
    """Where a result stands in lists: attention first, with prior before without, then the baselines."""
    system, grounding = result["system"], result.get("grounding")
    known = SYSTEM_ORDER.index(system) if system in SYSTEM_ORDER else len(SYSTEM_ORDER)
    mode = GROUNDING_ORDER.index(grounding) if grounding in GROUNDING_ORDER else len(GROUNDING_ORDER)
    return known, not result.get("prior"), mode, system


def table_name(result: Mapping[str, Any], part: str | None = None) -> str:
    """A way of answering in a table.

    Args:
        result: has `system`, `prior` and `grounding`.
        part: what the table is of; of `retrieval`, a baseline is the ranking that it reads from.
    """
    system = result["system"]
    names = _TABLE_NAMES | ({"bm25": "BM25 of question and key"} if part == "retrieval" else {})
    name = names.get(system, system)
    if result["prior"] is not None:
        name += " with prior" if result["prior"] else " alone"
    return f"{name}, {result['grounding']}" if result["grounding"] else name


def short_name(result: Mapping[str, Any], part: str | None = None) -> str:
    """A way of answering in a chart, see `table_name`."""
    system = result["system"]
    names = _RETRIEVER_NAMES if part == "retrieval" else _SHORT_NAMES
    name = names.get(system, words(system))
    if result.get("prior"):
        name += " + prior"
    return f"{name}, {result['grounding']}" if result.get("grounding") else name


def words(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ")


def clipped(text: str, num_letters: int) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= num_letters else text[: num_letters - 1] + "…"


def number(value: float) -> str:
    """A count, with commas between thousands."""
    return f"{value:,.0f}"


def tick(value: float) -> str:
    """A count on an axis, short: 10, 1k, 100k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def percent(figure: Mapping[str, Any] | None) -> str:
    """A share with its interval, in percent; `-` where there is none."""
    if figure is None or figure.get("value") is None:
        return "-"
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def plain(figure: Mapping[str, Any] | None, scale: float = 1.0) -> str:
    """A figure with its interval, three digits; `-` where there is none.

    Args:
        scale: what it is multiplied by, as 1000 for milliseconds of seconds.
    """
    if figure is None or figure.get("value") is None:
        return "-"
    text = digits(scale * figure["value"])
    if figure.get("low") is None or figure.get("high") is None:
        return text
    return f"{text} ({digits(scale * figure['low'])} to {digits(scale * figure['high'])})"


def digits(value: float) -> str:
    """A number to about three digits, never in powers of ten."""
    size = abs(value)
    if size == 0 or size >= 100:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.5f}".rstrip("0").rstrip(".")
    return f"{value:.{2 if size >= 1 else 3 if size >= 0.1 else 4}f}"


def size_of(num_bytes: float) -> str:
    """Bytes in the unit that fits them, powers of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} bytes"


def environment_words(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what a sweep ran on, but the command; a commit says whether files differed from it."""
    known = {name: value for name, value in environment.items() if value is not None and name != "command"}
    if known.pop("is_changed", False) and "commit" in known:
        known["commit"] = f"{known['commit']}, with changes"
    return [(words(name), str(value)) for name, value in known.items()]
