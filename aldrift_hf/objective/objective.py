"""The objective `d(s)`: a black box on text, called in batches, checked, cached and counted.

A cost function has the shape

    def cost(prompts, completions, **columns) -> list[float]

where `prompts` are the data set's prompts as they are, `completions` the decoded texts, and `columns` the data set's
other columns, all of one length. Lower is better and 0 is perfect; values lie in `[0, D]`. It may be `async`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import numbers
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..reporting.progress import Bars
from ..types import Prompts, columns_of
from .store import Journal, Key

logger = logging.getLogger(__name__)

OBJECTIVE_BATCH = 128
"""Completions a call of the objective, unless told otherwise."""

CostFunction = Callable[..., Any]


class ObjectiveError(RuntimeError):
    """A cost function raised; the message names it and the batch, the cause hangs on `__cause__`."""


def from_reward(
    reward: CostFunction, best: float = 1.0, tokenizer: PreTrainedTokenizerBase | None = None
) -> CostFunction:
    """A cost from a reward function of TRL's shape (higher is better): `best - reward`.

    Args:
        reward: takes `prompts`, `completions` and the data set's columns, and returns a list of floats, as for TRL's
            `GRPOTrainer(reward_funcs=...)`. Sync or async. With chat prompts it gets each completion as a list of one
            assistant message, as TRL hands it over; those of `trl.rewards` that read text want chat prompts.
            `None`, which in TRL leaves a reward out for a row, is no cost: leave such rows out of the data set. Of
            what TRL's trainers hand over besides, `trainer_state`, `log_extra`, `log_metric` and `environments` do not
            exist here.
        best: the highest reward there is. A reward above it would give a negative cost, which training refuses.
        tokenizer: for rewards that take `completion_ids`: each text's tokens, without an end-of-text token. They are
            made of the text, for that is what a cost is a function of: a text that was drawn in other tokens has the
            same cost.

    Returns:
        A cost function under the reward's name.
    """

    def arguments(prompts: list[Any], completions: list[str]) -> dict[str, Any]:
        chat = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        ids = (
            {} if tokenizer is None else {"completion_ids": tokenizer(completions, add_special_tokens=False).input_ids}
        )
        return {"prompts": prompts, "completions": chat, **ids}

    def costs(rewards: Sequence[Any]) -> list[Any]:
        # What is no number goes through as it is: the objective's own check then names the row.
        return [best - value if isinstance(value, numbers.Real) else value for value in rewards]

    if _is_async(reward):

        async def cost(prompts: list[Any], completions: list[str], **columns: Any) -> list[Any]:
            return costs(await reward(**arguments(prompts, completions), **columns))
    else:

        def cost(prompts: list[Any], completions: list[str], **columns: Any) -> list[Any]:  # type: ignore[misc]
            return costs(reward(**arguments(prompts, completions), **columns))

    cost.__name__ = name_of(reward)
    # What the reward asks for, the trainer is to look for in the data set.
    signature = inspect.signature(reward)
    if tokenizer is not None:
        try:
            signature = inspect.signature(functools.partial(reward, completion_ids=None))
        except ValueError:
            raise TypeError(f"reward {cost.__name__!r} takes no completion_ids: leave tokenizer out") from None
    cost.__signature__ = signature  # type: ignore[attr-defined]
    return cost


class Objective:
    """One cost function, or a weighted sum of several, behind a cache.

    Values are cached by (prompt row, completion): the same text for the same row is never paid for twice, whatever
    rung, evaluation or process asks. Under several processes each evaluates its share of what is new, and all end up
    with the same cache.

    Completions can be handed over as they are drawn ([`begin`]) and their costs asked for later ([`finish`]): the
    functions then run in a thread, one batch after the other, while the caller goes on.

    Args:
        functions: one or more cost functions.
        weights: as many non-negative factors; `None` means 1 each.
        objective_range: `D`; a weighted cost above it is refused. `None` checks no upper bound.
        batch_size: completions a call.
        on_error: `"raise"`, or `"worst"`: where a function raises or gives what is no cost, the batch is asked for
            again one by one, and what fails by itself costs `objective_range`.
        overlap: whether to run beside the caller; otherwise [`finish`] does all the work, in the caller's thread.
        output_dir: where costs are written down as they are paid for, and those of an earlier start are found (see
            [`aldrift_hf.objective.store`]); `None`: nowhere.
        bars: show the calls that [`finish`] waits for.
    """

    def __init__(
        self,
        functions: CostFunction | Sequence[CostFunction],
        weights: Sequence[float] | None,
        objective_range: float | None,
        batch_size: int = OBJECTIVE_BATCH,
        on_error: str = "raise",
        overlap: bool = True,
        output_dir: str | None = None,
        bars: Bars | None = None,
    ) -> None:
        self.functions: list[CostFunction] = list(functions) if isinstance(functions, (list, tuple)) else [functions]  # type: ignore[list-item]
        if not self.functions or not all(callable(function) for function in self.functions):
            raise TypeError("objective must be a cost function, or a list of at least one")
        self.names = [name_of(function) for function in self.functions]
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"objective_weights has {len(self.weights)} entries for {len(self.functions)} objectives ({self.names})"
            )
        self.objective_range = objective_range
        self.batch_size = batch_size
        self.on_error = on_error
        self.failures = 0
        """Completions so far that cost `objective_range` because they could not be priced."""
        self._journal = None if output_dir is None else Journal(output_dir, self.functions)
        self._paid: dict[Key, list[float]] | None = None if self._journal else {}
        """What the journal had; `None` before it was read."""
        self.bars = Bars(shown=False) if bars is None else bars
        self.cache: dict[Key, list[float]] = {}
        self._worker = _Worker() if overlap else None
        self._begun = _Begun()

    @property
    def calls(self) -> int:
        """Distinct (prompt row, completion) pairs evaluated so far."""
        return len(self.cache)

    @property
    def best(self) -> float:
        """The lowest cost seen so far."""
        return min(map(self._total, self.cache.values()), default=math.inf)

    def check_signature(self, columns: Sequence[str]) -> None:
        """Refuse, before anything is computed, a function that could not be called with the data set's columns.

        Raises:
            TypeError: naming the function and what it lacks.
        """
        for name, function in zip(self.names, self.functions, strict=True):
            signature = inspect.signature(function)
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
                    f"objective {name!r} cannot be called as {name}({', '.join(f'{each}=…' for each in given)}): "
                    f"{error}. {_remedy(missing)}"
                ) from None

    def __call__(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> Tensor:
        """Costs `[n]` (fp64) of `n` completions, `rows[i]` being the prompt of completion `i`; raises as [`finish`]."""
        self.begin(prompts, rows, completions)
        return self.finish(prompts, rows, completions)

    def begin(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> None:
        """Start on this process's share of the completions that are new. All processes begin with the same ones.

        Raises:
            As [`finish`], for what was begun before.
        """
        if any(gather_object([self._begun.error is not None])):
            self._begun.jobs = [job for job in self._begun.jobs if isinstance(job, Future) and not job.cancel()]
            self.finish(prompts, [], [])
        new: dict[Key, int] = {}  # in order of first appearance, the same on every process
        for index, key in enumerate(self._keys(prompts, rows, completions)):
            if key not in self.cache and key in self._paid_before:
                self._check_range(key[1], rows[index], self._paid_before[key])
                self.cache[key] = self._paid_before[key]
            if key not in self.cache and key not in self._begun.asked:
                new.setdefault(key, index)
        self._begun.asked.update(new)
        state = PartialState()
        mine = list(new.items())[state.process_index :: state.num_processes]
        for start in range(0, len(mine), self.batch_size):
            keys, indices = zip(*mine[start : start + self.batch_size], strict=True)
            batch = (keys, prompts, [rows[i] for i in indices], [completions[i] for i in indices])
            job = functools.partial(self._work, self._begun, *batch)
            self._begun.jobs.append(job if self._worker is None else self._worker.submit(job))

    def finish(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> Tensor:
        """Costs `[n]` (fp64) of `n` completions, all of which went through [`begin`], once they are there.

        Raises:
            ValueError: for a value that is no cost, naming the objective, the row and the completion.
            ObjectiveError: when a function raised.
            All processes raise, whichever of them met the error; what others had evaluated is in the cache.
        """
        begun = self._begun
        with self.bars.task("batches priced", len(begun.jobs)) as advance:
            for job in begun.jobs:
                job.result() if isinstance(job, Future) else job()
                advance(1)
        self._begun, error = _Begun(), begun.error
        failed = 0
        for shared, unpriced, message in gather_object(
            [(begun.found, begun.failed, None if error is None else str(error))]
        ):
            self.cache.update(shared)
            self.cache.update(unpriced)
            failed += len(unpriced)
            if message is not None and error is None:
                error = ObjectiveError(f"on another process: {message}")
        if error is not None:
            raise error
        if failed:
            self.failures += failed
            logger.warning(
                f"{failed:,} completions could not be priced and count as cost {self.objective_range:g}, the worst "
                f"(objective_on_error='worst'); the newest failure: {begun.why}"
            )
        keys = self._keys(prompts, rows, completions)
        return torch.tensor([self._total(self.cache[key]) for key in keys], dtype=torch.float64)

    def abandon(self) -> None:
        """Forget what was begun and not finished; what stands in line is not begun any more."""
        for job in self._begun.jobs:
            if isinstance(job, Future):
                job.cancel()
        if PartialState().num_processes == 1:  # what was paid for is kept; on several processes all caches are alike
            self.cache.update(self._begun.found)
        self._begun = _Begun()

    def components(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> dict[str, float]:
        """Mean unweighted cost of each objective over completions that were evaluated before."""
        values = torch.tensor(
            [self.cache[prompts.keys[row], text] for row, text in zip(rows, completions, strict=True)]
        )
        return dict(zip(self.names, values.mean(0).tolist(), strict=True))

    @property
    def _paid_before(self) -> dict[Key, list[float]]:
        """Of an earlier start of this run, or of one like it; all processes ask at once, the first time."""
        if self._paid is None:
            self._paid = cast(Journal, self._journal).read()
            if self._paid and PartialState().is_main_process:
                folder = cast(Journal, self._journal).folder
                logger.warning(
                    f"{len(self._paid):,} costs were found in {folder} and will not be paid for again. Remove the "
                    "folder to evaluate anew, as when what the cost reads has changed."
                )
        return self._paid

    def _keys(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> list[Key]:
        return [(prompts.keys[row], text) for row, text in zip(rows, completions, strict=True)]

    def _work(
        self, begun: _Begun, keys: Sequence[Key], prompts: Prompts, rows: list[int], completions: list[str]
    ) -> None:
        """One batch, in whichever thread; after an error nothing more is evaluated."""
        if begun.error is None:
            try:
                found = self._priced(begun, keys, prompts, rows, completions)
                if self._journal is not None:
                    self._journal.write(found)
                begun.found += found
            except (Exception, SystemExit, asyncio.CancelledError) as error:  # all processes are to hear of it
                begun.error = error

    def _priced(
        self, begun: _Begun, keys: Sequence[Key], prompts: Prompts, rows: list[int], completions: list[str]
    ) -> list[tuple[Key, list[float]]]:
        """A batch's keys with their costs, without those that failed and go into `begun.failed`."""
        try:
            return list(zip(keys, self._evaluate(prompts, rows, completions), strict=True))
        except (ValueError, ObjectiveError) as error:
            if self.on_error == "raise":
                raise
            begun.why = error
        priced: list[tuple[Key, list[float]]] = []
        worst = [cast(float, self.objective_range) / math.fsum(self.weights)] * len(self.functions)
        for key, row, text in zip(keys, rows, completions, strict=True):
            try:
                priced.append((key, self._evaluate(prompts, [row], [text])[0]))
            except (ValueError, ObjectiveError) as error:
                begun.why = error
                begun.failed.append((key, worst))
        if not (priced or begun.found or self.cache):
            raise begun.why  # not one was ever priced: this is no matter of single texts
        return priced

    def _total(self, values: Sequence[float]) -> float:
        return math.fsum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def _evaluate(self, prompts: Prompts, rows: list[int], completions: list[str]) -> list[list[float]]:
        """Checked values of every function for one batch: `[n][functions]`."""
        arguments = {
            "prompts": [prompts.rows[row]["prompt"] for row in rows],
            "completions": completions,
            **columns_of(prompts, rows),
        }
        results = call_all(list(zip(self.names, self.functions, strict=True)), arguments)
        checked = [
            check_values(name, result, rows, completions) for name, result in zip(self.names, results, strict=True)
        ]
        values = [list(row) for row in zip(*checked, strict=True)]
        for row, text, value in zip(rows, completions, values, strict=True):
            self._check_range(text, row, value)
        return values

    def _check_range(self, text: str, row: int, value: Sequence[float]) -> None:
        total = self._total(value)
        if self.objective_range is not None and total > self.objective_range * (1 + 1e-9):
            raise ValueError(
                f"objective {' + '.join(self.names)!r} gave {total} for row {row}, above objective_range="
                f"{self.objective_range}: completion {text!r}. Raise objective_range, or cap the cost."
            )


