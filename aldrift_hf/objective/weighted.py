"""Several cost functions as one: their weighted sum, on one batch of completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..types import Prompts, columns_of
from .calling import call_functions
from .protocol import CostFunction, name_of
from .store import Costs, Key
from .validation import check_bound, check_values


@dataclass(frozen=True)
class Batch:
    """Completions that the cost functions are called with at once.

    Attributes:
        keys: the identity of each completion in the store.
        prompts: the run's prompts.
        rows: the prompt row of each completion.
        completions: the decoded texts.
    """

    keys: Sequence[Key]
    prompts: Prompts
    rows: Sequence[int]
    completions: Sequence[str]

    def singles(self) -> Iterator[Batch]:
        """Batches of one completion each."""
        for key, row, text in zip(self.keys, self.rows, self.completions, strict=True):
            yield Batch([key], self.prompts, [row], [text])


class WeightedCost:
    """The weighted sum of cost functions.

    Args:
        functions: one or more cost functions.
        weights: a non-negative factor per function; `None` is 1 each.
        bound: D, an upper bound on the weighted sum; `None` sets no bound.

    Raises:
        TypeError: without a cost function.
        ValueError: for weights that do not match.
    """

    def __init__(
        self,
        functions: CostFunction | Sequence[CostFunction],
        weights: Sequence[float] | None,
        bound: float | None,
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
        self.bound = bound

    def evaluate(self, batch: Batch) -> list[Costs]:
        """The checked costs of a batch under each function, `[n][functions]`.

        Raises:
            ValueError: for an invalid cost.
            ObjectiveError: if a function raises an exception.
        """
        completions = list(batch.completions)
        arguments = {
            "prompts": [batch.prompts.rows[row]["prompt"] for row in batch.rows],
            "completions": completions,
            **columns_of(batch.prompts, batch.rows),
        }
        results = call_functions(self.functions, arguments)
        checked = [
            check_values(name, values, batch.rows, batch.completions)
            for name, values in zip(self.names, results, strict=True)
        ]
        costs = [list(values) for values in zip(*checked, strict=True)]
        for row, text, values in zip(batch.rows, batch.completions, costs, strict=True):
            self.check_bound(values, row, text)
        return costs

    def total(self, costs: Costs) -> float:
        """The weighted sum of the functions' costs."""
        return math.fsum(weight * cost for weight, cost in zip(self.weights, costs, strict=True))

    def worst(self) -> Costs:
        """Equal costs under each function that sum to `bound`."""
        weight = math.fsum(self.weights)
        if self.bound is None or weight == 0:
            raise ValueError("objective_on_error='worst' needs objective_range, the worst cost, and a positive weight")
        return [self.bound / weight] * len(self.functions)

    def check_bound(self, costs: Costs, row: int, completion: str) -> None:
        """Raise a `ValueError` if the weighted sum is above `bound`."""
        check_bound(" + ".join(self.names), self.total(costs), self.bound, row, completion)
