"""The paper's ladder: equal steps."""

from __future__ import annotations

import math
from typing import ClassVar

from ...types import Proposals
from .base import Ladder, LadderSettings, LadderState

MAX_RUNGS = 100_000


def linear_ladder(tau_max: float, step: float) -> list[float]:
    """`step, 2·step, …, tau_max`: the paper's ladder (`step = 1/D`), its last step clipped to `tau_max` exactly.

    The rung `τ = 0` is left out: its target is the prior itself, so there is nothing to learn.

    Args:
        tau_max: the target's inverse temperature `T > 0`, in nats per unit of cost.
        step: `Δτ > 0`, in the same unit.

    Returns:
        The rungs in ascending order; at least one.

    Raises:
        ValueError: unless both are positive and finite, and make at most `MAX_RUNGS` rungs.
    """
    if not (0 < tau_max < math.inf and 0 < step < math.inf):
        raise ValueError(f"tau_max and the ladder's step must be positive and finite, got {tau_max} and {step}")
    if tau_max / step > MAX_RUNGS:
        raise ValueError(
            f"a ladder to tau_max={tau_max:g} in steps of {step:g} has {tau_max / step:.3g} rungs; at most "
            f"{MAX_RUNGS:,} are allowed. Set a larger tau_step (left out, it is 1/objective_range)."
        )
    # T/step may be a whole number up to rounding (6.0 / 0.1); a last sliver of a rung would only repeat the one before.
    rungs = max(1, math.ceil(tau_max / step - 1e-9))
    return [step * k for k in range(1, rungs)] + [tau_max]


class LinearLadder(Ladder):
    """Equal steps from 0 to T, whatever the weights; further rungs stay at T.

    Args:
        step: `Δτ`; `None` is the paper's `1/D`.
    """

    takes_step: ClassVar[bool] = True

    def __init__(self, step: float | None = None) -> None:
        self.step = step

    @classmethod
    def from_settings(cls, settings: LadderSettings) -> LinearLadder:
        return cls(settings.tau_step)

    def next_tau(self, state: LadderState, pool: Proposals) -> float:
        place, step = len(state.taus), self._step(state)
        if state.tau_max_error is not None:  # the ladder may have stood at an estimate of T that was too low
            return step * (math.floor(state.tau / step + 1e-9) + 1)
        taus = linear_ladder(state.tau_max, step)
        return taus[min(place, len(taus) - 1)]

    def num_rungs(self, state: LadderState) -> int | None:
        """How many rungs there are.

        Raises:
            ValueError: where neither the step nor D is known.
        """
        return None if state.tau_max_error is not None else len(linear_ladder(state.tau_max, self._step(state)))

    def _step(self, state: LadderState) -> float:
        if self.step is None and state.objective_range is None:
            raise ValueError("a linear ladder takes steps of 1/D: set tau_step, or objective_range (D)")
        return self.step or 1 / (state.objective_range or math.inf)