class _Worker:
    """Runs one job after the other in a thread that does not outlive the process, as an executor's would."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="aldrift-objective", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self.jobs.put((future, job))
        return future

    def _run(self) -> None:
        while True:
            future, job = self.jobs.get()
            if future.set_running_or_notify_cancel():
                job()
                future.set_result(None)


@dataclass
class _Begun:
    """What was handed over since the last [`Objective.finish`]; all but the first two are written by the thread."""

    asked: set[Key] = field(default_factory=set)
    jobs: list[Future[None] | Callable[[], None]] = field(default_factory=list)
    found: list[tuple[Key, list[float]]] = field(default_factory=list)
    failed: list[tuple[Key, list[float]]] = field(default_factory=list)
    why: Exception | None = None
    error: BaseException | None = None


def call_all(functions: list[tuple[str, CostFunction]], arguments: dict[str, Any]) -> list[Any]:
    """The results of all functions on one batch; the async ones run together on one event loop."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*(guard(name, fn) for name, fn in functions if _is_async(fn)))

    async def guard(name: str, function: CostFunction) -> Any:
        with _Named(name, arguments["completions"]):
            return await function(**arguments)

    pending: list[Any] = []
    if any(_is_async(function) for _, function in functions):
        if threading.current_thread() is not threading.main_thread():
            pending = asyncio.run(gather())
        else:  # in a thread of its own: the caller may sit in a running loop already, as in a notebook
            with ThreadPoolExecutor(max_workers=1) as pool:
                pending = pool.submit(asyncio.run, gather()).result()
    awaited = iter(pending)
    results = []
    for name, function in functions:
        if _is_async(function):
            results.append(next(awaited))
        else:
            with _Named(name, arguments["completions"]):
                results.append(function(**arguments))
    return results


