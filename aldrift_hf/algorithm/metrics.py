"""A rung's figures."""

from __future__ import annotations

from torch import Tensor

from ..types import Proposals
from . import diagnostics


def success_share(objective: Tensor, best: float) -> float:
    """Share of draws of cost 0 or, where none was ever seen, of the best cost known."""
    return (objective <= max(best, 0.0) + 1e-9).double().mean().item()


def proposal_metrics(proposals: Proposals, tau: float, best: float) -> dict[str, float]:
    """Cost, success and the weights' diagnostics at `tau`; means over prompts."""
    log_weight = proposals.log_weight(tau)
    return {
        "objective_mean": proposals.objective.mean().item(),
        "objective_best": proposals.objective.min().item(),
        "success": success_share(proposals.objective, best),
        "ess": diagnostics.effective_sample_size(log_weight).mean().item(),
        "khat": diagnostics.pareto_khat(log_weight).nanmean().item(),
    }
