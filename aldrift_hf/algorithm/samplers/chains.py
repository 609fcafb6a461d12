"""The paper's correction: independence Metropolis-Hastings chains over a rung's own proposals."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ...types import Proposals
from .base import Sampler, SamplerSettings, Selection
from .kernels import Chains, metropolis_hastings


def run_chains(
    log_weight: Tensor,
    num_chains: int,
    generator: torch.Generator,
    kernel: Callable[[Tensor, torch.Generator], Chains] = metropolis_hastings,
) -> Selection:
    """`m` chains over each prompt's proposals `[P, m·M]`: their last states, `[P, m]`, and the acceptance rate."""
    prompts, n = log_weight.shape
    steps = n // num_chains
    chains = kernel(log_weight.view(prompts, num_chains, steps), generator)
    return Selection(chains.last + steps * torch.arange(num_chains), chains.acceptance_rate.mean().item())


class MetropolisHastings(Sampler):
    """The last states of chains of `M` proposals, `m = n/M` per prompt (arXiv 2503.06917, algorithm ALDRIFT).

    Args:
        chain_length: M.
    """

    uses_chains: ClassVar[bool] = True

    def __init__(self, chain_length: int) -> None:
        self.chain_length = chain_length

    @classmethod
    def from_settings(cls, settings: SamplerSettings) -> MetropolisHastings:
        return cls(settings.steps_per_chain)

    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        log_weight = pool.log_weight(tau)
        return run_chains(log_weight, log_weight.shape[-1] // self.chain_length, generator)
