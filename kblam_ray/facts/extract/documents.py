"""Find documents and read them: which files they are, their bytes, and their text in its own encoding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from kblam_ray.errors import DocumentError, InputError
from kblam_ray.facts.extract.findings import (
    Parsed,
    Position,
    front_matter_findings,
    front_matter_title,
    line_findings,
)
from kblam_ray.facts.inputs import find_files
from kblam_ray.storage import filesystem, normalize, storage_errors

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
}
SUPPORTED = ", ".join(_KINDS)

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def kind_of(uri: str) -> str | None:
    """`text`, `markdown`, `html` or `pdf`, told by the ending; None for other files."""
    return _KINDS.get(PurePosixPath(uri.lower()).suffix)


def find_documents(paths: Sequence[str]) -> tuple[list[str], int]:
    """The documents that files, directories, globs and `s3://` prefixes mean, each once, and the files passed over.

    Raises:
        InputError: nothing there, no document there, or a named file of another kind.
    """
    documents: dict[str, None] = {}
    passed_over = 0
    for path in paths:
        uri = normalize(path)
        is_one_file, files = find_files(uri)
        found = [place for place, _ in files if kind_of(place)]
        if not found:
            what = "an unsupported kind of document" if is_one_file else "no document there"
            raise InputError(what, where=uri, help=f"documents end in {SUPPORTED}")
        documents.update(dict.fromkeys(found))
        passed_over += len(files) - len(found)
    return list(documents), passed_over


def read_bytes(uri: str) -> bytes:
    """The bytes of a document.

    Raises:
        DocumentError: there are none.
        StorageError: it cannot be read.
    """
    with storage_errors(uri):
        store, path = filesystem(uri)
        with store.open_input_stream(path) as stream:
            data: bytes = stream.read()
    if not data.strip():
        raise DocumentError("an empty document", where=uri, help="remove it from the input, or `--on-error skip`")
    return data


def decode(data: bytes, uri: str, encoding: str | None = None) -> str:
    """The text of `data`: UTF-16 if it begins as such, else `encoding` if known, else UTF-8. Line ends become `\\n`.

    Raises:
        DocumentError: bytes that are no text in that encoding.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    # What declares UTF-16 in letters of one byte is not UTF-16: browsers read such pages as UTF-8.
    elif encoding is None or encoding.lower().replace("-", "") == "utf8" or encoding.lower().startswith("utf-16"):
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = "UTF-8" if encoding == "utf-8-sig" else encoding
        raise DocumentError(
            f"not {name} text: {error.reason} at byte {error.start}",
            where=f"{uri}: line {line}",
            help="save it as UTF-8, or leave such documents out with `--on-error skip`",
        ) from None
    except (LookupError, UnicodeError):
        raise DocumentError(f"an unknown encoding {encoding!r}", where=uri, help="save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stem_title(uri: str) -> str:
    """A title from a file's name: `atlas_pump-2.md` is about "atlas pump-2"."""
    return PurePosixPath(uri).stem.replace("_", " ").strip() or uri


def split_front_matter(text: str, uri: str) -> tuple[dict[str, Any], dict[str, int], str]:
    """The YAML between `---` lines at a document's start, the line of each value, and the text with those lines blank.

    Lines are found by name, nested ones as `outer inner`.

    Raises:
        DocumentError: what stands there is not YAML.
    """
    match = _FRONT_MATTER.match(text)
    if not match:
        return {}, {}, text
    try:
        front = yaml.safe_load(match[1])
        # Refuses what contains itself.
        json.dumps(front, skipkeys=True, default=str)
        lines = _value_lines(yaml.compose(match[1], yaml.SafeLoader), "")
    # Days that no month has and numbers of thousands of digits are plain errors of their types.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DocumentError(
            f"front matter that is not YAML: {reason}", where=uri, help="mend it, or remove it"
        ) from None
    if not isinstance(front, dict):
        # Two rulers around a paragraph look like front matter and are not.
        return {}, {}, text
    body = "\n" * match[0].count("\n") + text[match.end() :]
    return {str(name): value for name, value in front.items()}, lines, body


def _value_lines(node: yaml.Node | None, name: str) -> dict[str, int]:
    if not isinstance(node, yaml.MappingNode):
        # The first line of all is the `---`.
        return {name: node.start_mark.line + 2} if node else {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        lines |= _value_lines(value, f"{name} {key.value}".strip())
    return lines


def parse_text(data: bytes, uri: str) -> Parsed:
    """A plain text: front matter, and `key: value` lines about its title."""
    text = decode(data, uri)
    front, front_lines, body = split_front_matter(text, uri)
    title = front_matter_title(front) or stem_title(uri)
    lines: list[tuple[str, Position]] = [(line, {"line": number}) for number, line in enumerate(body.split("\n"), 1)]
    findings = front_matter_findings(front, title, front_lines) + line_findings(lines, title)
    return Parsed(title, text, findings)


Parser = Callable[[bytes, str], Parsed]


def parser_of(uri: str) -> Parser:
    """The function that takes a document of this kind apart; the libraries it needs are loaded here."""
    kind = kind_of(uri)
    if kind == "markdown":
        from kblam_ray.facts.extract.markdown import parse_markdown

        return parse_markdown
    if kind == "html":
        from kblam_ray.facts.extract.html import parse_html

        return parse_html
    if kind == "pdf":
        from kblam_ray.facts.extract.pdf import parse_pdf

        return parse_pdf
    return parse_text
