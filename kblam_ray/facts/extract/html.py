"""Facts in HTML: tables, definition lists and `key: value` lines, under the nearest heading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kblam_ray.errors import DocumentError, MissingDependencyError
from kblam_ray.facts.extract.documents import decode, stem_title
from kblam_ray.facts.extract.findings import (
    Finding,
    Headings,
    Parsed,
    Position,
    definition_findings,
    line_findings,
    one_line,
    table_findings,
)

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from bs4.element import PageElement, Tag

_NOT_TEXT = (
    "script", "style", "template", "noscript", "pre", "nav", "footer", "button", "select", "textarea", "svg",
    "head",
)  # fmt: skip
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_NESTED = ("table", "dl", *_HEADINGS)
"""In a cell or a definition: what it says is not a value."""
_BLOCKS = (
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt", "fieldset",
    "figure", "figcaption", "form", "header", "hr", "html", "legend", "li", "main", "menu", "ol", "p", "section",
    "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul", *_HEADINGS,
)  # fmt: skip


def parse_html(data: bytes, uri: str) -> Parsed:
    """An HTML page, in the encoding it declares, else UTF-8. Scripts, code, navigation and controls yield nothing.

    Raises:
        DocumentError: not text in that encoding, or no text at all.
        MissingDependencyError: `beautifulsoup4` is not installed.
    """
    try:
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
        from bs4.exceptions import ParserRejectedMarkup
    except ImportError as error:
        raise MissingDependencyError(
            "beautifulsoup4 is not installed", where=uri, help="pip install 'kblam-ray[extract]'"
        ) from error
    markup = decode(data, uri, EncodingDetector.find_declared_encoding(data, is_html=True))
    try:
        soup = BeautifulSoup(markup, "html.parser")
    except ParserRejectedMarkup as error:
        reason = str(error).splitlines()[-1].strip()
        raise DocumentError(f"not HTML: {reason}", where=uri, help="mend it, or `--on-error skip`") from error
    title = one_line(soup.title.get_text()) if soup.title else ""
    starts = _text_lines(soup)
    for tag in soup.find_all(_NOT_TEXT):
        tag.decompose()
    text = "\n".join(line for line, _ in _lines(soup, starts) if line)
    if not (title or text.strip()):
        raise DocumentError("a page without text", where=uri, help="remove it from the input, or `--on-error skip`")
    title = title or stem_title(uri)
    return Parsed(title, f"{title}\n\n{text}", _findings(soup, title, starts))


def _findings(soup: BeautifulSoup, title: str, starts: dict[int, int]) -> list[Finding]:
    headings = Headings(title)
    found: list[Finding] = []
    done: set[int] = set()

    def read_whole(tag: Tag) -> bool:
        """Read what is more than lines; whether nothing of the tag is left to read."""
        if tag.name in _HEADINGS:
            headings.open(int(tag.name[1]), _flat_text(tag, starts))
            return True
        if tag.name == "table":
            # A row around another table or list lays out the page: what is in it is read by itself.
            rows = [row for row in tag.find_all("tr") if row.find_parent("table") is tag and not row.find(_NESTED)]
            found.extend(_table(rows, starts, headings.entity))
            # One cell alone is a box around lines.
            done.update(id(row) for row in rows if len(row.find_all(["th", "td"])) > 1)
        elif tag.name == "dl":
            parts = [part for part in tag.find_all(["dt", "dd"]) if part.find_parent("dl") is tag]
            parts = [part for part in parts if not part.find(_NESTED)]
            found.extend(definition_findings(_definitions(parts, starts), headings.entity))
            done.update(map(id, parts))
        return id(tag) in done

    block: list[tuple[str, Position]] = []
    for line, at in _lines(soup, starts, read_whole):
        if line:
            block.append((line, {"line": at}))
        elif block:
            found += line_findings(block, headings.entity)
            block = []
    return found


def _text_lines(soup: BeautifulSoup) -> dict[int, int]:
    """The line of the source on which each piece of text begins."""
    from bs4.element import NavigableString

    starts, line = {}, 1
    for piece in soup.descendants:
        if isinstance(piece, NavigableString):
            starts[id(piece)] = line
            line += piece.count("\n")
        else:
            line = max(line, getattr(piece, "sourceline", None) or 1)
    return starts


def _lines(
    root: Tag, starts: dict[int, int], read_whole: Callable[[Tag], bool] = lambda tag: False
) -> Iterator[tuple[str, int]]:
    """The text as a reader sees its lines, with their places in the source; an empty line where a block ends.

    Blocks and `<br>` break lines, other white space does not. The items of a list are lines of one block.

    Args:
        read_whole: asked at the beginning of each block; True passes over what is in it.
    """
    from bs4.element import NavigableString, Tag

    text, at = "", 0
    # Not recursive: pages nest deeper than Python does.
    open_tags: list[tuple[Tag, Iterator[PageElement]]] = [(root, iter(root.children))]
    while open_tags:
        tag, children = open_tags[-1]
        piece = next(children, None)
        if type(piece) is NavigableString:
            if not text.strip():
                text, at = "", starts[id(piece)] + piece[: len(piece) - len(piece.lstrip())].count("\n")
            text += piece
            continue
        if piece is None:
            open_tags.pop()
        breaking = tag if piece is None else piece
        if isinstance(breaking, Tag) and (breaking.name == "br" or breaking.name in _BLOCKS or breaking is root):
            if text.strip():
                yield one_line(text), at
            text = ""
            if breaking.name not in ("br", "li"):
                yield "", at
        if isinstance(piece, Tag) and not (piece.name in _BLOCKS and read_whole(piece)):
            open_tags.append((piece, iter(piece.children)))


def _flat_text(tag: Tag, starts: dict[int, int]) -> str:
    return " ".join(line for line, _ in _lines(tag, starts) if line)


def _table(rows: Sequence[Tag], starts: dict[int, int], entity: str) -> list[Finding]:
    header: list[str] | None = None
    read: list[tuple[list[str], list[Position]]] = []
    for cells, is_header in _grid(rows, starts):
        texts = [text for text, _ in cells]
        if not is_header:
            read.append((texts, [at for _, at in cells]))
        elif not read and len(set(texts)) > 1:
            # Headers of two rows: groups above, names below.
            uppers = header or texts
            header = [
                lower if lower == upper else f"{upper} {lower}" for upper, lower in zip(uppers, texts, strict=False)
            ]
    return table_findings(header, read, entity)


def _grid(rows: Sequence[Tag], starts: dict[int, int]) -> Iterator[tuple[list[tuple[str, Position]], bool]]:
    """Text and place of each row's cells, and whether it is a header; a cell that spans rows is in all of them.

    A header that spans columns names all of them; other cells count once, in the first of their columns.
    """
    grid: list[dict[int, tuple[str, Position]]] = [{} for _ in rows]
    for number, row in enumerate(rows):
        own = [cell for cell in row.find_all(["th", "td"]) if cell.find_parent("tr") is row]
        is_header = bool(own) and (all(cell.name == "th" for cell in own) or row.find_parent("thead") is not None)
        column = 0
        for cell in own:
            while column in grid[number]:
                column += 1
            lines = [(line, at) for line, at in _lines(cell, starts) if line]
            text = " ".join(line for line, _ in lines)
            at: Position = {"line": lines[0][1] if lines else cell.sourceline or 1}
            for across in range(_span(cell, "colspan")):
                for below in grid[number : number + _span(cell, "rowspan")]:
                    below[column] = (text if is_header or not across else "", at)
                column += 1
        yield [grid[number].get(place, ("", {})) for place in range(max(grid[number], default=-1) + 1)], is_header


def _span(cell: Tag, name: str) -> int:
    """`colspan` or `rowspan`, within what browsers take for meant."""
    text = str(cell.get(name, ""))
    return min(int(text), 1_000) if text.isascii() and text.isdigit() and 0 < len(text) < 6 and int(text) else 1


def _definitions(parts: Sequence[Tag], starts: dict[int, int]) -> list[tuple[str, str, Position]]:
    items: list[tuple[str, str, Position]] = []
    term = ""
    for tag in parts:
        text = _flat_text(tag, starts)
        if tag.name == "dt":
            term = text
        else:
            items.append((term, text, {"line": next((at for line, at in _lines(tag, starts) if line), 1)}))
    return items
