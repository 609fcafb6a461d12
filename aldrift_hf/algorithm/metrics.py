"""The figures of a rung and of a set of draws, for records and logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import SLACK, Completions, Proposals
from . import diagnostics
from .diversity import diversity
from .errors import mean_error, variance_of_sum
from .rung import Rung


def success_share(objective: Tensor, threshold: float) -> float:
    """Share of draws that cost at most `threshold`, up to rounding."""
    return (objective <= threshold + SLACK).double().mean().item()


def share_error(successes: Tensor) -> float:
    """The standard error of the share of 1 among 0 and 1, of draws for given prompts, `[P, n]`."""
    return mean_error(variance_of_sum(successes / successes.shape[-1]).sqrt())


def proposal_metrics(proposals: Proposals, tau: float, threshold: float) -> dict[str, float]:
    """Cost, success and the diagnostics of the weights at `tau`; means over prompts.

    Args:
        proposals: the draws.
        tau: the inverse temperature of the target.
        threshold: a draw that costs at most this is a success.
    """
    log_weight, successes = proposals.log_weight(tau), proposals.successes(threshold)
    return {
        "draws": proposals.objective.shape[-1],
        "objective_mean": proposals.objective.mean().item(),
        "objective_best": proposals.objective.min().item(),
        "success": successes.mean().item(),
        "success_error": share_error(successes),
        "ess": diagnostics.effective_sample_size(log_weight).mean().item(),
        "khat": diagnostics.pareto_khat(log_weight).nanmean().item(),
        "diversity": diversity(proposals),
        "kl_to_prior": (proposals.log_model - proposals.log_prior).mean().item(),
    }


def prompt_metrics(proposals: Proposals, tau: float, threshold: float, log_z: Tensor) -> dict[str, Tensor]:
    """Figures of each prompt, `[P]`: mean cost, success, ESS, share of distinct draws, `log Z`, and KL(model‖p_τ).

    Args:
        proposals: the draws.
        tau: the inverse temperature of the target.
        threshold: a draw that costs at most this is a success.
        log_z: `[P]`, of the target, nats.
    """
    log_weight = proposals.log_weight(tau)
    return {
        "objective": proposals.objective.mean(-1),
        "success": proposals.successes(threshold).mean(-1),
        "ess": diagnostics.effective_sample_size(log_weight),
        "distinct": proposals.distinct_by_prompt(),
        "log_z": log_z,
        "kl": diagnostics.reverse_kl(log_weight, log_z),
    }


def completion_metrics(proposals: Proposals, eos_token_ids: Sequence[int]) -> dict[str, float]:
    """What TRL's trainers log of completions, under TRL's names; `entropy` in nats per token.

    The entropy is estimated by the draws' own `-log q`, and so needs no logits.
    """
    completions = proposals.completions
    length = completions.length.double()
    return {
        "completions/mean_length": length.mean().item(),
        "completions/clipped_ratio": _clipped(completions, eos_token_ids).double().mean().item(),
        "entropy": (-proposals.log_model.sum() / length.sum()).item(),
    }


def rung_metrics(rung: Rung, threshold: float) -> dict[str, float]:
    """A rung's figures; means over prompts.

    The target's distance from the prior is `KL(p_τ‖L) = -τ·E[d] - log Z_τ`, where `E[d]` is the weighted mean of the
    pool, or of the proposals if the sampler has moved the pool's draws: then they no longer have a known density. The
    missing mass is NaN where the draws themselves are all that `log Z` is known by.

    Args:
        rung: the rung.
        threshold: a draw that costs at most this is a success.
    """
    proposals, pool, tau, log_z = rung.proposals, rung.pool, rung.state.tau, rung.after.log_z
    error = rung.state.tau_max_error
    chosen = pool.flat(rung.selection.index)
    log_weight = proposals.log_weight(tau)
    weighted = proposals if rung.redrawn else pool
    missing, missing_error = math.nan, math.nan
    if rung.influence.sees_missing_mass:
        missing = diagnostics.missing_mass(log_z, log_weight).mean().item()
        missing_error = mean_error(rung.influence.error(log_weight.softmax(-1)))
    target_objective = (weighted.log_weight(tau).softmax(-1) * weighted.objective).sum(-1).mean().item()
    excluded = (proposals.log_prior == -math.inf).double().mean().item()
    return {
        **proposal_metrics(proposals, tau, threshold),
        "sample_objective_mean": pool.objective.flatten()[chosen].mean().item(),
        "target_objective_mean": target_objective,
        "target_kl_to_prior": -tau * target_objective - log_z.mean().item(),
        "acceptance_rate": rung.selection.acceptance_rate,
        "log_z_increment": (log_z - rung.before.log_z).mean().item(),
        "log_z": log_z.mean().item(),
        "log_z_error": mean_error(rung.after.log_z_error),
        "missing_mass": missing,
        "missing_mass_error": missing_error,
        "kl_to_target": diagnostics.reverse_kl(log_weight, log_z).mean().item(),
        "kl_to_target_error": mean_error(rung.influence.error(log_weight / log_weight.shape[-1])),
        "distinct_proposals": proposals.distinct_share(),
        "distinct_samples": pool.distinct_share(chosen),
        "constant_cost": proposals.constant_cost_share(),
        "tau_max": rung.state.tau_max,
        **({} if error is None else {"tau_max_error": error}),
        **({"excluded": excluded} if excluded else {}),
    }


def _clipped(completions: Completions, eos_token_ids: Sequence[int]) -> Tensor:
    """`[n]`, whether a completion was cut at the limit: it does not end with an end-of-text token."""
    last = completions.ids.gather(1, completions.length[:, None] - 1)[:, 0]
    return ~torch.isin(last, torch.tensor(list(eos_token_ids)))
