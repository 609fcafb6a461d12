"""When a run is done: the model is close to `p_T`, or it no longer comes closer.

Both are judged by what a rung's fresh draws say of the model that drew them, and so by one that has not yet learned
from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

TIMES_CLOSE = 2
"""Times that the model must be close, one after the other: one rung alone may be luck. Where rungs draw for groups of
prompts in turn, each time is half of an epoch."""
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
        groups: rungs per epoch over the prompts. An epoch must be close; whole ones are compared, of the same prompts.
    """
    size = math.ceil(groups / TIMES_CLOSE)  # so that each prompt has had its turn
    recent = rungs[-TIMES_CLOSE * size :]
    parts = [recent[size * part : size * (part + 1)] for part in range(TIMES_CLOSE)]
    known = _with_missing_mass(recent)
    if len(recent) == TIMES_CLOSE * size and known and all(is_close(part, target_ess) for part in parts):
        where = f"on {TIMES_CLOSE} rungs running" if size == 1 else f"over {size} rungs, and over {size} before them"
        missing, error = _missing_mass(known)
        which = "" if len(known) == len(recent) else f" on the {len(known)} of these rungs for which it is known"
        return (
            f"The model is close to p_T: {where}, its draws were worth at least {target_ess:g} independent ones each "
            f"(ESS/n {_mean(recent, 'ess')[0]:.2f}), and the missing mass was within its standard error of 0{which} "
            f"({missing:.3f} ± {error:.3f} nats)."
        )
    at_target = [figures for figures in rungs if figures["tau"] == figures["tau_max"]]
    compared = groups * math.ceil(max(RUNGS_COMPARED, len(at_target) // 3) / groups)
    if len(at_target) < 2 * compared:
        return None
    halves = (at_target[-2 * compared : -compared], at_target[-compared:])
    before, after = (_mean(half, "kl_to_target") for half in halves)
    error = (before[1] ** 2 + after[1] ** 2) ** 0.5
    gain = before[0] - after[0]
    # Infinite if a draw has probability 0 under the prior.
    if not (math.isfinite(gain) and gain + error <= LEAST_GAIN * before[0]):
        return None
    return (
        f"The model no longer comes closer to p_T: KL(model‖p_T) was {before[0]:.3f} and then {after[0]:.3f} nats on "
        f"average over {compared} rungs at T each (± {error:.3f} for the difference), with ESS/n at "
        f"{at_target[-1]['ess']:.2f}. More proposals per rung (num_generations), more updates (updates_per_rung), "
        "another learning_rate or an adapter of higher rank may bring it closer."
    )


def is_close(rungs: Sequence[Figures], target_ess: float) -> bool:
    """Whether the models that drew these rungs' proposals were close to `p_T`, on average, as far as that is known."""
    known = _with_missing_mass(rungs)
    missing, error = _missing_mass(known) if known else (0.0, 0.0)
    at_target = all(figures["tau"] == figures["tau_max"] for figures in rungs)
    return at_target and _mean(rungs, "ess")[0] >= target_ess and abs(missing) <= error <= MOST_ERROR


def _with_missing_mass(rungs: Sequence[Figures]) -> list[Figures]:
    """The rungs whose missing mass is known. It is NaN for prompts that no model had drawn for before."""
    return [figures for figures in rungs if not math.isnan(figures["missing_mass"])]


def _missing_mass(rungs: Sequence[Figures]) -> tuple[float, float]:
    """The mean of the missing mass, and a rung's standard error: that of the mean is soon below the bias of `log Z`."""
    return _mean(rungs, "missing_mass")[0], _mean(rungs, "missing_mass_error")[0]


def _mean(rungs: Sequence[Figures], name: str) -> tuple[float, float]:
    """The mean of a figure, and its standard error, if it has one: rungs are drawn independently of each other."""
    n = len(rungs)
    error = sum(figures.get(f"{name}_error", 0.0) ** 2 for figures in rungs) ** 0.5
    return sum(figures[name] for figures in rungs) / n, error / n
