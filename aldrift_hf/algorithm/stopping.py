"""When a run is done: the model is close to `p_T`, or it no longer comes closer.

Both are judged by what a rung's fresh draws say of the model that drew them, and so by one that has not yet learned
from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

RUNGS_CLOSE = 2
"""Rungs on which the model must be close, one after the other: one alone may be luck."""
MOST_ERROR = 0.2
"""Standard error of the missing mass, nats, up to which it says something: that of a few draws is near 0 by chance."""
RUNGS_COMPARED = 4
"""The last third of the rungs at T, at least as many, is compared with as many before it, so that single rungs' noise
does not decide."""
LEAST_GAIN = 0.1
"""The run ends if they have come closer by less than this share of the distance, the standard error included."""

Figures = Mapping[str, float]
"""A rung's: `tau`, `tau_max`, `ess` (a share), `missing_mass` and `kl_to_target` (nats), and their errors `…_error`."""


def done(rungs: Sequence[Figures], target_ess: float, groups: int = 1) -> str | None:
    """Why a run that may stay at T for as long as it likes is done, as a sentence; `None` to go on.

    Args:
        rungs: all rungs so far.
        target_ess: effective sample size of fresh draws from which on the model is close, as a share of them.
        groups: rungs per epoch over the prompts. Whole epochs are compared, which are of the same prompts.
    """
    at_target = [figures for figures in rungs if figures["tau"] == figures["tau_max"]]
    last = at_target[-RUNGS_CLOSE:]
    if len(last) == RUNGS_CLOSE and all(is_close(figures, target_ess) for figures in last):
        return (
            f"The model is close to p_T: on {RUNGS_CLOSE} rungs running, its draws were worth at least {target_ess:g} "
            f"independent ones each (ESS/n {last[-1]['ess']:.2f}), and the missing mass was within its standard error "
            f"of 0 ({last[-1]['missing_mass']:.3f} ± {last[-1]['missing_mass_error']:.3f} nats)."
        )
    compared = groups * math.ceil(max(RUNGS_COMPARED, len(at_target) // 3) / groups)
    if len(at_target) < 2 * compared:
        return None
    before, after = (_mean_kl(part) for part in (at_target[-2 * compared : -compared], at_target[-compared:]))
    error = (before[1] ** 2 + after[1] ** 2) ** 0.5
    gain = before[0] - after[0]
    # Infinite if a draw has probability 0 under the prior.
    if not (math.isfinite(gain) and gain + error <= LEAST_GAIN * before[0]):
        return None
    return (
        f"The model no longer comes closer to p_T: KL(model‖p_T) was {before[0]:.3f} and then {after[0]:.3f} nats on "
        f"average over {compared} rungs at T each (± {error:.3f} for the difference), with ESS/n at "
        f"{last[-1]['ess']:.2f}. More proposals per rung (num_generations), more updates (updates_per_rung), another "
        "learning_rate or an adapter of higher rank may bring it closer."
    )


def is_close(figures: Figures, target_ess: float) -> bool:
    """Whether the model that drew a rung's proposals was close to `p_T`."""
    error = figures["missing_mass_error"]
    return figures["ess"] >= target_ess and abs(figures["missing_mass"]) <= error <= MOST_ERROR


def _mean_kl(rungs: Sequence[Figures]) -> tuple[float, float]:
    """The mean of `KL(q‖p_T)`, and its standard error: rungs are drawn independently of each other."""
    n = len(rungs)
    error = sum(figures["kl_to_target_error"] ** 2 for figures in rungs) ** 0.5
    return sum(figures["kl_to_target"] for figures in rungs) / n, error / n
