"""Facts in Markdown: front matter, tables, definition lists and `key: value` lines, under the nearest heading."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from kblam_ray.errors import MissingDependencyError
from kblam_ray.facts.extract.documents import decode, split_front_matter, stem_title
from kblam_ray.facts.extract.findings import (
    Finding,
    Headings,
    Parsed,
    Position,
    definition_findings,
    front_matter_findings,
    front_matter_title,
    line_findings,
    table_findings,
)

if TYPE_CHECKING:
    from markdown_it.token import Token


def parse_markdown(data: bytes, uri: str) -> Parsed:
    """A Markdown document. Code blocks yield nothing; inline code counts as its text.

    Raises:
        DocumentError: not UTF-8, or front matter that is not YAML.
        MissingDependencyError: `markdown-it-py` is not installed.
    """
    try:
        from markdown_it import MarkdownIt
        from mdit_py_plugins.deflist import deflist_plugin
    except ImportError as error:
        raise MissingDependencyError(
            "markdown-it-py is not installed", where=uri, help="pip install 'kblam-ray[extract]'"
        ) from error
    text = decode(data, uri)
    front, front_lines, body = split_front_matter(text, uri)
    tokens = MarkdownIt("commonmark").enable("table").use(deflist_plugin).parse(body)
    title = front_matter_title(front) or _main_heading(tokens) or stem_title(uri)
    walk = _Walk(tokens, title)
    return Parsed(title, text, front_matter_findings(front, title, front_lines) + walk.findings())


def _main_heading(tokens: Sequence[Token]) -> str | None:
    """The first heading of the highest level, if it names something: what a page without a title is about."""
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h1":
            headings = Headings("")
            headings.open(1, _plain(inline))
            return headings.entity
    return None


class _Walk:
    """One pass over a document's tokens."""

    def __init__(self, tokens: Sequence[Token], title: str) -> None:
        self._tokens = tokens
        self._at = 0
        self._headings = Headings(title)
        self._line = 0

    def findings(self) -> list[Finding]:
        found: list[Finding] = []
        block: list[tuple[str, Position]] = []
        while (token := self._next()) is not None:
            # The items of a tight list are lines of one block; anything else is a block of its own.
            if not (token.hidden or token.type in ("inline", "list_item_open", "list_item_close")):
                found += line_findings(block, self._headings.entity)
                block = []
            if token.type == "heading_open":
                self._headings.open(int(token.tag[1:]), self._text_until("heading_close"))
            elif token.type == "table_open":
                found += self._table()
            elif token.type == "dl_open":
                found += self._definitions()
            elif token.type == "inline":
                for part, at in _source_lines(token):
                    block += [(line, {"line": self._line + at}) for line in part.split("\n")]
        return found + line_findings(block, self._headings.entity)

    def _next(self) -> Token | None:
        if self._at == len(self._tokens):
            return None
        token = self._tokens[self._at]
        self._at += 1
        if token.map:
            self._line = token.map[0] + 1
        return token

    def _text_until(self, end: str) -> str:
        texts = []
        while (token := self._next()) is not None and token.type != end:
            if token.type == "inline":
                texts.append(_plain(token))
        return "\n".join(texts)

    def _table(self) -> list[Finding]:
        rows: list[tuple[list[str], Position]] = []
        while (token := self._next()) is not None and token.type != "table_close":
            if token.type == "tr_open":
                rows.append(([], {"line": self._line}))
            elif token.type in ("th_open", "td_open"):
                rows[-1][0].append(self._text_until(token.type.replace("open", "close")))
        placed = [(cells, [at] * len(cells)) for cells, at in rows[1:]]
        return table_findings(rows[0][0], placed, self._headings.entity)

    def _definitions(self) -> list[Finding]:
        items: list[tuple[str, str, Position]] = []
        term = ""
        while (token := self._next()) is not None and token.type != "dl_close":
            if token.type == "dt_open":
                term = self._text_until("dt_close")
            elif token.type == "dd_open":
                items.append((term, self._text_until("dd_close"), {"line": self._line}))
        return definition_findings(items, self._headings.entity)


def _plain(token: Token) -> str:
    """The text of an inline token, its line breaks kept."""
    return "\n".join(text for text, _ in _source_lines(token))


def _source_lines(token: Token) -> list[tuple[str, int]]:
    """The text of an inline token by lines of the source, counted from its first; `<br>` breaks a line in two."""
    lines = [""]
    for child in token.children or ():
        if child.type in ("text", "code_inline"):
            lines[-1] += child.content
        elif child.type in ("softbreak", "hardbreak"):
            lines.append("")
        elif child.content.lower().startswith("<br"):
            lines[-1] += "\n"
    return [(line, at) for at, line in enumerate(lines)]
