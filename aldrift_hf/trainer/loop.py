"""The Trainer's epochs as rungs: what is done when one begins, at each of its updates, and when it ends."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..algorithm.ladder import PATIENCE
from ..models import numerics

if TYPE_CHECKING:
    from .trainer import ALDRIFTTrainer

logger = logging.getLogger(__name__)


class Rungs(TrainerCallback):
    """Calls the trainer's rung at the Trainer's epoch."""

    def __init__(self, trainer: ALDRIFTTrainer) -> None:
        self.trainer = trainer
        self.step_began = 0.0
        self.updates = contextlib.ExitStack()
        """Holds the bar of the rung's updates."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        rung = state.global_step // trainer.updates_per_rung
        progress = trainer.progress
        self._show(rung)
        if progress.rung != rung:  # or else resumed in the middle of it, whose samples came with the checkpoint
            if not progress.complete:
                trainer.end_rung()  # resumed from a checkpoint of the last update, before the record was complete
            trainer.begin_rung(rung)
        bar = trainer.bars.task("updates", trainer.updates_per_rung, progress.updates)
        self.advance = self.updates.enter_context(bar)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_began = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.accelerator.scaler is None:  # or else it leaves such updates out by itself
            numerics.check_gradients(self.trainer.model.parameters(), args.learning_rate)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.progress.updates += 1
        self.trainer.progress.learn_seconds += time.perf_counter() - self.step_began
        self.advance(1)
        self.trainer._stop_if_asked()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.updates.close()
        self.trainer.end_rung()
        if self.trainer._budget_is_spent():
            logger.warning(
                f"max_objective_calls={self.trainer.args.max_objective_calls} is reached: "
                f"{self.trainer.objective_calls} distinct completions evaluated. Training ends after rung "
                f"{self.trainer.progress.rung} at tau = {self.trainer.progress.tau:g}."
            )
        if self.trainer._ladder_is_stuck():
            logger.warning(
                f"the adaptive ladder cannot leave tau = {self.trainer.progress.tau:g}: for {PATIENCE} rungs the "
                f"effective sample size of the proposals stayed below ess_threshold={self.trainer.args.ess_threshold} "
                "of a rung's. Training ends here. Lower ess_threshold, draw more proposals (num_chains), or learn more "
                "on each rung (updates_per_rung, learning_rate)."
            )
        if self.trainer._has_ended():
            control.should_training_stop = True
        return control

    def _show(self, rung: int) -> None:
        """Where the run stands: in rungs or, where their number is not known, in inverse temperature."""
        trainer, args = self.trainer, self.trainer.args
        if args.ladder == "adaptive" and trainer.rungs_wanted == -1:
            trainer.bars.ladder(f"rung {rung}, inverse temperature", args.tau_max, round(trainer.progress.tau, 3))
        else:
            trainer.bars.ladder("rungs", int(args.num_train_epochs), rung)
