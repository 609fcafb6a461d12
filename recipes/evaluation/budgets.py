"""Budgets of problems that keep what was evaluated, and count it in their own way: by molecule, or by binding site."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol, cast

from transformers import TrainerCallback

from evaluation.baselines import CountedObjective


class KeepsEvaluated(Protocol):
    """Such a problem."""

    @property
    def evaluated(self) -> Sized:
        """What was evaluated."""
        ...


class EvaluationBudget(CountedObjective):
    """A peer's objective, which ends the training when its problem has evaluated enough."""

    @property
    def is_spent(self) -> bool:
        """Whether it is enough."""
        return self.limit is not None and len(cast(KeepsEvaluated, self.problem).evaluated) >= self.limit


class Spent(TrainerCallback):
    """Ends a run of ALDRIFT.

    Args:
        problem: the problem.
        budget: evaluations; a rung that spends them is not learned from.
        per_rung: evaluations of a rung, at most: one that could not be paid does not begin. 0 lets it.
    """

    def __init__(self, problem: KeepsEvaluated, budget: int, per_rung: int = 0) -> None:
        self.problem, self.budget, self.per_rung = problem, budget, per_rung

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= len(self.problem.evaluated) >= self.budget

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= len(self.problem.evaluated) + self.per_rung > self.budget
