"""What a document yields: its text, and the facts that its form gives away (`key: value` lines, tables, front matter).

Which entity a pair is about, when the line does not say, is a matter of headings: the nearest one that names something,
else the document's title.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

Position = dict[str, int]
"""Where in a document: `line` (1-based), or `page` and `line`; `offset` in characters for what a model found."""


@dataclass(frozen=True)
class Finding:
    """A candidate fact and where it stands."""

    entity: str
    property: str
    value: str
    position: Position


@dataclass
class Parsed:
    """A document taken apart.

    Attributes:
        title: what the document is about, if nothing nearer says so.
        text: its text, for a model to read and to check answers against.
        findings: the facts its form gives away, in order.
        page_starts: where in `text` each page begins; empty for documents without pages.
    """

    title: str
    text: str
    findings: list[Finding] = field(default_factory=list)
    page_starts: list[int] = field(default_factory=list)


def _set(text: str) -> frozenset[str]:
    """The comma-separated words and phrases of `text`."""
    return frozenset(" ".join(item.split()) for item in text.split(","))


_GENERIC_HEADINGS = _set("""
    about, at a glance, basic data, basic information, contact, contents, data, data sheet, datasheet,
    description, details, facts, features, general, general information, info, information, introduction, key
    facts, metadata, overview, parameters, profile, properties, quick facts, settings, specification,
    specifications, specs, summary, table of contents, technical data, technical details, technical
    specifications,
""")
"""Headings that name a part of a document, not a thing: what stands below is about the heading above."""


class Headings:
    """The headings that are open at a place in a document."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._open: list[tuple[int, str]] = []

    def open(self, level: int, text: str) -> None:
        """A heading of `level` (1 the highest) closes those of its level and below."""
        self._open = [(other, name) for other, name in self._open if other < level] + [(level, one_line(text))]

    @property
    def entity(self) -> str:
        """What the text below is about."""
        for _, name in reversed(self._open):
            if name and name.strip(" :").casefold() not in _GENERIC_HEADINGS:
                return name
        return self.title


def one_line(text: str) -> str:
    """`text` with all white space runs as one blank, none at its ends."""
    return " ".join(text.split())


# `key: value` lines

_PAIR = re.compile(r"^\s*(?:[-*+•·▪]\s+)?(?P<key>[^:：]{1,60}?)\s*(?::(?=[*_]*\s)|：)\s*(?P<value>\S.*?)\s*$")
MAX_KEY_WORDS = 5

_NOT_KEYS = _set("""
    attention, caution, danger, disclaimer, e.g, edit, example, examples, fig, figure, fixme, hint, http, https,
    i.e, important, note, notes, ps, q, a, remark, remember, see, see also, source, sources, step, table, tip,
    todo, update, warning,
""")
_NOT_FIRST_WORDS = _set("""
    a, an, and, as, at, because, before, but, by, dear, for, from, he, hello, her, here, hi, his, how, however, i, if,
    in, it, its, my, no, not, of, on, one, or, our, please, remember, she, so, thanks, that, the, their, then, there,
    these, they, this, those, three, to, two, we, what, when, where, which, while, who, why, with, you, your
""")
_VERBS = _set("""
    am, are, be, been, can, could, did, do, does, follows, had, has, have, include, included, includes, is, may,
    means, must, said, say, says, should, was, were, will, would
""")
_SAYS_ITS_NAME = frozenset(("name", "title", "entity", "subject"))


def split_pair(line: str) -> tuple[str, str] | None:
    """Key and value of a `key: value` line; None for anything else that has a colon in it.

    Sentences ("He had one rule: ..."), remarks ("Note: ..."), addresses ("http://..."), times and ratios ("12:30",
    "2: 1") are not pairs.
    """
    match = _PAIR.match(line)
    if not match:
        return None
    key, value = one_line(match["key"].strip(" *_`\"'")), match["value"].strip(" *_`")
    words = key.casefold().split()
    if not words or not value or not key[0].isalpha() or len(words) > MAX_KEY_WORDS:
        return None
    if key.casefold().rstrip(".") in _NOT_KEYS or words[0] in _NOT_FIRST_WORDS or not _VERBS.isdisjoint(words):
        return None
    if re.search(r"[.!?;=<>{}\[\]|]|//", key) or (key[-1].isdigit() and value[0].isdigit()):
        return None
    return key, value


