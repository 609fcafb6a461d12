"""Several cost functions as one: their weighted sum, on one batch of completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..types import Prompts, columns_of
from .calling import call_functions
from .copies import copies_of
from .protocol import CostFunction, check_function, unique_names
from .store import Costs, Key
from .validation import CostRangeError, Value, above_bound, check_values, not_judged


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

    def rows_by_key(self) -> dict[str, dict[str, Any]]:
        """The prompts' rows, by what stands for them in the keys."""
        return {key[0]: self.prompts.rows[row] for key, row in zip(self.keys, self.rows, strict=True)}

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
        TypeError: without a cost function, or for what is none.
        ValueError: for weights that do not match.
    """

    def __init__(
        self,
        functions: CostFunction | Sequence[CostFunction],
        weights: Sequence[float] | None,
        bound: float | None,
    ) -> None:
        self.functions: list[CostFunction] = list(functions) if isinstance(functions, (list, tuple)) else [functions]  # type: ignore[list-item]
        if not self.functions:
            raise TypeError("objective must be a cost function, or a list of at least one, but is empty.")
        for function in self.functions:
            check_function(function)
        self.names = unique_names(self.functions)
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"objective_weights has {len(self.weights)} entries for {len(self.functions)} objectives ({self.names})"
            )
        self.bound = bound

    def evaluate(self, batch: Batch) -> list[Costs | ValueError]:
        """The checked costs of each completion of a batch under each function, or the error that says why it has none:
        an invalid cost (a [`CostRangeError`] for one below 0, or a weighted sum above D, by more than rounding), or no
        function that judges it. Each function gets copies to itself.

        Raises:
            ValueError: if a function does not return one value per completion.
            ObjectiveError: if a function raises an exception.
        """
        completions = list(batch.completions)
        arguments = {
            "prompts": [batch.prompts.rows[row]["prompt"] for row in batch.rows],
            "completions": completions,
            **columns_of(batch.prompts, batch.rows),
        }
        results = call_functions([(function, copies_of(arguments)) for function in self.functions])
        return self._checked(results, batch.rows, batch.completions)

    def total(self, costs: Costs) -> float:
        """The weighted sum of the functions' costs, without those that do not judge the completion; in `[0, D]`."""
        return min(self._sum(costs), math.inf if self.bound is None else self.bound)

    def worst(self) -> Costs:
        """Equal costs under each function that sum to `bound`."""
        weight = math.fsum(self.weights)
        if self.bound is None or weight == 0:
            raise ValueError("objective_on_error='worst' needs objective_range, the worst cost, and a positive weight")
        return [self.bound / weight] * len(self.functions)

    def check(self, costs: Costs, row: int, completion: str) -> Costs:
        """Check costs that were evaluated under other settings, such as another bound, as [`evaluate`] does.

        Raises:
            ValueError: for those that [`evaluate`] would not accept.
        """
        (checked,) = self._checked([[cost] for cost in costs], [row], [completion])
        if isinstance(checked, ValueError):
            raise checked
        return checked

    def _checked(
        self, results: Sequence[Any], rows: Sequence[int], completions: Sequence[str]
    ) -> list[Costs | ValueError]:
        """What each function returned, as the costs of each completion, `[functions]`, or an error."""
        columns: list[Sequence[Value]] = []
        failure = None
        for name, weight, values in zip(self.names, self.weights, results, strict=True):
            try:
                columns.append(check_values(name, values, rows, completions, weight, self.bound))
            except ValueError as error:  # raised below, unless another function's cost is out of range
                columns.append([None] * len(completions))
                failure = failure or error
        checked: list[Costs | ValueError] = []
        for row, text, values in zip(rows, completions, zip(*columns, strict=True), strict=True):
            costs: Costs = [None if isinstance(value, ValueError) else value for value in values]
            faults = [value for value in values if isinstance(value, ValueError)]
            if above := above_bound(" + ".join(self.names), self._sum(costs), self.bound, row, text):
                faults.append(above)
            faults.sort(key=lambda fault: not isinstance(fault, CostRangeError))  # one that never becomes a cost
            judged = [weight for weight, cost in zip(self.weights, costs, strict=True) if cost is not None]
            if faults:
                checked.append(faults[0])
            elif not judged or (any(self.weights) and not any(judged)):
                checked.append(not_judged(self.names, row, text))
            else:
                checked.append(costs)
        if failure is not None:
            raise next((found for found in checked if isinstance(found, CostRangeError)), failure)
        return checked

    def _sum(self, costs: Costs) -> float:
        return weighted_sum(self.weights, costs)


def weighted_sum(weights: Sequence[float], costs: Costs) -> float:
    """The sum of a completion's costs under all functions that judge it."""
    return math.fsum(weight * cost for weight, cost in zip(weights, costs, strict=True) if cost is not None)
