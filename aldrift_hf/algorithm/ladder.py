"""The temperature ladder: which inverse temperatures `τ` lead from the prior to the target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .diagnostics import effective_sample_size

ADAPTIVE_RUNGS = 200
"""Most rungs of an adaptive ladder for which no number is asked."""
PATIENCE = 3
"""Rungs at one `τ` after which an adaptive ladder gives up: learning did not make the next step possible."""
MOST_RUNGS = 100_000


def linear_ladder(tau_max: float, step: float) -> list[float]:
    """`step, 2·step, …, tau_max`: the paper's ladder (`step = 1/D`), its last step clipped to `tau_max` exactly.

    The rung `τ = 0` is left out: there the target is the prior itself, and nothing is to be learnt.

    Args:
        tau_max: the target's inverse temperature `T > 0`, in nats per unit of cost.
        step: `Δτ > 0`, in the same unit.

    Returns:
        The rungs in ascending order; at least one.

    Raises:
        ValueError: unless both are positive and finite, and make no more than `MOST_RUNGS`.
    """
    if not (0 < tau_max < math.inf and 0 < step < math.inf):
        raise ValueError(f"tau_max and the ladder's step must be positive and finite, got {tau_max} and {step}")
    if tau_max / step > MOST_RUNGS:
        raise ValueError(
            f"a ladder to tau_max={tau_max:g} in steps of {step:g} has {tau_max / step:.3g} rungs, more than anyone "
            f"climbs ({MOST_RUNGS:,}). Set a larger tau_step (it is 1/objective_range where it is left out)."
        )
    # T/step may be a whole number up to rounding (6.0 / 0.1); a last sliver of a rung would only repeat the one before.
    rungs = max(1, math.ceil(tau_max / step - 1e-9))
    return [step * k for k in range(1, rungs)] + [tau_max]


def adaptive_tau(log_ratio: Tensor, objective: Tensor, tau: float, tau_max: float, least_draws: float) -> float:
    """The largest `τ'` up to which the effective sample size of the full weights stays above a threshold.

    With `ℓ_τ'(s) = log L(s) - τ'·d(s) - log q(s)`, the mean over prompts of Kish's effective sample size
    `(Σ w)² / Σ w²` is followed from `τ` upwards to where it first falls below `least_draws`, to 1e-6 of `T - τ`. The
    weights are those against the model that drew, not against `p_τ`: what the model has not learnt yet counts.

    Args:
        log_ratio: `[P, n]`, `log L - log q` of the draws, nats.
        objective: `[P, n]`, costs.
        tau: where the ladder stands.
        tau_max: T.
        least_draws: the threshold, in draws a prompt.

    Returns:
        A value in `[τ, T]`; `τ` itself where the effective sample size is below the threshold already there.
    """

    def enough(at: float) -> bool:
        share = effective_sample_size(log_ratio - at * objective).mean().item()
        return bool(share * objective.shape[-1] >= least_draws)

    # In steps first: with full weights the effective sample size need not fall evenly.
    grid: list[float] = torch.linspace(tau, tau_max, 65, dtype=torch.float64).tolist()
    fallen = next((step for step, at in enumerate(grid) if not enough(at)), None)
    if fallen is None:
        return tau_max
    if fallen == 0:
        return tau
    low, high = grid[fallen - 1], grid[fallen]
    while high - low > 1e-6 * (tau_max - tau):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low
