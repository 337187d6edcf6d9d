"""Names that stand in requests: models (`base`, `base:kb`, `base:kb@version`) and ids of facts."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Path
from starlette.convertors import StringConvertor, register_url_convertor

from kblam_ray.errors import NotServedError
from kblam_ray.serving.messages import KbRef
from kblam_ray.serving.settings import KB_NAME, KB_NAME_PATTERN

_VERSION = re.compile(r"0|[1-9][0-9]{0,18}")

FACT_ID_PATTERN = r"^(0|-?[1-9][0-9]{0,18})$"


class FactIdConvertor(StringConvertor):
    """Has only numbers taken for ids of facts, so that `facts/delete` is not one of them."""

    regex = "-?[0-9]+"


register_url_convertor("fact_id", FactIdConvertor())

KbPath = Annotated[str, Path(pattern=KB_NAME_PATTERN, description="name of a knowledge base")]
FactIdPath = Annotated[str, Path(pattern=FACT_ID_PATTERN, description="id of a fact, a decimal number")]

_HELP = "GET /v1/models lists what there is"


def kb_of(model: str, base: str) -> KbRef | None:
    """The knowledge base that a model's name asks; None asks the base model alone.

    Raises:
        NotServedError: it is not a name of this server's.
    """
    if model == base:
        return None
    name, at, version = model.removeprefix(f"{base}:").partition("@")
    if not model.startswith(f"{base}:") or not KB_NAME.fullmatch(name) or (at and not _VERSION.fullmatch(version)):
        shown = model if len(model) <= 100 else f"{model[:100]}..."
        raise NotServedError(f"there is no model {shown!r}", where="model", help=_HELP)
    return KbRef(name, int(version) if at else None)


def unknown_kb(name: str) -> NotServedError:
    """What is said where no knowledge base has a name."""
    return NotServedError(
        f"there is no knowledge base {name!r}", where="name", help="GET /v1/knowledge_bases lists them"
    )
