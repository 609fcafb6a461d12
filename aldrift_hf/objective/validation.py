"""Checks of the values that a cost function returns."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any


def check_values(name: str, values: Any, rows: Sequence[int], completions: Sequence[str]) -> list[float]:
    """The values of one function on one batch as floats.

    Args:
        name: the function's name, for the error message.
        values: what the function returned: a list, a tuple, a tensor or an array.
        rows: the prompt row of each completion, for the error message.
        completions: the batch's completions.

    Raises:
        ValueError: if there is not exactly one valid cost per completion: a finite number of at least 0.
    """
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(
            f"objective {name!r} must return a list of one number per completion, but returned {got} for "
            f"{len(completions)} completions (rows {rows[0]} to {rows[-1]}, the first completion {completions[0]!r})"
        )
    for value, row, text in zip(values, rows, completions, strict=True):
        fault = _fault(value)
        if fault:
            raise ValueError(f"objective {name!r} returned {value!r} for row {row}, {fault}: completion {text!r}")
    return [float(value) for value in values]


def check_bound(name: str, cost: float, bound: float | None, row: int, completion: str) -> None:
    """Check a cost against `objective_range`, the upper bound D; `None` accepts any cost.

    Raises:
        ValueError: if the cost is above the bound by more than rounding.
    """
    if bound is not None and cost > bound * (1 + 1e-9):
        raise ValueError(
            f"objective {name!r} returned {cost} for row {row}, above objective_range={bound}: completion "
            f"{completion!r}. Raise objective_range, or cap the cost."
        )


def _fault(value: Any) -> str | None:
    """Why a value is not a valid cost."""
    if value is None:
        return (
            "which is not a number (a reward returns None where it does not apply: remove such rows from the data set)"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "which is not a number"
    if math.isnan(value):
        return "which is NaN"
    if math.isinf(value):
        return "which is infinite (return the worst finite cost, D, for malformed text)"
    if value < 0:
        return "which is negative (0 is the best cost; for a reward use from_reward(reward, best=…))"
    return None
