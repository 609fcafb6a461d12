"""The temperature ladder's seam: which inverse temperatures `τ` lead from the prior to the target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
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
        tau_max: T: as given, or as the last rung found it. Infinite while it is not known.
        tau_max_error: the standard error of a T that is found; `None` for one that is given.
    """

    log_z: Tensor
    log_z_error: Tensor
    prompt_tau: Tensor
    taus: tuple[float, ...] = ()
    objective_range: float | None = None
    tau_max: float = math.inf
    tau_max_error: float | None = None

    @classmethod
    def start(cls, num_prompts: int, tau_max: float | None, objective_range: float | None = None) -> LadderState:
        """Before the first rung; a `tau_max` of `None` is to be found."""
        zeros = torch.zeros(num_prompts, dtype=torch.float64)
        known = (math.inf, math.inf) if tau_max is None else (tau_max, None)
        return cls(zeros, zeros, zeros, (), objective_range, *known)

    @property
    def tau(self) -> float:
        """The inverse temperature reached; 0 before the first rung."""
        return self.taus[-1] if self.taus else 0.0

    def of(self, prompts: Tensor) -> LadderState:
        """The state for these prompts alone, `[S]`."""
        return replace(
            self,
            log_z=self.log_z[prompts],
            log_z_error=self.log_z_error[prompts],
            prompt_tau=self.prompt_tau[prompts],
        )

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
        return replace(self, log_z=now[0], log_z_error=now[1], prompt_tau=now[2], taus=(*self.taus, tau))


class LadderSettings(Protocol):
    """What a ladder may read of a run's settings (`ALDRIFTConfig`)."""

    tau_max: float | None
    tau_step: float | None
    ess_threshold: float
    prompts_per_rung: int | None

    @property
    def proposals(self) -> int:
        """n, proposals per prompt per rung."""
        ...


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
        """The next rung's inverse temperature. The run takes T, `state.tau_max`, if it is lower.

        Args:
            state: where the ladder stands; `state.tau_max` is infinite while no T is known.
            pool: the draws that the rung's samples will be chosen from.
        """

    def num_rungs(self, state: LadderState) -> int | None:
        """How many rungs there are; `None` where that shows only on the way. Called before the first rung."""
        return None

    def stop_reason(self, state: LadderState) -> str | None:
        """Why the run ends with the rung that `state` has reached, in words for the user; `None` to go on."""
        return None
