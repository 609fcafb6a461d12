"""The sampler's seam: how a rung's proposals become samples (step 2 of ALDRIFT, *correct*)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ...types import Proposals
from .. import diagnostics
from ..archive import Snapshot
from ..ladders.base import LadderState


class Policy(Protocol):
    """What a sampler may ask of the model that is trained."""

    def snapshot(self) -> Snapshot:
        """The model as it is now, to be kept."""
        ...

    def log_prob(self, snapshot: Snapshot | None, proposals: Proposals) -> Tensor:
        """`[P, n]` log-probabilities of draws under a snapshot's model, or the present one (`None`), nats."""
        ...


class SamplerSettings(Protocol):
    """What a sampler may read of a run's settings (`ALDRIFTConfig`)."""

    archive_window: int
    pareto_smoothing: bool

    @property
    def num_chains(self) -> int:
        """m, chains (or samples) per prompt per rung."""
        ...


@dataclass(frozen=True)
class Selection:
    """Which draws of the pool become samples.

    Attributes:
        index: `[P, k]`, positions among each prompt's `N` draws.
        acceptance_rate: the share of moves that Metropolis-Hastings chains accepted; NaN without chains.
    """

    index: Tensor
    acceptance_rate: float = math.nan


class Sampler(ABC):
    """Turns proposals into samples of `p_τ`.

    Attributes:
        corrects: whether its samples aim at `p_τ`.
        draws_by_weight: whether it resamples in proportion to the pool's weights, so that its samples are draws of
            `p_τ` whose density is known.
        uses_chains: whether `num_generations` proposals must divide into chains of `chain_length`.
    """

    corrects: ClassVar[bool] = True
    draws_by_weight: ClassVar[bool] = False
    uses_chains: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: SamplerSettings) -> Sampler:
        """A sampler for a run with these settings."""
        return cls()

    def pool(self, proposals: Proposals, policy: Policy) -> Proposals:
        """The draws to choose from, `log_model` being the log-density they were drawn from. Default: the rung's own."""
        return proposals

    @abstractmethod
    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        """Choose samples of `p_τ` among the pool's draws.

        Args:
            pool: `N` draws for each of `P` prompts.
            tau_before: the inverse temperature of the rung before.
            tau: the rung's.
            size: samples per prompt that the rung's updates take in. Fewer are learned from several times.
            generator: the source of all random numbers.
        """

    def log_z(self, pool: Proposals, state: LadderState, tau: float) -> Tensor:
        """`[P]`, the ladder's estimate of `log Z_τ`, nats: by default step by step, from one rung to the next."""
        increment = diagnostics.log_z_increment(pool.log_weight(state.tau), pool.log_weight(tau))
        return state.log_z.to(increment) + increment

    def metrics(self, pool: Proposals, tau: float) -> dict[str, float]:
        """Figures of its own for a rung's record."""
        return {}

    def draws(self) -> Proposals | None:
        """All draws that are kept from rung to rung, with their density; `None` where none are."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, as named tensors; empty before the first rung."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what [`state_dict`] gave; an empty state begins a new run.

        Raises:
            NotImplementedError: for a state that a subclass wrote and does not read.
        """
        if state:
            raise NotImplementedError(f"{type(self).__name__} has a state_dict() but no load_state_dict()")
