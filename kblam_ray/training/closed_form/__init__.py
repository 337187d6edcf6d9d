"""Adapters without a gradient: statistics of the frozen model, ridge regressions, calibration on held-out questions."""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "ClosedFormSettings": "settings",
    "CalibrationSettings": "settings",
    "ClosedForm": "fit",
    "fit_closed_form": "fit",
    "Statistics": "statistics",
    "operation_count": "cost",
}
# Not at once: the settings are read where torch may be missing.

__all__ = [
    "CalibrationSettings",
    "ClosedForm",
    "ClosedFormSettings",
    "Statistics",
    "fit_closed_form",
    "operation_count",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
