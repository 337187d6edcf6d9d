"""Files as Python streams, wherever they lie, with a failing store told apart from a damaged file.

Decompressors and parsers report damage as OSError, which is also how a store reports that it is down. Here the
latter becomes a StorageError at the source, so that what readers see as OSError is damage in the file itself.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, AnyStr, cast

import pyarrow as pa

from kblam_ray.facts.inputs import InputFile
from kblam_ray.storage import filesystem, storage_errors

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 1 << 22
"""Bytes asked of the store at once: one request each on an object store."""

MAX_ROW_CHARS = 1 << 26
"""Longest line or array element: a longer one is a damaged or misnamed file, and would fill the memory."""

RAW_EXCERPT_CHARS = 200
"""How much of a bad row is kept to recognise it by."""


class DamagedFileError(Exception):
    """The rest of a file cannot be read; the message is the reason.

    Attributes:
        raw: the text at the place.
        line: where it is; None: in the row after the last good one.
    """

    def __init__(self, reason: str, raw: str = "", line: int | None = None) -> None:
        super().__init__(reason)
        self.raw, self.line = raw, line


DAMAGED = (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException)
"""What decompressing or parsing damaged bytes raises."""


class _StoreFile(io.RawIOBase):
    """A file of a pyarrow filesystem as a raw Python file."""

    def __init__(self, file: pa.NativeFile, uri: str) -> None:
        self._file, self._uri = file, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return cast(int, self._file.seek(offset, whence))

    def tell(self) -> int:
        return cast(int, self._file.tell())

    def readinto(self, buffer: WriteableBuffer) -> int:
        with storage_errors(self._uri):
            return cast(int, self._file.readinto(buffer))


class _Unzipped(io.RawIOBase):
    """A gzip stream as a raw Python file that gives what it has before it meets damage."""

    def __init__(self, zipped: gzip.GzipFile) -> None:
        self._zipped = zipped

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        # `GzipFile.readinto` would fill the buffer and lose all of it if damage follows.
        view = memoryview(buffer)
        data = self._zipped.read1(len(view))
        view[: len(data)] = data
        return len(data)


@contextmanager
def open_bytes(file: InputFile) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of `file`, uncompressed; seekable unless it is compressed.

    Raises:
        StorageError: the store does not answer, on opening or on any read.
    """
    with ExitStack() as stack:
        with storage_errors(file.uri):
            store, path = filesystem(file.uri)
            native = stack.enter_context(store.open_input_file(path))
        stored = stack.enter_context(io.BufferedReader(_StoreFile(native, file.uri), BUFFER_BYTES))
        if not file.compressed:
            yield stored
            return
        zipped = stack.enter_context(gzip.GzipFile(fileobj=stored, mode="rb"))
        yield stack.enter_context(io.BufferedReader(_Unzipped(zipped), BUFFER_BYTES))


def bounded_lines(readline: Callable[[int], AnyStr]) -> Iterator[AnyStr]:
    """The lines that `readline` gives, with their ends.

    Raises:
        DamagedFileError: a line is longer than any row may be.
    """
    while line := readline(MAX_ROW_CHARS):
        if len(line) == MAX_ROW_CHARS:
            raise DamagedFileError(
                f"a line of more than {MAX_ROW_CHARS:,} characters; a JSON array belongs in a file named .json"
            )
        yield line
