"""Diagnostics of a set of weighted draws: effective sample size, Pareto k-hat, log Z, divergences.

All functions take log-weights `ℓ(s) = log L(s) - τ·d(s) - log q(s)` of draws `s ~ q`, in nats, shape `[..., n]`, and
reduce the last dimension. Both `L` and `q` are normalised over sequences, so `Z_τ = Σ_s L(s)·exp(-τ·d(s))` is the
expectation of `exp ℓ`, without an unknown constant.

None of these can see a region in which `q` has almost no mass: judged by its own draws, a model that has collapsed onto
three sequences looks perfect. [`missing_mass`] is the exception, where it compares with an estimate from elsewhere: the
prior's draws, or those of other rungs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from . import pareto

MISSING_MASS_WARNING = 0.5
"""Missing mass above which a warning is given, nats: the model then covers less than exp(-0.5) = 61 % of the target."""


def log_z(log_weight: Tensor) -> Tensor:
    """`log Z_τ` by importance sampling: the log of the mean weight. Shape `[..., n]` to `[...]`, nats."""
    return log_weight.logsumexp(-1) - math.log(log_weight.shape[-1])


def log_z_increment(log_weight: Tensor, next_log_weight: Tensor) -> Tensor:
    """`log Z_τ' - log Z_τ` from one set of draws, weighted for `τ` and for `τ'`.

    The self-normalised estimate of `log E_{p_τ}[exp(-(τ'-τ)·d)]`. Mass that `q` has lost cancels in the ratio, as far
    as it was lost evenly over costs. That is why the sum of these increments along the ladder still accounts for lost
    mass, when [`log_z`] of the final model does not.
    """
    return next_log_weight.logsumexp(-1) - log_weight.logsumexp(-1)


def missing_mass(ladder_log_z: Tensor, log_weight: Tensor) -> Tensor:
    """Missing mass, nats: `log Z` from the ladder minus `log Z` from `q`'s own draws.

    It is about 0 for a model that covers the target; at `x` nats, draws of `q` account for a share `exp(-x)` of it. Its
    noise is that of the two estimates, so small negative values are noise.
    """
    return ladder_log_z - log_z(log_weight)


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """Kish's effective sample size as a share of `n`, `(Σ w)² / (n Σ w²)` in `[1/n, 1]`."""
    log_ess = 2 * log_weight.logsumexp(-1) - (2 * log_weight).logsumexp(-1)
    return (log_ess - math.log(log_weight.shape[-1])).exp()


def pareto_khat(log_weight: Tensor) -> Tensor:
    """Shape of the generalised Pareto tail of the weights (Vehtari et al., arXiv 1507.02646).

    Below 0.7 importance-sampling estimates are reliable; above 1 the mean of the weights does not exist. NaN where a
    row has too few draws for a tail (about 25), or where its tail has too few distinct weights (as for the prior's
    draws under a cost with few values): it would be fitted to rounding errors.
    """
    khat = torch.tensor([pareto.smoothed(row)[1] for row in _rows(log_weight)], dtype=torch.float64)
    return khat.reshape(log_weight.shape[:-1])


def pareto_smoothed(log_weight: Tensor) -> Tensor:
    """The log-weights with their largest replaced by what their fitted tail expects (Vehtari et al., arXiv 1507.02646).

    This trades variance for some bias. Rows without a tail to fit (see [`pareto_khat`]) are returned unchanged. The sum
    of the weights is kept, so that [`log_z`] does not change.
    """
    rows = [torch.from_numpy(pareto.smoothed(row)[0]) for row in _rows(log_weight)]
    smooth = torch.stack(rows).reshape(log_weight.shape)
    return smooth + (log_weight.logsumexp(-1) - smooth.logsumexp(-1))[..., None]


def _rows(log_weight: Tensor) -> np.ndarray:
    return log_weight.detach().reshape(-1, log_weight.shape[-1]).double().cpu().numpy()


def reverse_kl(log_weight: Tensor, log_z: Tensor) -> Tensor:
    """`KL(q‖p_τ) = log Z - E_q[ℓ]`, nats. It accounts for mass that `q` has lost if `log_z` does."""
    return log_z - log_weight.mean(-1)


def forward_kl(log_weight: Tensor) -> Tensor:
    """Self-normalised estimate of `KL(p_τ‖q) = E_p[ℓ] - log Z` from `q`'s own draws, nats.

    It does not see mass that `q` has lost, so in practice it is a lower bound. Read it together with [`missing_mass`].
    """
    share = log_weight.softmax(-1)
    # 0 · -inf counts as 0: a draw that the target excludes has no part in an expectation under the target.
    return torch.where(share > 0, share * log_weight, 0.0).sum(-1) - log_z(log_weight)
