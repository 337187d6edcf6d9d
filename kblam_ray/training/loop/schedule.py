"""The learning rate at each step: a linear warm-up, then half a cosine. Of the step alone, so nothing to save."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, last: float) -> float:
    """The learning rate of step `step`, the first of which is 0.

    Args:
        peak: reached at the end of the warm-up.
        warmup_steps: steps over which it rises from peak / warmup_steps to the peak.
        steps: of the whole run.
        last: what it ends at, as a share of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
