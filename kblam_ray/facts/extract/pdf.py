"""Facts in PDF: the text of each page, and its `key: value` lines about the document's title."""

from __future__ import annotations

import io
import logging
import zlib

from kblam_ray.errors import DocumentError, MissingDependencyError
from kblam_ray.facts.extract.documents import stem_title
from kblam_ray.facts.extract.findings import Parsed, Position, line_findings, one_line

_PAGE_END = "\n\n"


def parse_pdf(data: bytes, uri: str) -> Parsed:
    """A PDF with a text layer. One encrypted with an empty password is read like any other.

    Raises:
        DocumentError: damaged, encrypted, or without text (a scan).
        MissingDependencyError: `pypdf` is not installed.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise MissingDependencyError(
            "pypdf is not installed", where=uri, help="pip install 'kblam-ray[extract]'"
        ) from error
    # It warns of every flaw that it could mend; those it could not mend are raised.
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("an encrypted PDF", where=uri, help="save it without a password, or `--on-error skip`")
        pages = [page.extract_text() for page in reader.pages]
        title = one_line(str(reader.metadata.title or "")) if reader.metadata else ""
    except DependencyError as error:
        raise MissingDependencyError(str(error), where=uri, help="pip install 'pypdf[crypto]'") from error
    # pypdf meets a damaged structure as whatever the wrong object first does not support.
    except (PyPdfError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
            AssertionError, NotImplementedError, OSError, zlib.error) as error:  # fmt: skip
        raise DocumentError(
            f"a damaged PDF: {type(error).__name__}: {error}", where=uri, help="save it again, or `--on-error skip`"
        ) from error
    if not any(page.strip() for page in pages):
        raise DocumentError(
            "a PDF without text, perhaps a scan", where=uri, help="run text recognition on it, or `--on-error skip`"
        )
    title = title or stem_title(uri)
    starts, text = [], ""
    findings = []
    for number, page in enumerate(pages, 1):
        starts.append(len(text))
        text += page + _PAGE_END
        lines: list[tuple[str, Position]] = [
            (line, {"page": number, "line": at}) for at, line in enumerate(page.split("\n"), 1)
        ]
        findings += line_findings(lines, title)
    return Parsed(title, text, findings, starts)