class _Named:
    """Any exception inside becomes an [`ObjectiveError`] that says which objective raised and on what."""

    def __init__(self, name: str, completions: list[str]) -> None:
        self.name, self.completions = name, completions

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            hint = (
                ""
                if threading.current_thread() is threading.main_thread()
                else ". It ran in a thread, beside generation; what works in the main thread alone (signals, some "
                "database connections) wants overlap_objective=False"
            )
            raise ObjectiveError(
                f"objective {self.name!r} raised {type(error).__name__}: {error} on a batch of "
                f"{len(self.completions)} completions, the first being {self.completions[0]!r}{hint}"
            ) from error


def _remedy(missing: list[str]) -> str:
    """What to do about a function that cannot be called, and about the parameters of it that nothing fills."""
    if not missing:
        return "Add **columns to its parameters, or drop the column from the data set."
    if "completion_ids" in missing:
        return "Wrap the reward in from_reward(…, tokenizer=…), which makes completion_ids of the texts."
    if missing[0] in ("trainer_state", "log_extra", "log_metric", "environments"):
        return (
            f"TRL's trainers hand {missing[0]} to rewards, ALDRIFTTrainer does not: a cost is a function of the text. "
            "Give the parameter a default."
        )
    return f"Add a column {missing[0]!r} to the data set, or give the parameter a default."


