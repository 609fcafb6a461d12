"""The learning rate, where none is set: such that an update changes the samples' log-probabilities by so many nats.

What a learning rate does depends on the model's size, on the adapter and its rank, and on the optimizer; how far one
update may move a distribution over texts does not. Adam's first update is about as long whatever the gradient, and
changes log-probabilities in proportion to the learning rate. So it is measured on the first updates, which are made
anyway, from a rate that is too small to do harm.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .run import Run

logger = logging.getLogger(__name__)

UPDATE_NATS = 0.3
"""Standard deviation, over samples, of the change of `log q` by one update."""
CLOSE_ENOUGH = 1.5
"""The rate is found when the change is within this factor of [`UPDATE_NATS`]."""
MOST_TRIALS = 4
"""Updates after which the rate is left as it is, or lowered once more."""
LARGEST_CHANGE = 30.0
"""The rate is changed by at most this factor at once."""


class StepSize(TrainerCallback):
    """Sets the learning rate during the first updates of a run; a resumed run goes on with the checkpoint's."""

    def attach(self, run: Run) -> None:
        """Say which run; the `Trainer` takes its callbacks before there is one."""
        self.run = run
        self.before: Tensor | None = None
        """Log-probabilities of the rung's samples before the update; `None` if it is skipped."""
        self.share = 1.0
        """What the schedule takes of the rate for this update: less in a warm-up, and later in a rung's cycle."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state_of_run = self.run.state
        if not state_of_run.seeks_rate or state_of_run.settled:
            self.before = None
            return
        if self.before is None or state_of_run.updates == 0:  # a new rung has other samples
            self.before = self.run.sample_log_probs()
        group = kwargs["optimizer"].param_groups[0]
        self.share = group["lr"] / group.get("initial_lr", group["lr"])

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        run = self.run
        if not run.state.seeks_rate or optimizer is None or self.before is None:
            return
        after = self.run.sample_log_probs()
        moved = after - self.before
        differ = bool((moved != moved[0]).any())  # a single sample, or the same one again, has no standard deviation
        change = (moved.std() if differ else moved[0].abs()).item()
        self.before = after
        if not change > 0:  # a warm-up's first rate is 0; gradients are 0 where all costs are equal
            return
        run.state.rate_trials += 1
        factor = min(LARGEST_CHANGE, max(1 / LARGEST_CHANGE, UPDATE_NATS * self.share / change))
        is_close = 1 / CLOSE_ENOUGH <= factor <= CLOSE_ENOUGH
        if is_close or run.state.rate_trials == MOST_TRIALS:
            run.state.seeks_rate, self.before = False, None
            # Updates that undo each other change little at any rate, and no further one would show it to be too large.
            factor = factor if is_close else min(1.0, factor)
        scale_learning_rate(factor, optimizer, lr_scheduler)
        if not run.state.seeks_rate:
            rate = optimizer.param_groups[0]["lr"]
            logger.info(f"learning_rate is not set: {rate:.2g}, by what the first updates change")


def scale_learning_rate(factor: float, optimizer: Optimizer, lr_scheduler: Any) -> None:
    """Multiply the learning rate, now and for the rest of its schedule."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] *= factor
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # Accelerate wraps it
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
