"""kblam-ray: give a frozen language model a knowledge base of any size.

Public names are loaded on first use (PEP 562), so that importing one part of the package does not
import the libraries of another: reading a table needs neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "Fact": "kblam_ray.facts",
    "KblamError": "kblam_ray.errors",
    "KnowledgeAdapter": "kblam_ray.attention",
    "KnowledgeBase": "kblam_ray.table",
    "KnowledgeMemory": "kblam_ray.attention",
    "KnowledgeModel": "kblam_ray.model",
    "load_encoder": "kblam_ray.encoders",
}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
