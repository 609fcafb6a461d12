"""The temperature ladder: which inverse temperatures `τ` lead from the prior to the target."""

from __future__ import annotations

import math


def linear_ladder(tau_max: float, step: float) -> list[float]:
    """`step, 2·step, …, tau_max`: the paper's ladder (`step = 1/D`), its last step clipped to `tau_max` exactly.

    The rung `τ = 0` is left out: there the target is the prior itself, and nothing is to be learnt.

    Args:
        tau_max: the target's inverse temperature `T > 0`, in nats per unit of cost.
        step: `Δτ > 0`, in the same unit.

    Returns:
        The rungs in ascending order; at least one.

    Raises:
        ValueError: unless both are positive and finite.
    """
    if not (0 < tau_max < math.inf and 0 < step < math.inf):
        raise ValueError(f"tau_max and the ladder's step must be positive and finite, got {tau_max} and {step}")
    # T/step may be a whole number up to rounding (6.0 / 0.1); a last sliver of a rung would only repeat the one before.
    rungs = max(1, math.ceil(tau_max / step - 1e-9))
    return [step * k for k in range(1, rungs)] + [tau_max]
