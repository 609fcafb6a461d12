"""Choosing T: the inverse temperature at which `p_T` has what the user asked for.

The mean cost under `p_τ` falls with `τ`; the share of successes and `KL(p_τ‖L)` rise with it, for their slopes are
covariances with the cost under `p_τ`. So only one T has what is wanted. Every rung finds it by bisection, from its
weighted draws. The standard error of T is that of the figure at T, divided by the slope (delta method).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from ..types import Proposals
from . import diagnostics
from .errors import mean_error, variance_of_sum
from .ladders.base import LadderState

GOALS = ("target_cost", "target_success", "kl_budget")
"""Their names in the settings."""
DOUBLINGS = 40
"""T counts as infinite beyond `2^40 / D`: the draws do not have what is asked for."""


class Figure(NamedTuple):
    """An estimate for each of `P` prompts.

    Attributes:
        value: `[P]`.
        influence: `[P, n]`, that of each draw on it, to first order.
        slope: `[P]`, its derivative with respect to `τ`.
    """

    value: Tensor
    influence: Tensor
    slope: Tensor


@dataclass(frozen=True)
class Goal(ABC):
    """What `p_T` should have, on average over prompts.

    Attributes:
        wanted: the value.
        name: of the setting.
        rises: whether the figure rises with `τ`; otherwise it falls.
    """

    wanted: float
    name: ClassVar[str]
    rises: ClassVar[bool] = True

    @abstractmethod
    def figure(self, pool: Proposals, tau: float) -> Figure:
        """The figure of `p_τ`, from weighted draws."""

    def aim(self, state: LadderState, pool: Proposals) -> LadderState:
        """The state with T, and its standard error, as a rung's pool has it; infinite if no draw has what is wanted.

        Args:
            state: where the ladder stands.
            pool: the draws that the rung's samples will be chosen from.

        Raises:
            ValueError: on the first rung, if the prior has what is wanted.
        """
        if not state.taus and not self._lacks(pool, 0.0):
            raise ValueError(
                f"{self.name}={self.wanted:g} asks for less than the prior has, "
                f"{self.figure(pool, 0.0).value.mean():.4g}: there is nothing to optimise. Ask for more."
            )
        tau = self._solve(pool)
        return replace(state, tau_max=tau, tau_max_error=self._error(pool, tau))

    def _lacks(self, pool: Proposals, tau: float) -> bool:
        """Whether `p_τ` does not have it yet."""
        gap = self.wanted - self.figure(pool, tau).value.mean().item()
        return gap > 0 if self.rises else gap < 0

    def _solve(self, pool: Proposals) -> float:
        largest = pool.objective.max().item()
        low, high = 0.0, 1 / largest if largest else math.inf
        for _ in range(DOUBLINGS):
            if not self._lacks(pool, high):
                break
            low, high = high, 2 * high
        else:
            return math.inf
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self._lacks(pool, middle) else (low, middle)
        return high

    def _error(self, pool: Proposals, tau: float) -> float:
        if math.isinf(tau):
            return math.inf
        _, influence, slope = self.figure(pool, tau)
        steepness = abs(slope.mean().item())
        of_draws = influence.view(len(influence), -1, pool.texts_per_draw).sum(-1)
        return mean_error(variance_of_sum(of_draws).sqrt()) / steepness if steepness else math.inf


class TargetCost(Goal):
    """The mean cost under `p_T`, in units of the cost."""

    name = "target_cost"
    rises = False

    def figure(self, pool: Proposals, tau: float) -> Figure:
        return _mean(pool.objective, pool, tau)


@dataclass(frozen=True)
class TargetSuccess(Goal):
    """The share of `p_T` that costs at most a threshold.

    Attributes:
        threshold: in units of the cost.
    """

    threshold: float
    name = "target_success"

    def figure(self, pool: Proposals, tau: float) -> Figure:
        return _mean(pool.successes(self.threshold), pool, tau)


class KLBudget(Goal):
    """`KL(p_T‖L) = -T·E[d] - log Z_T`, nats."""

    name = "kl_budget"

    def figure(self, pool: Proposals, tau: float) -> Figure:
        cost, log_weight = _mean(pool.objective, pool, tau), pool.log_weight(tau)
        influence = -tau * cost.influence - log_weight.softmax(-1)
        return Figure(-tau * cost.value - diagnostics.log_z(log_weight), influence, -tau * cost.slope)


def _mean(values: Tensor, pool: Proposals, tau: float) -> Figure:
    """The mean of `values`, `[P, n]`, under `p_τ`; its slope is minus their covariance with the cost."""
    share = pool.log_weight(tau).softmax(-1)
    mean = (share * values).sum(-1)
    influence = share * (values - mean[:, None])
    return Figure(mean, influence, -(influence * pool.objective).sum(-1))
