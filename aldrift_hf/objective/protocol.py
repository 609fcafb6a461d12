"""Cost functions as objects: their names, what is no cost function, and which can be called with given columns."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

CostFunction = Callable[..., Any]
"""A function with the signature that [`aldrift_hf.objective`] describes."""


def name_of(function: CostFunction) -> str:
    """The name of a function, or the name of the class of a callable object."""
    function = _without_partial(function)
    return str(getattr(function, "__name__", type(function).__name__))


def unique_names(functions: Sequence[CostFunction]) -> list[str]:
    """The functions' names, with a number where an earlier one has the same name: two lambdas, for example."""
    names: list[str] = []
    for function in functions:
        name = name_of(function)
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names


def check_function(function: Any, role: str = "objective", wanted: str = "in [0, D]") -> None:
    """Check that something may be a cost function, without calling it.

    Args:
        function: what the user has passed.
        role: what it was passed as, for the error message.
        wanted: which numbers it must return, for the error message.

    Raises:
        TypeError: for a model, its name, a pipeline, a tokenizer, a class, a generator function, and for anything else
            that cannot be called; the message says what to pass.
    """
    remedy = (
        f"Pass a function that calls it: def {role}(prompts, completions, **columns), which returns a list of one "
        f"number {wanted} per completion."
    )
    if isinstance(function, str):
        raise TypeError(f"{role} is a text and no cost function: {function!r}. If it names a model, load it. {remedy}")
    if not callable(function):
        raise TypeError(f"{role} must be a cost function, or a list of at least one, but is {_described(function)}.")
    inner = _without_partial(function)
    if isinstance(inner, type):
        raise TypeError(f"{role} is the class {inner.__name__}. Pass an instance: {inner.__name__}(…).")
    owner = inner.__self__ if inspect.ismethod(inner) else inner
    if _is_model(owner) and "completions" not in signature_of(inner).parameters:
        raise TypeError(f"{role} is {_described(owner)}, which does not take texts. {remedy}")
    for call in (inner, type(inner).__call__):
        if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
            raise TypeError(f"{role} {name_of(function)!r} yields its values one by one. Return them as a list.")


def check_signature(function: CostFunction, columns: Sequence[str]) -> None:
    """Check that a function can be called with these columns of the data set, without calling it.

    Raises:
        TypeError: if it cannot, naming the function, the parameter and the remedy.
    """
    name, signature = name_of(function), signature_of(function)
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
            f"{_remedy(missing, 'completions' in signature.parameters)}"
        ) from None


def _remedy(missing: list[str], takes_texts: bool) -> str:
    """What the user should change.

    Args:
        missing: the required parameters that the data set has no column for.
        takes_texts: whether there is a parameter for the completions.
    """
    if len(missing) == 1 and not takes_texts and missing[0] != "completion_ids":
        return (
            "A cost takes all completions at once, as def cost(prompts, completions, **columns), and returns one "
            f"number for each, such as [one({missing[0]}) for {missing[0]} in completions]."
        )
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


def signature_of(function: CostFunction) -> inspect.Signature:
    """The parameters of a function, or of a module's `forward`. Some functions written in C do not tell theirs."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:
        return inspect.signature(lambda *args, **kwargs: None)


def _is_model(value: Any) -> bool:
    """Whether something is a model, or another thing that `transformers` calls, such as a tokenizer or a pipeline."""
    return any(cls is nn.Module or cls.__module__.startswith("transformers.") for cls in type(value).__mro__)


def _described(value: Any) -> str:
    return f"{'the model' if isinstance(value, nn.Module) else 'a'} {type(value).__name__}"


def _without_partial(function: CostFunction) -> CostFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function
