"""Figures for people to read: formats, and the columns of a table of rungs."""

from __future__ import annotations

import math
from collections.abc import Mapping

COLUMNS = {
    "rung": ("rung", 4, "d"),
    "tau": ("tau", 5, ".3g"),
    "objective_mean": ("cost", 6, ".3g"),
    "objective_best": ("best", 4, ".3g"),
    "success": ("success", 7, ".3f"),
    "acceptance_rate": ("accept", 6, ".2f"),
    "ess": ("ESS/n", 5, ".2f"),
    "khat": ("k-hat", 5, ".2f"),
    "missing_mass": ("missing", 7, ".2f"),
    "distinct_proposals": ("distinct", 8, ".2f"),
    "loss": ("loss", 6, ".2g"),
    "objective_calls": ("calls", 6, "d"),
}
"""Of a rung's metrics: each column's header, width and format. With spaces between them, 80 characters."""


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


def cell(value: float | None, spec: str) -> str:
    """A number; a hyphen where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, spec)
