"""A ladder whose steps are as large as the effective sample size allows."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ...types import Proposals
from ..diagnostics import effective_sample_size
from ..errors import by_draw
from ..prompt_groups import num_groups
from .base import Ladder, LadderSettings, LadderState

LEAP = 4.0
"""Without a T in sight, the inverse temperature rises at most by this factor on a rung."""
LEAST_DRAWS, MOST_SHARE = 8.0, 0.9
"""Effective draws per prompt below which no step is taken, whatever share of a rung's proposals they are; or that share
of all draws, where they are too few. Of four draws, those that happen to be the best look like half of the target."""
PATIENCE = 6
"""Rungs for each prompt at one `τ` after which the ladder gives up: more draws and more learning did not make a step
possible."""


def adaptive_tau(log_ratio: Tensor, objective: Tensor, tau: float, tau_max: float, least_draws: float) -> float:
    """The largest `τ'` up to which the effective sample size of the full weights stays above a threshold.

    With `ℓ_τ'(s) = log L(s) - τ'·d(s) - log q(s)`, the mean over prompts of Kish's effective sample size
    `(Σ w)² / Σ w²` is followed upwards from `τ` to where it first falls below `least_draws`, to a precision of 1e-6 of
    `T - τ`. The weights are relative to the model that drew, not to `p_τ`: what the model has not learned yet counts.

    Args:
        log_ratio: `[P, n]`, `log L - log q` of the draws, nats.
        objective: `[P, n]`, costs.
        tau: where the ladder stands.
        tau_max: T.
        least_draws: the threshold, in effective draws per prompt.

    Returns:
        A value in `[τ, T]`; `τ` itself where the effective sample size is already below the threshold there.
    """

    def enough(at: float) -> bool:
        share = effective_sample_size(log_ratio - at * objective).mean().item()
        return bool(share * objective.shape[-1] >= least_draws)

    # On a grid first: with full weights the effective sample size need not fall monotonically.
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


class AdaptiveLadder(Ladder):
    """Takes the largest step for which the weights are worth enough independent draws ([`adaptive_tau`]).

    Args:
        ess_threshold: least effective sample size, as a share of a rung's proposals; between 0 and 1. It is never less
            than `LEAST_DRAWS`, or `MOST_SHARE` of all draws where these are too few.
        proposals: n, per prompt per rung. Of a larger pool, too, a rung's number counts as the whole; of a smaller one
            (chains begin at few whole texts) its own.
        prompts_per_rung: most prompts that a rung draws for; `None` for all.
    """

    uses_weights: ClassVar[bool] = True

    def __init__(self, ess_threshold: float, proposals: int, prompts_per_rung: int | None = None) -> None:
        self.ess_threshold, self.proposals, self.prompts_per_rung = ess_threshold, proposals, prompts_per_rung

    @classmethod
    def from_settings(cls, settings: LadderSettings) -> AdaptiveLadder:
        return cls(settings.ess_threshold, settings.proposals, settings.prompts_per_rung)

    def next_tau(self, state: LadderState, pool: Proposals) -> float:
        highest = state.tau_max
        if math.isinf(highest):  # no draw has what T is to be chosen for, yet
            highest = LEAP * max(state.tau, 1 / (pool.objective.max().item() or 1.0))
        if state.tau >= highest:
            return highest
        log_ratio = by_draw(pool.log_weight(0.0), pool.texts_per_draw)
        objective = pool.objective[:, :: pool.texts_per_draw]
        rung = min(self.proposals, objective.shape[1])
        if objective.numel() == 1:
            return state.tau
        if objective.shape[1] == 1:  # worth one whatever it weighs: all prompts' draws are judged together
            log_ratio, objective, rung = log_ratio.view(1, -1), objective.view(1, -1), objective.numel()
        least = max(self.ess_threshold * rung, min(LEAST_DRAWS, MOST_SHARE * objective.shape[1]))
        return adaptive_tau(log_ratio, objective, state.tau, highest, least)

    def stop_reason(self, state: LadderState) -> str | None:
        patience = PATIENCE * num_groups(len(state.prompt_tau), self.prompts_per_rung)
        last = state.taus[-patience:]
        if len(last) < patience or len(set(last)) > 1 or state.tau == state.tau_max:
            return None
        return (
            f"The adaptive ladder cannot leave tau = {state.tau:g}: for {patience} rungs it drew and learned there, "
            f"and the effective sample size stayed below ess_threshold={self.ess_threshold} of a rung's proposals, or "
            f"below {LEAST_DRAWS:g} draws per prompt. "
            "Lower ess_threshold, draw more proposals per rung (num_generations), or learn more on each "
            "(updates_per_rung, learning_rate)."
        )
