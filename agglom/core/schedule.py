"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def lr(step: int, *, steps: int, warmup: int, peak: float, end: float) -> float:
    """Learning rate of optimizer step `step` (from 0) out of `steps`: linear warm-up, then cosine.

    Step 0 of a warm-up runs at peak / warmup, so no step is wasted at 0; step warmup − 1 is the first at `peak`, the
    last step runs at `end`, and so does any step after it. Raises ValueError unless 0 ≤ warmup ≤ steps.
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"warm-up of {warmup} steps in a schedule of {steps}: expected 0 ≤ warmup ≤ steps")
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
