"""Checks of the values that a cost function returns."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, TypeAlias

ROUNDING = 1e-6
"""A cost may leave `[0, D]` by this share of D: 1 minus a cosine in fp32, for example, may be slightly negative."""


UNSCORED = "Return the worst finite cost, D, for a text that cannot be scored"
"""What an error advises where a value is none."""

Value: TypeAlias = float | ValueError | None
"""A checked cost, the error that says why there is none, or `None` where the function does not judge the completion."""


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
) -> list[Value]:
    """The values of one function on one batch as floats, 0 where they are negative by rounding.

    One value that is no number takes no other with it: they may be expensive.

    Args:
        name: the function's name, for the error message.
        values: what the function returned: a list, a tuple, a tensor or an array.
        rows: the prompt row of each completion, for the error message.
        completions: the batch's completions.
        weight: the function's factor in the weighted sum.
        bound: D, the upper bound on the weighted sum; `None` without one.

    Returns:
        Per completion a finite number of at least 0, `None` where the function does not judge it, or the error that
        says why the value is neither: a [`CostRangeError`] for a negative cost.

    Raises:
        ValueError: if there is not exactly one value per completion.
    """
    values = plain_values(values)
    if not isinstance(values, list) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise ValueError(
            f"objective {name!r} must return a list of one number per completion, but returned {got} for "
            f"{len(completions)} completions (rows {rows[0]} to {rows[-1]}, the first completion {completions[0]!r})"
        )
    faults = [None if value is None else _fault(value) for value in values]
    judged = [float(value) for value, fault in zip(values, faults, strict=True) if value is not None and fault is None]
    scale = max([1.0, *map(abs, judged)]) if bound is None else bound / (weight or 1)
    checked: list[Value] = []
    for value, fault, row, text in zip(values, faults, rows, completions, strict=True):
        where = f"objective {name!r} returned {value!r} for row {row}, which is"
        if fault is not None:
            remedy = f". {UNSCORED}" if fault == "NaN" else ""
            checked.append(ValueError(f"{where} {fault}: completion {text!r}{remedy}"))
        elif value is None:
            checked.append(None)
        elif value < -ROUNDING * scale:
            remedy = (
                "For a reward use from_reward(reward, best=…) with the highest reward there is, best: by this row, "
                f"{-value:g} higher than it is, if this is from_reward's."
            )
            checked.append(CostRangeError(f"{where} negative, and 0 is the best cost: completion {text!r}. {remedy}"))
        else:
            checked.append(max(0.0, float(value)))
    return checked


def above_bound(name: str, cost: float, bound: float | None, row: int, completion: str) -> CostRangeError | None:
    """The error for a cost above `objective_range`, the upper bound D, by more than rounding; with the bound `None`
    there is none."""
    if bound is None or cost <= bound * (1 + ROUNDING):
        return None
    return CostRangeError(
        f"objective {name!r} returned {cost} for row {row}, above objective_range={bound}: completion "
        f"{completion!r}. Raise objective_range, or cap the cost."
    )


def not_judged(names: Sequence[str], row: int, completion: str) -> ValueError:
    """The error for a completion of which no function with a weight says anything: each returned `None`."""
    if len(names) == 1:
        return ValueError(
            f"objective {names[0]!r} returned None for row {row}, which is not a number: completion {completion!r}. "
            f"{UNSCORED}. Rows that have nothing to be scored by, such as no solution: remove them from the data set."
        )
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
