"""Calling cost functions on one batch, with errors that name the function and the batch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .protocol import CostFunction, is_async, name_of


class ObjectiveError(RuntimeError):
    """A cost function raised an exception, which is the `__cause__`. The message names the function and the batch."""


def call_functions(functions: Sequence[CostFunction], arguments: Mapping[str, Any]) -> list[Any]:
    """The results of all functions on one batch, as returned. The async functions run concurrently on one event loop.

    Args:
        functions: the cost functions.
        arguments: `prompts`, `completions` and the data set's other columns.

    Raises:
        ObjectiveError: if a function raises an exception.
    """
    completions = arguments["completions"]

    async def call_async(function: CostFunction) -> Any:
        with _named_errors(function, completions):
            return await function(**arguments)

    async def call_all_async() -> list[Any]:
        return await asyncio.gather(*(call_async(function) for function in functions if is_async(function)))

    async_results: list[Any] = []
    if any(map(is_async, functions)):
        if threading.current_thread() is not threading.main_thread():
            async_results = asyncio.run(call_all_async())
        else:  # in another thread, because an event loop may already be running in this one, as in a notebook
            with ThreadPoolExecutor(max_workers=1) as pool:
                async_results = pool.submit(asyncio.run, call_all_async()).result()
    remaining = iter(async_results)
    results = []
    for function in functions:
        if is_async(function):
            results.append(next(remaining))
        else:
            with _named_errors(function, completions):
                results.append(function(**arguments))
    return results


@contextlib.contextmanager
def _named_errors(function: CostFunction, completions: Sequence[str]) -> Iterator[None]:
    """Turns any exception into an [`ObjectiveError`] that says which function raised it, and for which batch."""
    try:
        yield
    except Exception as error:
        hint = (
            ""
            if threading.current_thread() is threading.main_thread()
            else ". The function ran in a thread, beside generation. If it works only in the main thread (signals, "
            "some database connections), set overlap_objective=False"
        )
        raise ObjectiveError(
            f"objective {name_of(function)!r} raised {type(error).__name__}: {error} on a batch of {len(completions)} "
            f"completions, the first of which is {completions[0]!r}{hint}"
        ) from error
