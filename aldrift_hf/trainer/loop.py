"""The `Trainer`'s epochs as rungs: what is done when one begins, at each of its updates, and when it ends."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models import fidelity, numerics, sharding
from .run import Run
from .state import Phase

logger = logging.getLogger(__name__)


class RungLoop(TrainerCallback):
    """Begins and ends the run's rungs with the `Trainer`'s epochs."""

    def attach(self, run: Run) -> None:
        """Say which run; the `Trainer` takes its callbacks before there is one."""
        self.run, self.updates_per_rung, self.runtime = run, run.updates_per_rung, run.rollout.runtime
        self.step_began, self.rate = 0.0, 0.0
        self.updates = contextlib.ExitStack()
        """Holds the progress of the rung's updates."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self.run
        rung = state.global_step // self.updates_per_rung
        ladder = run.state.ladder
        run.tell("on_rung_begin", rung=rung, num_rungs=run.args.num_rungs, tau=ladder.tau, tau_max=run.record.tau_max)
        if run.state.rung != rung:  # otherwise resumed in the middle of it: its samples came with the checkpoint
            if run.state.phase is Phase.DRAWN:
                run.end_rung()  # resumed from a checkpoint of its last update, before its record was complete
            run.begin_rung()
        made = min(run.state.updates, run.state.planned)
        self.advance = self.updates.enter_context(self.runtime.progress("updates", run.state.planned, made))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_began, self.rate = time.perf_counter(), float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16 or self.run.state.settled:  # the gradient scaler of fp16 skips such updates by itself
            return
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        if isinstance(kwargs["optimizer"], DeepSpeedOptimizerWrapper):  # it has made its update, and kept no gradient
            numerics.check_update(kwargs["optimizer"].step_was_skipped, rate)
            return
        largest = numerics.check_gradients(kwargs["model"].parameters(), rate)
        policy = self.runtime.policy()
        if state.global_step == 0 and not sharding.is_sharded(policy) and largest == 0:
            fidelity.check_gradient(policy)  # it is zero by right where all costs are the same

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.run.state.settled:
            self.advance(1)
        self.run.updated(time.perf_counter() - self.step_began, self.rate)
        self.runtime.stop_if_asked()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.updates.close()
        learned = self.run.has_learned
        if control.should_epoch_stop and not learned:
            raise RuntimeError(
                f"a callback has set control.should_epoch_stop after {self.run.state.updates} of rung "
                f"{self.run.state.rung}'s {self.updates_per_rung} updates, but a rung has all of its own. Set "
                "control.should_training_stop to end the run, or updates_per_rung for fewer updates."
            )
        should_log = control.should_log  # of logging_strategy="epoch"; any other log resets it
        self.run.end_rung()
        control.should_log = should_log
        reason = self.run.stop_reason() if learned else None
        if reason is not None:
            self.run.record.ended_by = reason
            as_asked = self.run.state.ladder.tau == self.run.state.ladder.tau_max
            logger.log(logging.INFO if as_asked else logging.WARNING, f"training ends: {reason}")
            control.should_training_stop = True
        return control
