"""What a set of weighted draws says of itself: effective sample size, Pareto k-hat, log Z, divergences.

All functions take log-weights `ℓ(s) = log L(s) - τ·d(s) - log q(s)` of draws `s ~ q`, in nats, shape `[..., n]`, and
reduce the last dimension. Both `L` and `q` are normalised over sequences, so `Z_τ = Σ_s L(s)·exp(-τ·d(s))` is the
plain mean of `exp ℓ`: no unknown constant is left.

None of these can see a region in which `q` has (almost) no mass: with draws from `q` alone, a model that collapsed on
three sequences looks perfect. [`missing_mass`] is the exception, for it compares with an estimate from elsewhere.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from . import pareto

MISSING_MASS_WARNING = 0.5
"""Nats above which a missing mass is warned of: the model then covers less than exp(-0.5) = 61 % of the target."""


def log_z(log_weight: Tensor) -> Tensor:
    """`log Z_τ` by importance sampling: the log of the mean weight. Shape `[..., n]` to `[...]`, nats."""
    return log_weight.logsumexp(-1) - math.log(log_weight.shape[-1])


def log_z_increment(log_weight: Tensor, next_log_weight: Tensor) -> Tensor:
    """`log Z_τ' - log Z_τ` from one set of draws, weighted for `τ` and for `τ'`.

    The self-normalised estimate of `log E_{p_τ}[exp(-(τ'-τ)·d)]`. Mass that `q` has lost cancels in the ratio as far
    as it is lost evenly over costs; that is why the sum of these increments along the ladder still knows the prior's
    share, when [`log_z`] of the final model does not.
    """
    return next_log_weight.logsumexp(-1) - log_weight.logsumexp(-1)


def missing_mass(ladder_log_z: Tensor, log_weight: Tensor) -> Tensor:
    """Nats of the target's mass that `q` no longer reaches: `log Z` from the ladder minus `log Z` from `q`'s draws.

    About 0 for a model that covers the target; `x` means that draws of `q` account for a share `exp(-x)` of it. Its
    noise is that of the two estimates; small negative values are noise.
    """
    return ladder_log_z - log_z(log_weight)


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """Kish's effective sample size as a share of `n`, `(Σ w)² / (n Σ w²)` in `[1/n, 1]`."""
    log_ess = 2 * log_weight.logsumexp(-1) - (2 * log_weight).logsumexp(-1)
    return (log_ess - math.log(log_weight.shape[-1])).exp()


def pareto_khat(log_weight: Tensor) -> Tensor:
    """Shape of the generalised Pareto tail of the weights (Vehtari et al., arXiv 1507.02646).

    Below 0.7 the importance-sampling estimates are reliable; above 1 their mean does not exist. NaN where a row has
    too few draws for a tail (about 25), or the weights of its tail take next to no different values, as those of the
    prior do with a cost of few: a fit would be to rounding errors.
    """
    khat = torch.tensor([pareto.smoothed(row)[1] for row in _rows(log_weight)], dtype=torch.float64)
    return khat.reshape(log_weight.shape[:-1])


def pareto_smoothed(log_weight: Tensor) -> Tensor:
    """The log-weights with their largest replaced by what their fitted tail expects (Vehtari et al., arXiv 1507.02646).

    Less variance for some bias. Rows without a tail to fit (see [`pareto_khat`], or a tail of equal weights) are
    returned as they are. The weights' sum is kept, so that [`log_z`] is that of the raw ones.
    """
    rows = [torch.from_numpy(pareto.smoothed(row)[0]) for row in _rows(log_weight)]
    smooth = torch.stack(rows).reshape(log_weight.shape)
    return smooth + (log_weight.logsumexp(-1) - smooth.logsumexp(-1))[..., None]


def _rows(log_weight: Tensor) -> np.ndarray:
    return log_weight.detach().reshape(-1, log_weight.shape[-1]).double().cpu().numpy()


def reverse_kl(log_weight: Tensor, log_z: Tensor) -> Tensor:
    """`KL(q‖p_τ) = log Z - E_q[ℓ]`, nats. With a `log_z` that knows of mass which `q` lost, so does this."""
    return log_z - log_weight.mean(-1)


def forward_kl(log_weight: Tensor) -> Tensor:
    """Self-normalised estimate of `KL(p_τ‖q) = E_p[ℓ] - log Z` from `q`'s own draws, nats.

    Blind to mass that `q` lost: a lower bound in practice. Read it beside [`missing_mass`].
    """
    share = log_weight.softmax(-1)
    # 0 · -inf is 0 here: a draw that the target excludes has no part in an expectation under it.
    return torch.where(share > 0, share * log_weight, 0.0).sum(-1) - log_z(log_weight)
