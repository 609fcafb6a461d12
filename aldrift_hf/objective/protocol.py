"""Cost functions as objects: their names, and whether they can be called with given columns."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

CostFunction = Callable[..., Any]
"""A function with the signature that [`aldrift_hf.objective`] describes."""


def name_of(function: CostFunction) -> str:
    """The name of a function, or the name of the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def unique_names(functions: Sequence[CostFunction]) -> list[str]:
    """The functions' names, with a number where an earlier one has the same name: two lambdas, for example."""
    names: list[str] = []
    for function in functions:
        name = name_of(function)
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names


def check_signature(function: CostFunction, columns: Sequence[str]) -> None:
    """Check that a function can be called with these columns of the data set, without calling it.

    Raises:
        TypeError: if it cannot, naming the function, the parameter and the remedy.
    """
    name, signature = name_of(function), inspect.signature(function)
    given = ["prompts", "completions", *columns]
    try:
        signature.bind(**dict.fromkeys(given))
    except TypeError as error:
        missing = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and parameter.name not in given
        ]
        raise TypeError(
            f"objective {name!r} cannot be called as {name}({', '.join(f'{each}=…' for each in given)}): {error}. "
            f"{_remedy(missing)}"
        ) from None


def _remedy(missing: list[str]) -> str:
    """What the user should change, given the required parameters that the data set has no column for."""
    if not missing:
        return "Add **columns to its parameters, or remove the column from the data set."
    if "completion_ids" in missing:
        return "Wrap the reward in from_reward(…, tokenizer=…), which tokenizes the texts into completion_ids."
    if missing[0] in ("trainer_state", "log_extra", "log_metric", "environments"):
        return (
            f"TRL's trainers pass {missing[0]} to rewards; ALDRIFTTrainer does not, because a cost is a function of "
            "the text. Give the parameter a default."
        )
    return f"Add a column {missing[0]!r} to the data set, or give the parameter a default."
