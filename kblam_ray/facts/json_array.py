"""The elements of a JSON array of any length, one at a time.

The standard library's decoder tells where a value ends; here it is fed a window that slides over the text. A
streaming parser from outside (ijson) is not used because its C backend turns half a surrogate pair into "?" without
a word and gives up the whole array for one byte that is not UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from kblam_ray.facts.rows import JSON_DECODER
from kblam_ray.facts.streams import MAX_ROW_CHARS, RAW_EXCERPT_CHARS, DamagedFileError

_WINDOW_CHARS = 1 << 20

_LONGEST_TOKEN = 16
"""A syntax error closer than this to the window's end may be a token (`\\ud83d\\ude00`, `-Infinity`) cut in two."""

_NOT_SPACE = re.compile(r"[^ \t\r\n]|\Z")


def array_elements(text: TextIO) -> Iterator[tuple[Any, str]]:
    """Each element of the array that `text` begins with, and the beginning of its text to recognise it by.

    Raises:
        DamagedFileError: the array breaks off, is not JSON in the middle, or is followed by anything.
    """
    window = text.read(_WINDOW_CHARS)
    position = after = _skip_space(window, 0) + 1
    empty = True
    while True:
        start = _skip_space(window, position)
        if empty and window.startswith("]", start):
            after = start
            break
        try:
            element, end = JSON_DECODER.raw_decode(window, start)
            after = _skip_space(window, end)
            # What parsed may go on beyond the window: of a number, cut in two, the first part is a number.
            complete = window.startswith((",", "]"), after) or after + _LONGEST_TOKEN < len(window)
        except json.JSONDecodeError as error:
            if not _may_be_cut(error, window):
                reason = f"the array is malformed and cannot be read further: {error.msg}"
                raise DamagedFileError(reason, window[error.pos : error.pos + RAW_EXCERPT_CHARS]) from None
            complete = False
        except RecursionError:
            raise DamagedFileError("JSON nested too deeply", window[start : start + RAW_EXCERPT_CHARS]) from None
        if not complete:
            window = _extend(window[position:], text)
            position = 0
            continue
        yield element, window[start : min(end, start + RAW_EXCERPT_CHARS)]
        empty = False
        if window[after] == "]":
            break
        if window[after] != ",":
            reason = "the array is malformed and cannot be read further: no comma between two elements"
            raise DamagedFileError(reason, window[after : after + RAW_EXCERPT_CHARS])
        position = after + 1
    rest = window[after + 1 :]
    while rest:
        if not rest.isspace():
            raise DamagedFileError("something follows the end of the array", rest.lstrip()[:RAW_EXCERPT_CHARS])
        rest = text.read(_WINDOW_CHARS)


def _skip_space(window: str, position: int) -> int:
    found = _NOT_SPACE.search(window, position)
    return found.start() if found else len(window)


def _may_be_cut(error: json.JSONDecodeError, window: str) -> bool:
    """Whether the error may be only the window's end; a string's error stands where the string begins."""
    return error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN >= len(window)


def _extend(rest: str, text: TextIO) -> str:
    if len(rest) > MAX_ROW_CHARS:
        raise DamagedFileError(f"an element of more than {MAX_ROW_CHARS:,} characters", rest[:RAW_EXCERPT_CHARS])
    # Doubling keeps the parsing of one long element linear in its length.
    more = text.read(max(_WINDOW_CHARS, len(rest)))
    if not more:
        raise DamagedFileError("the array breaks off", rest.lstrip()[:RAW_EXCERPT_CHARS])
    return rest + more
