"""When a rung's updates are enough, where their number is not set.

The log-weights of a rung's proposals have a standard deviation: so far, in nats, is the model from the rung's target.
Once the updates have moved `log q` of the samples by as much, the rung ends. A model that is to move little, or whose
gradients are mostly noise, so takes a few updates; one that follows its samples closely takes them all.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .run import Run

MOST_UPDATES = 60
"""Updates per rung, at most."""
GROWTH = 1.5
"""The movement is measured after 1 update, and then whenever their number has grown by this factor."""


class Enough(TrainerCallback):
    """Settles a rung: its further updates are skipped."""

    def attach(self, run: Run, limits: bool) -> None:
        """Say which run, and whether it is to be limited; the `Trainer` takes its callbacks before there is one."""
        self.run, self.limits = run, limits

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.limits and self.run.state.updates == 0:
            self.run.state.log_probs_before = self.run.sample_log_probs().tolist()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        rung = self.run.state
        if not self.limits or rung.settled or rung.updates < rung.measure_after:
            return
        rung.measure_after = max(rung.updates + 1, round(GROWTH * rung.updates))
        before = torch.tensor(rung.log_probs_before, dtype=torch.float64)
        rung.settled = (self.run.sample_log_probs() - before).std().item() >= rung.spread
