"""Calling cost functions on one batch, with errors that name the function and the batch."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Any

from .event_loop import is_cancelled, is_foreign, wait_for
from .protocol import CostFunction, name_of

Arguments = Mapping[str, Sequence[Any]]
"""`prompts`, `completions` and the data set's other columns."""


class ObjectiveError(RuntimeError):
    """A cost function raised an exception, which is the `__cause__`. The message names the function and the batch."""


def call_functions(calls: Sequence[tuple[CostFunction, Arguments]]) -> list[Any]:
    """The results of all functions on one batch, as returned.

    The functions are called in this thread. Where one returns an awaitable, as an async function does, all of these
    run together on the process's event loop.

    Raises:
        ObjectiveError: if a function raises an exception.
    """
    batch = _described(calls[0][1]["completions"])  # before the functions may edit it
    results: list[Any] = []
    try:
        for function, arguments in calls:
            with _named_errors(function, batch, _hint(arguments)):
                results.append(_call(function, arguments))
    except BaseException:
        for result in filter(inspect.iscoroutine, results):
            result.close()  # it has not begun
        raise
    waiting = {index: result for index, result in enumerate(results) if inspect.isawaitable(result)}
    if waiting:
        awaited = wait_for([_await(calls[index][0], result, batch) for index, result in waiting.items()])
        for index, result in zip(waiting, awaited, strict=True):
            results[index] = result
    return results


def _call(function: CostFunction, arguments: Arguments) -> Any:
    """What a function returns. If it needs a running event loop (`asyncio.gather` in a function that is not async), an
    awaitable that calls it on the loop; or, if it runs the thread's loop itself, in a thread with a loop of its own."""

    def with_its_own_loop() -> Any:
        asyncio.set_event_loop(loop := asyncio.new_event_loop())
        try:
            return function(**arguments)
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    async def on_the_loop() -> Any:
        try:
            result = function(**arguments)
        except RuntimeError as error:
            if "already running" not in str(error):
                raise
            result = await asyncio.to_thread(with_its_own_loop)
        return await result if inspect.isawaitable(result) else result

    try:
        result = function(**arguments)
    except RuntimeError as error:
        if "no running event loop" in str(error) or "no current event loop" in str(error):
            return on_the_loop()
        raise
    if inspect.isawaitable(result) and is_foreign(result):
        result.cancel()  # type: ignore[attr-defined]
        return on_the_loop()
    return result


async def _await(function: CostFunction, awaitable: Awaitable[Any], batch: str) -> Any:
    with _named_errors(function, batch):
        return await awaitable


def _described(completions: Sequence[str]) -> str:
    return f"a batch of {len(completions)} completions, the first of which is {completions[0]!r}"


def _hint(arguments: Arguments) -> str:
    chat = any(isinstance(prompt, list) for prompt in arguments["prompts"])
    hint = (
        ". A cost gets each completion as a text, after chat prompts, too: for a reward that reads messages, as TRL's "
        "do, use from_reward(reward)"
        if chat
        else ""
    )
    if threading.current_thread() is threading.main_thread():
        return hint
    return hint + (
        ". The function ran in a thread, beside generation. If it works only in the main thread (signals, some "
        "database connections), set overlap_objective=False"
    )


@contextlib.contextmanager
def _named_errors(function: CostFunction, batch: str, hint: str = "") -> Iterator[None]:
    """Turns any exception into an [`ObjectiveError`] that says which function raised it, and for which batch.

    Some libraries raise exceptions that are no `Exception` (time-outs, panics in Rust). Only what ends the program, or
    the function, is passed on.
    """
    try:
        yield
    except BaseException as error:
        in_main = threading.current_thread() is threading.main_thread()
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if isinstance(error, asyncio.CancelledError) and is_cancelled():  # else the function's own task was
            raise
        if isinstance(error, KeyboardInterrupt) and in_main:
            raise
        raise ObjectiveError(
            f"objective {name_of(function)!r} raised {type(error).__name__}: {error} on {batch}{hint}"
        ) from error
