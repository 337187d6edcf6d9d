"""Facts in HTML: tables, definition lists and `key: value` lines, under the nearest heading."""

from __future__ import annotations

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
    from bs4.element import Tag

_NOT_TEXT = ("script", "style", "template", "noscript", "pre", "nav", "footer", "form", "svg", "head")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = (
    "address", "article", "aside", "blockquote", "body", "dd", "div", "dl", "dt", "figure", "figcaption", "header",
    "html", "li", "main", "ol", "p", "section", "table", "tbody", "td", "th", "thead", "tr", "ul", *_HEADINGS,
)  # fmt: skip


def parse_html(data: bytes, uri: str) -> Parsed:
    """An HTML page, in the encoding it declares, else UTF-8. Scripts, code blocks, navigation and forms yield nothing.

    Raises:
        DocumentError: not text in that encoding, or no text at all.
        MissingDependencyError: `beautifulsoup4` is not installed.
    """
    try:
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
    except ImportError as error:
        raise MissingDependencyError(
            "beautifulsoup4 is not installed", where=uri, help="pip install 'kblam-ray[extract]'"
        ) from error
    soup = BeautifulSoup(decode(data, uri, EncodingDetector.find_declared_encoding(data, is_html=True)), "html.parser")
    title = one_line(soup.title.get_text()) if soup.title else ""
    for tag in soup.find_all(_NOT_TEXT):
        tag.decompose()
    text = _text(soup)
    if not (title or text.strip()):
        raise DocumentError("a page without text", where=uri, help="remove it from the input, or `--on-error skip`")
    title = title or stem_title(uri)
    return Parsed(title, f"{title}\n\n{text}", _findings(soup, title))


def _findings(soup: BeautifulSoup, title: str) -> list[Finding]:
    headings = Headings(title)
    found: list[Finding] = []
    # A table or list inside a table's cell is part of the cell: it is not read a second time.
    inside: set[int] = set()
    for tag in soup.find_all(_BLOCKS):
        if tag.parent is not None and id(tag.parent) in inside:
            inside.add(id(tag))
        elif tag.name in _HEADINGS:
            headings.open(int(tag.name[1]), tag.get_text(" "))
            inside.add(id(tag))
        elif tag.name == "table":
            inside.add(id(tag))
            found += _table(tag, headings.entity)
        elif tag.name == "dl":
            inside.add(id(tag))
            found += definition_findings(_definitions(tag), headings.entity)
        elif tag.find(_BLOCKS) is None:
            lines = [(line, _place(tag)) for line in _text(tag).split("\n")]
            found += line_findings(lines, headings.entity)
    return found


def _place(tag: Tag) -> Position:
    return {"line": tag.sourceline or 1}


def _text(tag: Tag | BeautifulSoup) -> str:
    """The text as a reader sees its lines: blocks and `<br>` break them, other white space does not."""
    pieces: list[str] = []
    for piece in tag.descendants:
        name = getattr(piece, "name", None)
        if name is None:
            pieces.append(" ".join(("x" + str(piece) + "x").split())[1:-1])
        elif name == "br" or name in _BLOCKS:
            pieces.append("\n")
    lines = (one_line(line) for line in "".join(pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def _table(table: Tag, entity: str) -> list[Finding]:
    header: list[str] | None = None
    rows: list[tuple[list[str], Position]] = []
    for row in table.find_all("tr"):
        if row.find_parent("table") is not table:
            continue
        cells = [cell for cell in row.find_all(["th", "td"]) if cell.find_parent("tr") is row]
        texts = [cell.get_text(" ") for cell in cells]
        is_header = bool(cells) and all(cell.name == "th" for cell in cells)
        if is_header and header is None and not rows and len(cells) > 1:
            header = texts
        elif not is_header:
            rows.append((texts, _place(row)))
    return table_findings(header, rows, entity)


def _definitions(listing: Tag) -> list[tuple[str, str, Position]]:
    items: list[tuple[str, str, Position]] = []
    term = ""
    for tag in listing.find_all(["dt", "dd"]):
        if tag.name == "dt":
            term = tag.get_text(" ")
        else:
            items.append((term, tag.get_text(" "), _place(tag)))
    return items
