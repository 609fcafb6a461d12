"""Samplers without a correction, for comparison: the model drifts to low cost, and not to `p_T`."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...types import Proposals
from .base import Sampler, SamplerSettings, Selection
from .kernels import systematic_resample, top


class _Uncorrected(Sampler):
    """Keeps one in `M` of each prompt's proposals, at least one.

    Args:
        chain_length: M.
    """

    corrects: ClassVar[bool] = False

    def __init__(self, chain_length: int) -> None:
        self.chain_length = chain_length

    @classmethod
    def from_settings(cls, settings: SamplerSettings) -> _Uncorrected:
        return cls(settings.steps_per_chain)

    def _kept(self, pool: Proposals) -> int:
        return max(1, pool.objective.shape[-1] // self.chain_length)


class Top(_Uncorrected):
    """TOPIFT, the paper's heuristic: the proposals of lowest cost; ties go to the higher prior probability."""

    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        return Selection(top(pool.objective, pool.log_prior, self._kept(pool)))


class Reweight(_Uncorrected):
    """The ablation: proposals resampled by `exp(-Δτ·d)` alone, as if the model were `p_τ` of the rung before."""

    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        log_weight = -(tau - tau_before) * pool.objective
        log_weight = torch.where(pool.log_prior > -torch.inf, log_weight, -torch.inf)
        return Selection(systematic_resample(log_weight, self._kept(pool), generator))
