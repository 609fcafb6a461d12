"""Importance resampling from every proposal of the run so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ...types import Proposals
from .. import diagnostics
from ..archive import Archive, Entry, draws_of, mixture
from ..errors import Influence, by_draw, pooled_influence
from ..ladders.base import LadderState
from .base import Policy, Sampler, SamplerSettings, Selection
from .kernels import systematic_resample


class ArchiveSampler(Sampler):
    """Resamples by deterministic-mixture weights over all proposals of the run so far ([`Archive`]).

    Args:
        window: most rungs whose proposals and models are kept, the first included; at least 2.
        pareto_smoothing: whether the largest weights are smoothed by their fitted tail before resampling.
    """

    draws_by_weight: ClassVar[bool] = True

    def __init__(self, window: int = 16, pareto_smoothing: bool = False) -> None:
        self.archive = Archive(window)
        self._group: list[Entry] = []
        self.pareto_smoothing = pareto_smoothing

    @classmethod
    def from_settings(cls, settings: SamplerSettings) -> ArchiveSampler:
        return cls(settings.archive_window, settings.pareto_smoothing)

    def pool(self, proposals: Proposals, policy: Policy) -> Proposals:
        self._group = self.archive.extend(proposals, policy.snapshot(), policy.log_prob)
        return mixture(self._group)

    def replay(self) -> list[Proposals]:
        return [mixture(group) for group in self.archive.groups() if group[-1] is not self._group[-1]]

    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        log_weight = pool.log_weight(tau)
        if self.pareto_smoothing:
            log_weight = diagnostics.pareto_smoothed(log_weight)
        return Selection(systematic_resample(log_weight, size, generator))

    def log_z(self, pool: Proposals, state: LadderState, tau: float) -> Tensor:
        return diagnostics.log_z(pool.log_weight(tau))  # of all models that drew for these prompts, not step by step

    def influence(self, pool: Proposals, state: LadderState, tau: float) -> Influence:
        drawn = [texts // pool.texts_per_draw for texts in draws_of(self._group)]
        influence = pooled_influence(by_draw(pool.log_weight(tau), pool.texts_per_draw), drawn)
        return replace(influence, sees_missing_mass=len(drawn) > 1 or not self._group[0].snapshot)

    def metrics(self, pool: Proposals, tau: float) -> dict[str, float]:
        log_weight = by_draw(pool.log_weight(tau), pool.texts_per_draw)
        return {
            "archive_draws": log_weight.shape[1],
            "archive_ess": diagnostics.effective_sample_size(log_weight).mean().item(),
            "archive_khat": diagnostics.pareto_khat(log_weight).nanmean().item(),
        }

    def draws(self) -> list[Proposals]:
        return [mixture(group) for group in self.archive.groups()]

    def state_dict(self) -> dict[str, Tensor]:
        return self.archive.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.archive.load_state_dict(state)
