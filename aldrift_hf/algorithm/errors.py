"""Standard errors of log Z, and of differences between it and estimates from the same draws (delta method)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Influence:
    """What a rung's estimate of `log Z` owes to each of its draws (delta method), from which standard errors follow.

    The error of a difference such as the missing mass is not that of its two terms: both are made from the rung's own
    proposals, whose noise partly cancels.

    Attributes:
        own: `[P, n]`, the weight of each of the rung's own proposals in `log Z`, to first order.
        earlier: `[P]`, the variance of `log Z` that is due to draws of earlier rungs.
        sees_missing_mass: whether `log Z` accounts for what the proposals' model has lost. It does not if it is the
            estimate from these draws alone, unless they are the prior's.
    """

    own: Tensor
    earlier: Tensor
    sees_missing_mass: bool = True

    def error(self, less: Tensor | float = 0.0) -> Tensor:
        """`[P]`, the standard error of `log Z` less an estimate from the rung's own proposals; NaN for a single one.

        Args:
            less: `[P, n]`, the influence of the proposals on the estimate that is subtracted; 0 for none.
        """
        return (self.earlier + variance_of_sum(self.own - less)).sqrt()


def variance_of_sum(influence: Tensor) -> Tensor:
    """The variance of an estimate from `n` independent draws with these influences, `[..., n]`; NaN if `n` is 1."""
    n = influence.shape[-1]
    return n * (influence - influence.mean(-1, keepdim=True)).square().sum(-1) / (n - 1)


def by_draw(log_weight: Tensor, texts: int) -> Tensor:
    """The log-weights of independent draws, the mean weight of the texts of each: `[P, n·texts]` to `[P, n]`, nats."""
    return log_weight.view(len(log_weight), -1, texts).logsumexp(-1) - math.log(texts)


def pooled_influence(log_weight: Tensor, drawn: Sequence[int]) -> Influence:
    """The influence of several rungs' draws on the [`aldrift_hf.algorithm.diagnostics.log_z`] of all weights together.

    Args:
        log_weight: `[P, N]`, by rung.
        drawn: draws per prompt of each rung; the last is the present one.
    """
    parts = torch.split(log_weight.softmax(-1), list(drawn), dim=-1)
    earlier = [variance_of_sum(part) for part in parts[:-1]]
    return Influence(parts[-1], torch.stack([torch.zeros_like(log_weight[..., 0]), *earlier]).sum(0))


def mean_error(error: Tensor) -> float:
    """The standard error of a mean over prompts, from the error of each (`[P]`)."""
    return error.square().sum().sqrt().item() / error.numel()