def _unwrapped(function: CostFunction) -> CostFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: CostFunction) -> str:
    """A function's name; the class's for a callable object."""
    inner = _unwrapped(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _is_async(function: CostFunction) -> bool:
    """Whether a call returns a coroutine; an object can be async in its `__call__` alone."""
    inner = _unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def check_values(name: str, values: Any, rows: list[int], completions: list[str]) -> list[float]:
    """The values as floats, once each of them is a cost."""
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(
            f"objective {name!r} must return a list of one number for each completion: got {got} for "
            f"{len(completions)} completions (rows {rows[0]} to {rows[-1]}, the first completion {completions[0]!r})"
        )
    for value, row, text in zip(values, rows, completions, strict=True):
        problem = _problem(value)
        if problem:
            raise ValueError(f"objective {name!r} gave {value!r} for row {row}, {problem}: completion {text!r}")
    return [float(value) for value in values]


def _problem(value: Any) -> str | None:
    if value is None:
        return (
            "which is not a number (a reward's None says that it does not apply: leave such rows out of the data set)"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "which is not a number"
    if math.isnan(value):
        return "which is NaN"
    if math.isinf(value):
        return "which is infinite (give malformed text the worst finite cost, D)"
    if value < 0:
        return "which is negative (0 is the best cost; for a reward use from_reward(fn, best=…))"
    return None
