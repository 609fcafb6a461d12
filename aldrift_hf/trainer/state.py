"""Where a run stands: everything that a later rung depends on, beside the model, the costs and the random seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from ..algorithm.ladders import LadderState


class Phase(str, Enum):
    """What has been done on the rung that the ladder has reached."""

    DRAWN = "drawn"
    """Its samples are laid out, and its updates are under way."""
    LEARNED = "learned"
    """Its updates are done and its record is complete; also before the first rung."""


@dataclass
class RunState:
    """State of a run.

    Attributes:
        ladder: the inverse temperatures so far, the ladder's log Z, and D.
        phase: of the rung that the ladder has reached.
        prior_costs: of the first rung's proposals: see [`RunRecord`].
        rungs: the figures of each rung begun; those of the last one lack what is learned while `phase` is `DRAWN`.
        proposals: draws so far.
        num_tokens: tokens of prompts and completions drawn so far.
        loss_sum: the rung's training loss, summed over its micro-batches on this process.
        updates: the rung's optimizer updates so far, those that were skipped included.
        planned: updates that the rung is to make; the rest of its epoch is skipped.
        learn_seconds: seconds spent in them.
        seeks_rate: whether the first updates still look for a learning rate.
        rate_trials: updates that did.
        learning_rate: the largest of the rung's updates.
    """

    ladder: LadderState
    phase: Phase = Phase.LEARNED
    prior_costs: list[float] = field(default_factory=list)
    rungs: list[dict[str, Any]] = field(default_factory=list)
    proposals: int = 0
    num_tokens: int = 0
    loss_sum: float = 0.0
    updates: int = 0
    planned: int = 1
    learn_seconds: float = 0.0
    seeks_rate: bool = False
    rate_trials: int = 0
    learning_rate: float = 0.0

    @property
    def rung(self) -> int:
        """Index of the rung that the ladder has reached; -1 before the first."""
        return len(self.ladder.taus) - 1

    @classmethod
    def start(cls, num_prompts: int, tau_max: float | None, objective_range: float | None) -> RunState:
        """Before the first rung."""
        return cls(LadderState.start(num_prompts, tau_max, objective_range))

    @property
    def settled(self) -> bool:
        """Whether the rung has made its updates."""
        return self.updates >= self.planned

    def begin_learning(self, planned: int) -> None:
        """Nothing is learned yet on the rung, which is to make so many updates."""
        self.loss_sum, self.updates, self.planned = 0.0, 0, planned
        self.learning_rate, self.learn_seconds = 0.0, 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        ladder = {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self.ladder).items()
        }
        return {**vars(self), "ladder": ladder}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The inverse of [`to_json`]."""
        ladder = dict(values["ladder"])
        for name in ("log_z", "log_z_error", "prompt_tau"):
            ladder[name] = torch.tensor(ladder[name], dtype=torch.float64)
        state = LadderState(**{**ladder, "taus": tuple(ladder["taus"])})
        return cls(**{**values, "ladder": state, "phase": Phase(values["phase"])})
