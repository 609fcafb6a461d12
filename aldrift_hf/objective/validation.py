"""Checks of the values that a cost function returns."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

ROUNDING = 1e-6
"""A cost may leave `[0, D]` by this share of D: 1 minus a cosine in fp32, for example, may be slightly negative."""


class CostRangeError(ValueError):
    """A finite cost below 0, or above D, by more than rounding. It is an error of the function or of the settings for
    all completions, and no failure on one of them: it never becomes a cost."""


def plain_values(values: Any) -> Any:
    """What a function returned, as a list of Python's numbers where it is an array, a tensor or a list of such."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(map(_plain, values)) if isinstance(values, (list, tuple)) else values


def check_values(
    name: str,
    values: Any,
    rows: Sequence[int],
    completions: Sequence[str],
    weight: float = 1.0,
    bound: float | None = None,
) -> list[float | None]:
    """The values of one function on one batch as floats, 0 where they are negative by rounding.

    Args:
        name: the function's name, for the error message.
        values: what the function returned: a list, a tuple, a tensor or an array.
        rows: the prompt row of each completion, for the error message.
        completions: the batch's completions.
        weight: the function's factor in the weighted sum.
        bound: D, the upper bound on the weighted sum; `None` without one.

    Returns:
        One finite number of at least 0 per completion, or `None` where the function does not judge it.

    Raises:
        CostRangeError: for a negative cost.
        ValueError: if there is not exactly one number or `None` per completion.
    """
    values = plain_values(values)
    if not isinstance(values, list) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise ValueError(
            f"objective {name!r} must return a list of one number per completion, but returned {got} for "
            f"{len(completions)} completions (rows {rows[0]} to {rows[-1]}, the first completion {completions[0]!r})"
        )
    judged = [float(value) for value in values if _fault(value) is None]
    scale = max([1.0, *map(abs, judged)]) if bound is None else bound / (weight or 1)
    for value, row, text in zip(values, rows, completions, strict=True):
        where = f"objective {name!r} returned {value!r} for row {row}, which is"
        if value is not None and (fault := _fault(value)):
            raise ValueError(f"{where} {fault}: completion {text!r}")
        if value is not None and value < -ROUNDING * scale:
            raise CostRangeError(
                f"{where} negative, and 0 is the best cost: completion {text!r}. For a reward use "
                f"from_reward(reward, best=…) with the highest reward there is, best: by this row, {-value:g} higher "
                "than it is, if this is from_reward's."
            )
    return [None if value is None else max(0.0, float(value)) for value in values]


def check_bound(name: str, cost: float, bound: float | None, row: int, completion: str) -> None:
    """Check a cost against `objective_range`, the upper bound D; `None` accepts any cost.

    Raises:
        CostRangeError: if the cost is above the bound by more than rounding.
    """
    if bound is not None and cost > bound * (1 + ROUNDING):
        raise CostRangeError(
            f"objective {name!r} returned {cost} for row {row}, above objective_range={bound}: completion "
            f"{completion!r}. Raise objective_range, or cap the cost."
        )


def not_judged(names: Sequence[str], row: int, completion: str) -> ValueError:
    """The error for a completion of which no function with a weight says anything: each returned `None`."""
    return ValueError(
        f"objective {' + '.join(map(repr, names))} returned None for row {row}, which is not a number: completion "
        f"{completion!r}. None says that a function does not judge a row, and then another must. Add one that does, or "
        "remove such rows from the data set."
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        return value.item()
    if isinstance(value, Decimal):  # a price, or a number of a database
        return float(value)
    return value[0] if isinstance(value, list) and len(value) == 1 else value  # a row of an array `[n, 1]`


def _fault(value: Any) -> str | None:
    """Why a value is not a number; `None` for a number."""
    if isinstance(value, bool):
        return (
            "not a number (is True good or bad? Return a float, 0 for the best cost; for a reward, of which True is "
            "good, use from_reward)"
        )
    if not isinstance(value, numbers.Real):
        return "not a number"
    if value != value:
        return "NaN"
    try:
        infinite = math.isinf(value)
    except OverflowError:  # an integer beyond the largest float
        infinite = True
    return "infinite (return the worst finite cost, D, for malformed text)" if infinite else None
