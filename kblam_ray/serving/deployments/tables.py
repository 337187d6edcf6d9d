"""Knowledge bases as the command line names them: `[NAME=]URI`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kblam_ray.errors import InputError
from kblam_ray.serving.settings import KB_NAME
from kblam_ray.serving.wanted import KbSpec
from kblam_ray.table.opening import check_location

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def tables_of(given: Iterable[str]) -> dict[str, KbSpec]:
    """The tables to serve by name, at their newest version, with absolute URIs.

    Args:
        given: `NAME=URI`, or a URI alone, whose last part makes the name. A relative path with an equals sign in its
            first folder is written `./a=b/table`.

    Raises:
        InputError: a name that is none, two tables of one name, a URI that cannot be a table's.
    """
    specs: dict[str, KbSpec] = {}
    for text in given:
        name, equals, uri = text.partition("=")
        if not equals or not KB_NAME.fullmatch(name):
            name, uri = "", text
        uri = check_location(uri)
        name = name or _name_from(uri)
        if name in specs:
            raise InputError(
                f"two knowledge bases are named {name!r}", where="--kb", help="name them apart: --kb NAME=URI"
            )
        specs[name] = KbSpec(uri)
    return specs


def _name_from(uri: str) -> str:
    last = uri.rstrip("/").rpartition("/")[2]
    name = _NOT_IN_NAMES.sub("-", last).lstrip("._-").rstrip("-")[:64]
    if not name:
        raise InputError("no name can be made of this URI", where=uri, help="name it: --kb NAME=URI")
    return name
