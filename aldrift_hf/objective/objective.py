"""The objective `d(s)` of a run: cost functions called in batches, with every cost checked, stored and counted."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..types import Progress, Prompts, no_progress
from .calling import ObjectiveError
from .counts import Counts, hash_of
from .identity import identity_of
from .protocol import CostFunction, check_signature
from .store import Costs, CostStore, Key
from .validation import CostRangeError
from .weighted import Batch, WeightedCost
from .worker import Worker, finish_all

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 128
"""Completions per call of a cost function, unless specified."""


class Objective:
    """One cost function, or a weighted sum of several, that is evaluated once per prompt row and completion.

    Costs are kept in a [`CostStore`]: the same text for the same prompt row is evaluated once, whichever rung,
    evaluation or process asks for it. With several processes, each evaluates its share of the new completions, and all
    have the same costs afterwards.

    Completions can be handed over as soon as they are drawn ([`begin`]) and their costs asked for later ([`finish`]).
    In between, the functions run in a thread, one batch after the other. The thread, and the file of costs, are there
    from the first batch until the objective is closed ([`open`], [`close`]) or nobody uses it any more.

    Args:
        functions: one or more cost functions ([`aldrift_hf.objective`]).
        weights: a non-negative factor per function; `None` is 1 each.
        objective_range: D, an upper bound on the weighted cost; a higher cost is an error. `None` sets no bound.
        batch_size: completions per call.
        on_error: what happens where a function raises an exception or returns what is not a finite number. `"raise"`
            raises an error. `"worst"` evaluates what has failed once more, one completion at a time (all of a batch for
            which a function raised an exception), and what still fails costs D. A number outside of `[0, D]` is always
            an error.
        overlap: whether the functions run in a thread. Otherwise [`finish`] calls them, in the caller's thread.
        output_dir: the run's directory, where costs are written as soon as they are evaluated and where those of an
            earlier start are found; `None` keeps them in memory.
        cache_key: the identity of the objective in `output_dir`; `None` is a hash of the functions' content
            ([`aldrift_hf.objective.identity`]).
        progress: shows how many batches [`finish`] still waits for.

    Attributes:
        store: the costs evaluated so far.

    Raises:
        TypeError: without a cost function, or for something that is not one.
        ValueError: for weights that do not match, or `on_error="worst"` without `objective_range`.
    """

    def __init__(
        self,
        functions: CostFunction | Sequence[CostFunction],
        weights: Sequence[float] | None,
        objective_range: float | None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_error: str = "raise",
        overlap: bool = True,
        output_dir: str | None = None,
        cache_key: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self._cost = WeightedCost(functions, weights, objective_range)
        self._worst = self._cost.worst() if on_error == "worst" else None
        self.batch_size = batch_size
        self.overlap = overlap
        self.cache_key = cache_key
        self.progress = progress
        # The identity is that of the functions' present state: a function may count its calls, for example.
        identity = "" if output_dir is None else identity_of(self.functions, cache_key)
        about = json.dumps([self.names, self._cost.weights])
        self.store = CostStore(output_dir, identity, len(self.functions), about)
        self._worker: Worker | None = None
        self._opened = 0
        self._begun = _Begun()
        self._abandoned: dict[Key, int] = {}
        self._counts = Counts()

    @property
    def functions(self) -> list[CostFunction]:
        """The cost functions."""
        return self._cost.functions

    @property
    def names(self) -> list[str]:
        """The functions' names."""
        return self._cost.names

    @property
    def bound(self) -> float | None:
        """D, the upper bound that the user has set; `None` without one."""
        return self._cost.bound

    # ---- What a run counts -------------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Number of distinct (prompt row, completion) pairs that were first asked for since [`reset`].

        It includes those whose cost an earlier start of the run had evaluated.
        """
        return self._counts.calls

    @property
    def failures(self) -> int:
        """Number of distinct pairs since [`reset`] that cost `bound` because their evaluation failed."""
        return len(self._counts.failed)

    def reset(self) -> None:
        """Begin the counts of a new run. The costs stay in the store; what failed is evaluated again."""
        self._counts = Counts(before=self._counts)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts of the run, for a checkpoint: see [`Counts.state_dict`]. It holds no costs."""
        return self._counts.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue the counts of a run. A completion that failed in it costs `bound`, and is not counted again."""
        self._counts = Counts.from_state(state)

    # ---- Costs -------------------------------------------------------------------------------------------------------

    def check_signature(self, columns: Sequence[str]) -> None:
        """Check that every function can be called with these columns of the data set.

        Raises:
            TypeError: if one cannot, naming the function, the parameter and the remedy.
        """
        for function in self.functions:
            check_signature(function, columns)

    def __call__(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> Tensor:
        """The costs `[n]` (fp64) of `n` completions: [`begin`], then [`finish`]."""
        self.begin(prompts, rows, completions)
        return self.finish(prompts, rows, completions)

    def begin(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> None:
        """Start evaluating the completions that are new. All processes call this together with the same completions.

        Args:
            prompts: the run's prompts.
            rows: `[n]`, the prompt row of each completion.
            completions: `[n]`, decoded texts.

        Raises:
            ValueError, ObjectiveError: as [`finish`], for completions handed over before.
            OSError, ValueError: for costs on disk that cannot be read or are above `bound`.
        """
        if any(gather_object([self._begun.error is not None])):
            self._begun.jobs = [job for job in self._begun.jobs if isinstance(job, Future) and not job.cancel()]
            self.finish(prompts, [], [])
        self._load_store()
        new: dict[Key, int] = {}  # in order of first appearance, the same on all processes
        for index, key in enumerate(_keys(prompts, rows, completions)):
            if key in self._begun.asked:
                continue
            self._begun.asked[key] = hashed = hash_of(key)
            if key not in self.store:
                if not self._has_failed(hashed):
                    new[key] = index
            elif hashed not in self._counts.asked:
                # They may come from a run with another bound, or from another function under the same cache key.
                self._cost.check(self.store[key], rows[index], key[1])
                self._counts.add(hashed)
        state = PartialState()
        mine = list(new.items())[state.process_index :: state.num_processes]
        for start in range(0, len(mine), self.batch_size):
            keys, indices = zip(*mine[start : start + self.batch_size], strict=True)
            batch = Batch(keys, prompts, [rows[i] for i in indices], [completions[i] for i in indices])
            self._begun.jobs.append(self._submit(functools.partial(self._work, self._begun, batch)))

    def finish(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> Tensor:
        """Wait for the costs `[n]` (fp64) of `n` completions that were all handed to [`begin`].

        All processes call this together. If one of them meets an error, all raise, and the costs evaluated by then are
        in the store.

        Raises:
            ValueError: for an invalid cost, naming the function, the prompt row and the completion, or for a completion
                that no function judges.
            ObjectiveError: if a function raised an exception.
            OSError: if costs could not be written to disk.
        """
        begun = self._begun
        with self.progress("objective batches", len(begun.jobs)) as advance:
            finish_all(begun.jobs, advance)
        self._begun, error = _Begun(), begun.error
        self.store.share()
        failed: list[Key] = []
        failure, evaluated = begun.failure, 0
        texts = [None if caught is None else str(caught) for caught in (failure, error)]
        for keys, number, other_failure, message in gather_object([(begun.failed, begun.evaluated, *texts)]):
            failed += keys
            evaluated += number
            failure = failure or other_failure
            if message is not None and error is None:
                error = ObjectiveError(f"on another process: {message}")
        if failed and not evaluated and self._counts.nothing_evaluated and error is None:
            error = ObjectiveError(str(failure))  # on every process: the fault is not that of single completions
        self._count(begun.asked, failed)
        if error is not None:
            raise error
        if failed and PartialState().is_main_process:
            logger.warning(
                f"{len(failed):,} completions could not be evaluated and cost {self.bound:g}, the worst "
                f"(objective_on_error='worst'). One of the failures: {failure}"
            )
        costs = [self._cost.total(self._costs(key)) for key in _keys(prompts, rows, completions)]
        return torch.tensor(costs, dtype=torch.float64)

    def abandon(self) -> None:
        """Discard what was handed to [`begin`] since the last [`finish`]. A batch that is running still ends."""
        for job in self._begun.jobs:
            if isinstance(job, Future):
                job.cancel()
        self._abandoned |= self._begun.asked
        self._begun = _Begun()
        if PartialState().num_processes == 1:  # several share what they have evaluated when they begin again
            self._share_abandoned()

    def _share_abandoned(self) -> None:
        """Share and count what was evaluated before it was discarded. All processes call this together."""
        self.store.share()
        self._count(self._abandoned, [])
        self._abandoned = {}

    def components(self, prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> dict[str, float]:
        """The mean unweighted cost under each function, by name, over evaluated completions that the function judges.

        A function that judges none of them is left out.
        """
        costs = [self._costs(key) for key in _keys(prompts, rows, completions)]
        means = {}
        for name, column in zip(self.names, zip(*costs, strict=True), strict=True):
            judged = [cost for cost in column if cost is not None]
            if judged:
                means[name] = math.fsum(judged) / len(judged)
        return means

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """A context for work with the objective: leaving the outermost one closes it ([`close`]). All processes enter
        it together."""
        if not self._opened and any(gather_object([bool(self._abandoned)])):
            self._share_abandoned()
        self._opened += 1
        try:
            yield
        finally:
            self._opened -= 1
            if not self._opened:
                self.close()

    def close(self) -> None:
        """End the thread and close the file of costs, after discarding what [`finish`] was not called for."""
        self.abandon()
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self.store.close()

    def _load_store(self) -> None:
        """Read the costs of earlier starts, the first time, and say what was found."""
        loaded, folder = self.store.load(), self.store.folder
        if loaded is None or folder is None or not PartialState().is_main_process:
            return
        if self.cache_key is not None:
            limits = f"objective_cache_key={self.cache_key!r} says that the objective is the same"
            remedy = "If its costs have changed, choose another key or remove the folder."
        else:
            limits = (
                "Changes to the functions, and to the data and the models' weights that they refer to, are noticed; "
                "changes to files, services and installed packages are not"
            )
            remedy = "If they change the costs, remove the folder or set objective_cache_key."
        if loaded.found:
            logger.warning(f"{loaded.found:,} costs were found in {folder} and are used again. {limits}. {remedy}")
        elif loaded.others:
            logger.warning(
                f"{folder} holds {loaded.others:,} costs of other objectives, or of this one before its functions or "
                "their data changed. They are not used. Set objective_cache_key to keep the costs of an objective when "
                "its functions change but its costs do not."
            )
        elif self.cache_key is None:
            logger.info(f"Costs are kept in {folder} for the next start. {limits}. {remedy}")

    def _submit(self, job: Callable[[], None]) -> Future[None] | Callable[[], None]:
        if not self.overlap:
            return job
        if self._worker is None:
            self._worker = Worker()
        return self._worker.submit(job)

    def _work(self, begun: _Begun, batch: Batch) -> None:
        """Evaluate one batch and store its costs, in any thread. After an error no further batch is evaluated."""
        if begun.error is None:
            try:
                costs = self._evaluate_or_fail(begun, batch)
                self.store.add(costs, batch.rows_by_key())
                begun.evaluated += len(costs)
            except BaseException as error:  # finish raises it on all processes
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise
                begun.error = error

    def _evaluate_or_fail(self, begun: _Begun, batch: Batch) -> list[tuple[Key, Costs]]:
        """The costs of a batch, without those that fail: the first of these is then `begun.error`, or, with
        `on_error="worst"`, they are in `begun.failed`."""
        costs: list[tuple[Key, Costs]] = []
        errors: list[Exception] = []
        for single, found in zip(batch.singles(), self._outcomes(batch), strict=True):
            if self._worst is not None and isinstance(found, Exception) and not isinstance(found, CostRangeError):
                (found,) = self._outcomes(single)
            if not isinstance(found, Exception):
                costs.append((single.keys[0], found))
            elif self._worst is None or isinstance(found, CostRangeError):
                errors.append(found)
            else:
                begun.failure = found
                begun.failed.append(single.keys[0])
        begun.error = min(errors, key=lambda error: not isinstance(error, CostRangeError), default=None)
        alone = PartialState().num_processes == 1  # with several, `finish` knows what the others have met
        if alone and begun.failure and not (costs or errors or begun.evaluated) and self._counts.nothing_evaluated:
            raise begun.failure  # nothing was ever evaluated: the fault is not that of single completions
        return costs

    def _outcomes(self, batch: Batch) -> Sequence[Costs | Exception]:
        """The costs of each completion of a batch, or why it has none."""
        try:
            return self._cost.evaluate(batch)
        except (ValueError, ObjectiveError) as error:
            return [error] * len(batch.keys)

    def _costs(self, key: Key) -> Costs:
        """The costs under each function of a completion that was evaluated, or that failed."""
        if key not in self.store and self._worst is not None and self._has_failed(hash_of(key)):
            return self._worst
        return self.store[key]

    def _has_failed(self, hashed: int) -> bool:
        """Whether a completion costs the worst because its evaluation failed in this run."""
        return self._worst is not None and hashed in self._counts.failed

    def _count(self, asked: Mapping[Key, int], failed: Sequence[Key]) -> None:
        """Add to the run's counts the pairs that were asked for and have a cost."""
        self._counts.add_failures(failed)
        for key, hashed in asked.items():
            if hashed not in self._counts.asked and (key in self.store or self._has_failed(hashed)):
                self._counts.add(hashed)


@dataclass
class _Begun:
    """What was handed to [`Objective.begin`] since the last [`Objective.finish`].

    Attributes:
        asked: every pair with its hash.
        jobs: this process's batches.
        evaluated: number of costs that the jobs have stored.
        failed: the pairs whose evaluation failed, with `on_error="worst"`.
        failure: the newest error that was counted as a failure.
        error: the error that ends the evaluation.
    """

    asked: dict[Key, int] = field(default_factory=dict)
    jobs: list[Future[None] | Callable[[], None]] = field(default_factory=list)
    evaluated: int = 0
    failed: list[Key] = field(default_factory=list)
    failure: Exception | None = None
    error: BaseException | None = None


def _keys(prompts: Prompts, rows: Sequence[int], completions: Sequence[str]) -> list[Key]:
    return [(prompts.keys[row], text) for row, text in zip(rows, completions, strict=True)]
