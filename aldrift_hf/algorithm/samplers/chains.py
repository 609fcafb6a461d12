"""The paper's correction: independence Metropolis-Hastings chains over a rung's own proposals."""

from __future__ import annotations

import math
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
    """`m` chains over each prompt's proposals `[P, m·M]`: their last states, `[P, m]`, and the acceptance rate.

    A chain all of whose proposals are excluded by the target has no state of its own: see [`stand_ins`].
    """
    prompts, n = log_weight.shape
    steps = n // num_chains
    weights = log_weight.view(prompts, num_chains, steps)
    lost = (weights == -math.inf).all(-1)
    chains = kernel(weights.masked_fill(lost[..., None], 0.0), generator)
    last = chains.last + steps * torch.arange(num_chains)
    return Selection(last.gather(1, stand_ins(lost, generator)), chains.acceptance_rate[~lost].mean().item())


def stand_ins(lost: Tensor, generator: torch.Generator) -> Tensor:
    """For each chain itself, or one of the prompt's other chains where it is lost: `[P, m]` positions, of booleans.

    Raises:
        ValueError: if all chains of a prompt are lost.
    """
    own = torch.arange(lost.shape[-1]).expand(lost.shape)
    if not lost.any():
        return own
    if lost.all(-1).any():
        raise ValueError("the target excludes every proposal of a prompt: no chain has a state")
    others = torch.multinomial((~lost).double(), lost.shape[-1], replacement=True, generator=generator)
    return torch.where(lost, others, own)


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
