"""The temperature ladder's seam: which inverse temperatures `τ` lead from the prior to the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ...types import Proposals


@dataclass(frozen=True)
class LadderState:
    """Where a run stands on its ladder: all that one rung passes on to the next, beside the model.

    Attributes:
        log_z: `[P]`, the ladder's `log Z_τ` of each prompt at its `prompt_tau`, nats; 0 before its first rung.
        log_z_error: `[P]`, the standard error of `log_z`, nats.
        prompt_tau: `[P]`, the inverse temperature of the last rung that drew for the prompt; 0 before the first.
        taus: the inverse temperature of each rung so far, in nats per unit of cost.
        objective_range: D, the largest cost, as given or as measured on the prior's draws; `None` if neither.
    """

    log_z: Tensor
    log_z_error: Tensor
    prompt_tau: Tensor
    taus: tuple[float, ...] = ()
    objective_range: float | None = None

    @classmethod
    def start(cls, num_prompts: int, objective_range: float | None = None) -> LadderState:
        """Before the first rung."""
        zeros = torch.zeros(num_prompts, dtype=torch.float64)
        return cls(zeros, zeros, zeros, objective_range=objective_range)

    @property
    def tau(self) -> float:
        """The inverse temperature reached; 0 before the first rung."""
        return self.taus[-1] if self.taus else 0.0

    def of(self, prompts: Tensor) -> LadderState:
        """The state for these prompts alone, `[S]`."""
        columns = (self.log_z[prompts], self.log_z_error[prompts], self.prompt_tau[prompts])
        return LadderState(*columns, self.taus, self.objective_range)

    def reached(self, prompts: Tensor, tau: float, log_z: Tensor, error: Tensor) -> LadderState:
        """The state after a rung at `τ`.

        Args:
            prompts: `[S]`, those that it drew for.
            tau: its inverse temperature.
            log_z, error: `[S]`, their `log Z_τ` and its standard error, nats.
        """
        news = (log_z, error, torch.full_like(error, tau))
        olds = (self.log_z, self.log_z_error, self.prompt_tau)
        now = [old.index_copy(0, prompts, new.to(old)) for old, new in zip(olds, news, strict=True)]
        return LadderState(now[0], now[1], now[2], (*self.taus, tau), self.objective_range)


class LadderSettings(Protocol):
    """What a ladder may read of a run's settings (`ALDRIFTConfig`)."""

    tau_max: float
    tau_step: float | None
    ess_threshold: float
    num_generations: int


class Ladder(ABC):
    """Chooses each rung's inverse temperature, and says when the run has ended.

    Attributes:
        uses_weights: whether it looks at the pool's log-weights, which a sampler without a correction does not have.
        takes_step: whether it climbs in steps of `tau_step`.
    """

    uses_weights: ClassVar[bool] = False
    takes_step: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: LadderSettings) -> Ladder:
        """A ladder for a run with these settings."""
        return cls()

    @abstractmethod
    def next_tau(self, state: LadderState, pool: Proposals) -> float:
        """The next rung's inverse temperature, at least `state.tau`.

        Args:
            state: where the ladder stands.
            pool: the draws that the rung's samples will be chosen from.
        """

    def num_rungs(self, state: LadderState) -> int | None:
        """How many rungs there are; `None` where that shows only on the way. Called before the first rung."""
        return None

    def stop_reason(self, state: LadderState) -> str | None:
        """Why the run ends with the rung that `state` has reached, in words for the user; `None` to go on."""
        return None
