"""The generalised Kullback-Leibler divergence on weighted draws, which does not memorise them."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ...types import Proposals
from .. import diagnostics
from .base import Loss


class GeneralizedKL(Loss):
    """Generalised Kullback-Leibler divergence between target and model, on draws whose target density is known.

    For normalised `p` and `q`, `KL(p‖q) = Σ_s φ(s)` with `φ = p·log(p/q) - p + q`, where every term is positive unless
    `q(s) = p(s)`. Draws `s ~ r` estimate it as the mean of `φ/r`. Its gradient, `-(p - q)/r · ∇log q`, has the
    expectation of maximum likelihood's gradient, because `E_q[∇log q] = 0`. But while maximum likelihood keeps raising
    a sample's probability for as long as it is shown, this loss leaves a sample alone whose probability is right, and
    lowers one whose probability is too high. That is what keeps a rung from memorising its few samples.

    Where `q` has grown far beyond `r`, one draw would outweigh all others. So `φ` is divided by `max(r, (p + q)/2)`,
    which bounds the factor of `∇log q` by 2 and moves no minimum: all minima are still at `q = p`.
    """

    reference_share: ClassVar[float] = 0.5
    exact_logprobs: ClassVar[bool] = True
    needs_weighted_draws: ClassVar[bool] = True

    def columns(self, pool: Proposals, tau: float, log_z: Tensor) -> dict[str, Tensor]:
        """`log_target`: `log p_τ(s)` with its normaliser; `log_reference`: `log r(s)`, see [`log_reference`]."""
        log_tilted, own_log_z = pool.log_target(tau), diagnostics.log_z(pool.log_weight(tau))
        return {
            "log_target": log_tilted - log_z[:, None],
            # Rows are resampled by the pool's own weights, whatever is known of Z from elsewhere. With Pareto smoothing
            # the largest are resampled less often than this says: their gradients weigh less, no minimum moves.
            "log_reference": log_reference(log_tilted - own_log_z[:, None], pool.log_model),
        }

    def __call__(self, log_probs: Tensor, num_tokens: Tensor | int, **columns: Tensor) -> Tensor:
        log_target, log_reference = columns["log_target"], columns["log_reference"]
        log_model = log_probs.sum(-1)
        scale = torch.maximum(log_reference, torch.logaddexp(log_target, log_model.detach()) - math.log(2))
        target, model = (log_target - scale).exp(), (log_model - scale).exp()  # both at most 2
        # A draw that the prior excludes (log p = -inf) has no part in the first term.
        cross = torch.where(target > 0, target * (log_target - log_model), 0.0)
        return (cross - target + model).sum() / num_tokens


def log_reference(log_target: Tensor, log_model: Tensor) -> Tensor:
    """`log r` of rows that come half from the target, by resampling, and half from the pool, unweighted.

    Args:
        log_target: `log p`, normalised, nats.
        log_model: log-density of the pool's draws (for the archive: of the mixture), nats.
    """
    share = GeneralizedKL.reference_share
    return torch.logaddexp(log_target + math.log(1 - share), log_model + math.log(share))