def line_findings(lines: Iterable[tuple[str, Position]], entity: str) -> list[Finding]:
    """The `key: value` lines about `entity`; a block of lines that begins with `Name: X` is about X.

    In such a block the same key begins the next thing. A `Name: X` with nothing below it is a pair like any other.

    Args:
        lines: lines and where they stand; an empty one ends a block.
    """
    found: list[Finding] = []
    name: Finding | None = None
    at_start, num_before = True, 0
    for line, position in [*lines, ("", {})]:
        pair = split_pair(line)
        begins = pair is not None and (
            (at_start and pair[0].casefold() in _SAYS_ITS_NAME) or (name is not None and pair[0] == name.property)
        )
        if not line.strip() or begins:
            if name is not None and len(found) == num_before:
                found.append(name)
            name, num_before = None, len(found)
        if pair and begins:
            name = Finding(entity, *pair, position)
        elif pair:
            found.append(Finding(name.value if name else entity, *pair, position))
        at_start = not line.strip()
    return found


# Tables and definition lists

_KEY_COLUMNS = frozenset(
    ("", "attribute", "characteristic", "field", "item", "key", "name", "parameter", "property", "specification")
)
_VALUE_COLUMNS = frozenset(("", "content", "data", "detail", "details", "value", "values", "setting"))
_INDEX_COLUMNS = frozenset(("#", "id", "index", "nr", "nr.", "no", "no.", "number", "rank", "row"))
_NOTHING = frozenset(("", "-", "--", "–", "—", "n/a", "na", "none", "null", "?", "tbd", "unknown"))


def table_findings(
    header: Sequence[str] | None, rows: Sequence[tuple[Sequence[str], Sequence[Position]]], entity: str
) -> list[Finding]:
    """The facts of a table: keys and values about `entity`, or one entity per row and one property per column.

    Args:
        header: the names of the columns; None if the table has none, when only two columns can be understood.
        rows: the cells of each row and where they stand.
    """
    header = None if header is None else [one_line(cell) for cell in header]
    folded = [cell.casefold() for cell in header or ()]
    if header is None or (len(header) == 2 and folded[0] in _KEY_COLUMNS and folded[1] in _VALUE_COLUMNS):
        pairs = [
            (one_line(cells[0]).rstrip(" :："), one_line(cells[1]), at[1]) for cells, at in rows if len(cells) == 2
        ]
        return [Finding(entity, key, value, at) for key, value, at in pairs if key and not _is_nothing(value)]
    first = 1 if len(header) > 2 and folded[0] in _INDEX_COLUMNS else 0
    found = []
    for cells, at in rows:
        texts = [one_line(cell) for cell in cells]
        if len(texts) <= first or _is_nothing(texts[first]):
            continue
        for name, value, place in list(zip(header, texts, at, strict=False))[first + 1 :]:
            if name and not _is_nothing(value):
                found.append(Finding(texts[first], name, value, place))
    return found


def _is_nothing(cell: str) -> bool:
    return cell.casefold() in _NOTHING


GLOSSARY_WORDS = 5
"""Definitions at least this long on average make a definition list a glossary; shorter ones are values."""


def definition_findings(items: Sequence[tuple[str, str, Position]], entity: str) -> list[Finding]:
    """The facts of a definition list: a glossary defines each term, a list of short values is about `entity`."""
    items = [(one_line(term).rstrip(" :："), one_line(text), at) for term, text, at in items]
    items = [(term, text, at) for term, text, at in items if term and text]
    num_words = sum(len(text.split()) for _, text, _ in items)
    if items and num_words / len(items) >= GLOSSARY_WORDS:
        return [Finding(term, "definition", text, at) for term, text, at in items]
    return [Finding(entity, term, text, at) for term, text, at in items]


# Front matter

_ABOUT_THE_PAGE = _set("""
    aliases, cssclass, draft, layout, permalink, published, slug, template, url, weight,
""")


def front_matter_title(front: Mapping[str, Any]) -> str | None:
    """What the front matter says the document is about."""
    for name in ("title", "name", "entity"):
        if isinstance(front.get(name), str) and one_line(front[name]):
            return one_line(front[name])
    return None


def front_matter_findings(front: Mapping[str, Any], entity: str, lines: Mapping[str, int]) -> list[Finding]:
    """The facts of a YAML front matter: a nested name reads `outer inner`, a list is one value.

    Args:
        lines: where the value of each name stands, by the name as it reads.
    """
    found = []
    for name, value in _flat(front, ""):
        if name in ("title", "name", "entity") or name.casefold() in _ABOUT_THE_PAGE:
            continue
        found.append(Finding(entity, name.replace("_", " "), value, {"line": lines.get(name, 1)}))
    return found


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name} {key}".strip())]
    if isinstance(value, list):
        texts = [text for item in value for _, text in _flat(item, name)]
        return [(name, ", ".join(texts))] if texts else []
    if isinstance(value, bool):
        return [(name, "true" if value else "false")]
    if isinstance(value, date):
        return [(name, value.isoformat())]
    text = one_line(str(value)) if value is not None else ""
    return [(name, text)] if text else []
