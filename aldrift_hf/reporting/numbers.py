"""Figures for people to read."""

from __future__ import annotations

import math
from collections.abc import Mapping


def with_error(metrics: Mapping[str, float], name: str, spec: str) -> str:
    """A metric and, where it is known, its standard error: `0.02 ± 0.01`. Empty where it was not measured, or is NaN.

    Args:
        metrics: those of a rung or of an evaluation; the error is called `…_error`.
        name: of the metric.
        spec: format of both numbers.
    """
    value, error = (metrics.get(key, math.nan) for key in (name, f"{name}_error"))
    if not math.isfinite(value):
        return ""
    return f"{value:{spec}} ± {error:{spec}}" if math.isfinite(error) else f"{value:{spec}}"
